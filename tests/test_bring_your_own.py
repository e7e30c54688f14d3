"""bring_your_own.py without its trainings: what is tried, what is written for it, and how an outcome is judged."""

import json
import sys

import pytest
from conftest import ROOT
from test_makefile import Project

sys.path.insert(0, str(ROOT / "bench"))
from bring_your_own import find_message, format_table, judge, look_at, make
from brought import ANSWERS, FORMS, KINDS, MODELS, PAIRS, QUESTIONS, Case, save_model, write_data
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM

REFUSAL = "+ python step.py\nerror: {}.\nmake: *** [Makefile:211: out/dataset/run.json] Error 1\n"
LEFT = {"rows": 24, "held_out": 4, "text": " ".join(QUESTIONS + ANSWERS), "losses": [3.0, 2.0, 2.0]}


def test_what_is_tried():
    assert len(FORMS) >= 30 and len(set(PAIRS)) == 24 and not FORMS.keys() & MODELS.keys()
    kinds = {case.model[0] for case in MODELS.values() if case.model and not case.refused}
    assert len(kinds) >= 20 and all(AutoConfig.for_model(kind).model_type == kind for kind in kinds)
    for case in (FORMS | MODELS).values():
        assert case.says or not case.refused, "a refusal says something"


@pytest.mark.parametrize("name", FORMS)
def test_each_form_is_written(name, tmp_path):
    data, files = write_data(FORMS[name], tmp_path), FORMS[name].files
    assert data == tmp_path or [data.name] == [*files]
    written = [file for file in tmp_path.rglob("*") if file.is_file()]
    assert written and (name == "an empty file" or all(file.stat().st_size for file in written))


@pytest.mark.parametrize("name", ["alpaca", "ShareGPT", ".jsonl.gz", "TSV", "CSV with a BOM, of Excel", "parquet"])
def test_forms_hold_the_rows_that_are_looked_for(name, tmp_path):
    path = write_data(FORMS[name], tmp_path)
    kind = next(kind for kind in ("parquet", "csv", "json") if kind in path.name.replace("tsv", "csv"))
    options = {"delimiter": "\t"} if path.suffix == ".tsv" else {}
    text = json.dumps([*load_dataset(kind, data_files=str(path), split="train", **options)], ensure_ascii=False)
    text = text.replace('\\"', '"')
    assert all(word in text for word in FORMS[name].words)


@pytest.mark.parametrize("name", ["Mamba", "Llama in 50 files", "Llama in float16", "pickled weights", "GPTQ", "LLaVA"])
def test_models_are_what_they_are_called(name, tmp_path):
    case, base = MODELS[name], tmp_path / "base"
    save_model(base, *(case.model or KINDS["Llama"]))
    if case.change:
        case.change(base)
    config = json.loads((base / "config.json").read_text())
    if not case.refused:
        AutoModelForCausalLM.from_pretrained(base)
    assert len([*base.glob("*.safetensors")]) >= {"Llama in 50 files": 50, "pickled weights": 0}.get(name, 1)
    assert (base / "pytorch_model.bin").exists() == (name == "pickled weights")
    assert ("quantization_config" in config) == (name == "GPTQ")
    assert config.get("dtype") == {"LLaVA": None, "Llama in float16": "float16"}.get(name, "float32")
    assert config["model_type"] == {"LLaVA": "llava", "Mamba": "mamba"}.get(name, "llama")


@pytest.mark.parametrize(
    ("refused", "status", "output", "outcome", "said"),
    [
        (False, 0, "read as alpaca\nall went well\n", "ok", "read as alpaca"),
        (False, 0, "Traceback (most recent call last):\n  File\nKeyError: 'a'\n", "FAILED", "a traceback: KeyError"),
        (True, 2, "Traceback (most recent call last):\nKeyError: 1\n" + REFUSAL.format("x. Give alpaca"), "FAILED", ""),
        (True, 2, REFUSAL.format("no alpaca here. Give the rows another form"), "refused", "no alpaca here. Give the"),
        (True, 2, REFUSAL.format("no alpaca here:\nleave it out"), "refused", "no alpaca here: leave it out."),
        (True, 2, REFUSAL.format("no alpaca here"), "FAILED", "it names nothing to do: no alpaca here."),
        (True, 2, "make: *** [Makefile:9: x] Error 1\n", "FAILED", "it names nothing to do: make: ***"),
        (
            True,
            2,
            REFUSAL.format("alpaca: KeyError. Mend that, and … For all of it: TRACEBACK=1"),
            "FAILED",
            "it names",
        ),
        (True, 2, "Makefile:55: *** no alpaca. Type RECIPE=one.  Stop.\n", "refused", "no alpaca. Type"),
        (True, 2, REFUSAL.format("no such rows. Give others"), "FAILED", "it does not say 'alpaca'"),
        (True, 0, "read as alpaca\n", "FAILED", "taken, and should be refused"),
        (False, 2, REFUSAL.format("alpaca. Give others"), "FAILED", "refused: alpaca. Give others."),
        (False, 0, "read as text\n", "FAILED", "it does not say 'alpaca'"),
        (False, -9, "alpaca\n", "FAILED", "status -9"),
        (False, 130, "alpaca\n", "FAILED", "status 130"),
    ],
)
def test_an_outcome_is_judged(refused, status, output, outcome, said):
    found = judge(Case(says="alpaca", refused=refused), status, output, LEFT)
    assert found[0] == outcome and said in found[1]


@pytest.mark.parametrize(
    ("left", "said"),
    [
        ({"rows": 12}, "8 rows and 4 held out, of 24 with 4"),
        ({"held_out": 0}, "24 rows and 0 held out, of 24 with 4"),
        ({"text": " ".join(QUESTIONS)}, "24 texts are not in the rows"),
        ({"losses": []}, "held-out losses []"),
        ({"losses": [3.0, float("nan")]}, "held-out losses [3.0, nan]"),
    ],
)
def test_what_was_read_is_held_against_the_files(left, said):
    assert judge(Case(), 0, "", LEFT)[0] == "ok"
    outcome, what = judge(Case(), 0, "", LEFT | left)
    assert outcome == "FAILED" and said in what


def test_the_rows_that_steps_left_are_counted(tmp_path):
    assert look_at(tmp_path)["rows"] == 0
    (tmp_path / "dataset").mkdir()
    (tmp_path / "dataset/train.jsonl").write_text('{"text": "a \\"quoted\\" word"}\n' * 2)
    (tmp_path / "dataset/validation.jsonl").write_text('{"text": "held out"}\n')
    (tmp_path / "report").mkdir()
    (tmp_path / "report/evaluation.json").write_text('{"models": [{"loss": 2.5}, {"loss": 1.5}]}')
    left = look_at(tmp_path)
    assert (left["rows"], left["held_out"], left["losses"]) == (3, 1, [2.5, 1.5])
    assert 'a "quoted" word' in left["text"] and "held out" in left["text"]


def test_the_table_is_one_line_for_a_case():
    text = format_table([{"case": "a|b", "outcome": "ok", "what": "two\nlines <s>" + "x" * 300}])
    assert text.splitlines()[2].startswith("| a\\|b | ok | two lines &lt;s>xx") and len(text.splitlines()) == 3
    assert find_message("nothing") == ""


def test_make_is_called_with_what_was_brought(tmp_path, monkeypatch):
    Project(tmp_path)
    monkeypatch.setattr("bring_your_own.ROOT", tmp_path)
    monkeypatch.setenv("MAKEFLAGS", "n")  # of the make that called this
    status, output = make(tmp_path / "outputs", ["help"], tmp_path / "log", DATASET="a b.jsonl")
    assert status == 0 and "DATASET=a b.jsonl" in output and (tmp_path / "log").read_text() == output
