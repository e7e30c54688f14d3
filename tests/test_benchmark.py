"""benchmark.py: the task of held-out rows, the table; and, where .venv-benchmark is there, lm-eval itself."""

import math
import os
import subprocess
import sys
import types

import pytest
from conftest import ROOT, load, write_rows
from helpers import call, read

LM_EVAL = ROOT / ".venv-benchmark/bin/python"
CHOICES = """
task: colors
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: [red, green, blue]
doc_to_target: answer
"""


@pytest.fixture
def benchmark(monkeypatch):
    """The module, where lm-eval need not be installed."""
    monkeypatch.setattr(sys, "path", list(sys.path))  # from which it takes the chain's folder
    names = {"lm_eval.models.huggingface": ["HFLM"], "lm_eval.tasks": ["TaskManager"]}
    for name in ("lm_eval", "lm_eval.models", *names):
        module = types.ModuleType(name)
        vars(module).update(dict.fromkeys(names.get(name, [])))
        monkeypatch.setitem(sys.modules, name, module)
    return load("chain/benchmark.py")


def test_each_answer_of_a_row_stands_behind_the_text_before_it(benchmark):
    tokenizer = types.SimpleNamespace(decode=lambda ids: " ".join(map(str, ids)))
    row = {"input_ids": [1, 2, 3, 4, 5, 6], "labels": [-100, -100, 3, 4, -100, 6]}
    whole = {"input_ids": [1, 2, 3], "labels": [1, 2, 3]}
    assert benchmark.list_answers([row, whole, {"input_ids": [1, 2], "labels": [1, -100]}], tokenizer) == [
        {"context": "1 2", "answer": " 3 4", "tokens": 2},
        {"context": "1 2 3 4 5", "answer": " 6", "tokens": 1},
        {"context": "1", "answer": " 2 3", "tokens": 2},
    ]


def test_the_loss_is_the_mean_of_tokens_not_of_answers(benchmark):
    items = [
        benchmark.score({"tokens": tokens}, [(-likelihood, True)])["loss"] for tokens, likelihood in ((1, 3), (5, 3))
    ]
    assert benchmark.mean_loss(items) == 1.0
    assert benchmark.score({"tokens": 1}, [(-3.0, False)])["acc"] == 0.0


def test_the_table_has_the_distance_from_the_base_model(benchmark):
    base = {"heldout": {"loss": [3.0, None, False, 8]}, "arc": {"acc": [0.25, 0.1, True, 4]}}
    lora = {"heldout": {"loss": [1.5, None, False, 8]}, "arc": {"acc": [0.5, 0.2, True, 4]}}
    text = benchmark.format_report({"models": {"base": base, "lora": lora}, "notes": ["a note"]})
    assert "| task | metric | rows | base | lora |" in text and text.endswith("a note\n")
    assert "| heldout | loss ↓ | 8 | 3.0000 | 1.5000 (-1.5000) |" in text
    assert "| arc | acc ↑ | 4 | 0.2500 ± 0.1000 | 0.5000 ± 0.2000 (+0.2500) |" in text


# lm-eval itself -------------------------------------------------------------------------------------------------------
needs_lm_eval = pytest.mark.skipif(not LM_EVAL.exists(), reason="no .venv-benchmark: make benchmark makes it")


def measure(folder, *args) -> subprocess.CompletedProcess:
    command = [LM_EVAL, ROOT / "scripts/chain/benchmark.py", *args, "--output_dir", folder / "report"]
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=folder, env=offline)


@needs_lm_eval
def test_the_held_out_loss_of_lm_eval_is_that_of_evaluate(tiny_model, question_rows, tmp_path):
    options = ["--model_name_or_path", tiny_model, "--dataset_name", question_rows]
    call("02_train_lora.py", *options, "--max_steps", "5", "--learning_rate", "0.05", "--output_dir", tmp_path / "lora")
    model = ["--model_name_or_path", tmp_path / "lora/adapter", "--base_model", tiny_model]
    call("chain/probe.py", *model, "--dataset_name", question_rows, "--output", tmp_path / "probe.json")
    rows = [{"question": "what color is the sky", "answer": 2}, {"question": "what color is the sea", "answer": 1}]
    (tmp_path / "colors.yaml").write_text(CHOICES.replace("FILE", str(write_rows(tmp_path / "colors.jsonl", rows))))
    given = ["--base_model", tiny_model, "--models", tmp_path / "lora/adapter", "--probe", tmp_path / "probe.json"]
    result = measure(tmp_path, *given, "--tasks", f"heldout,{tmp_path}/colors.yaml")
    assert result.returncode == 0, result.stderr
    models = read(tmp_path / "report/benchmark.json")["models"]
    probe = read(tmp_path / "probe.json")
    value, _, higher, rows = models["lora"]["heldout"]["loss"]
    assert math.isclose(value, probe["loss"], rel_tol=1e-5) and not higher and rows == len(probe["rows"])
    assert models["base"]["heldout"]["loss"][0] > value
    assert models["lora"]["colors"]["acc"][3] == 2 and 0 <= models["base"]["colors"]["acc"][0] <= 1
    assert "| colors | acc ↑ | 2 |" in (tmp_path / "report/benchmark.md").read_text()


@needs_lm_eval
@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ("no_such_task", "lm-eval has no task 'no_such_task'"),
        ("arc_easy", "the data of arc_easy is not to be had"),
        ("gone.yaml", "there is no gone.yaml"),
        ("heldout", "no held-out rows for the task heldout"),
    ],
)
def test_a_task_that_cannot_be_had_is_said_before_a_model_is_loaded(tasks, words, tmp_path):
    result = measure(tmp_path, "--base_model", tmp_path / "none", "--tasks", tasks)
    assert result.returncode == 1 and words in result.stderr and "Traceback" not in result.stderr, result.stderr
    assert not (tmp_path / "report").exists()
