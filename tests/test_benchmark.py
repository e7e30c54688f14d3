"""make benchmark: the held-out rows as a task of lm-eval, the table, and lm-eval itself where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, check_refusal, load
from helpers import read

benchmark = load("chain/benchmark.py")
PYTHON = ROOT / ".venv-benchmark/bin/python"


# The task heldout -----------------------------------------------------------------------------------------------------
def test_each_stretch_with_loss_is_an_answer_to_all_before_it():
    rows = [
        {"input_ids": [1, 5, 6, 7, 8, 9], "labels": [-100, -100, 6, 7, -100, 9]},
        {"input_ids": [5, 6, 7], "labels": [5, 6, 7]},  # the first token follows on nothing
        {"input_ids": [5, 6], "labels": [5, -100]},
        {"input_ids": [5, 6], "labels": [-100, -100]},
    ]
    assert benchmark.list_answers(rows) == [
        {"context": [1, 5], "answer": [6, 7]},
        {"context": [1, 5, 6, 7, 8], "answer": [9]},
        {"context": [5], "answer": [6, 7]},
    ]


def test_the_loss_is_the_mean_of_all_tokens_not_of_answers():
    scored = [
        benchmark.score({"answer": [6, 7, 8]}, [(-3.0, True)]),
        benchmark.score({"answer": [9]}, [(-5.0, False)]),
    ]
    assert benchmark.mean_loss([each["loss"] for each in scored]) == 2.0
    assert [each["acc"] for each in scored] == [1.0, 0.0]


# The table ------------------------------------------------------------------------------------------------------------
def result(version, samples: int, **metrics) -> dict:
    found = {
        name: {"value": value, "stderr": error, "higher_is_better": higher}
        for name, (value, error, higher) in metrics.items()
    }
    return {"version": version, "num_fewshot": 5, "samples": samples, "metrics": found}


def report(**settings) -> dict:
    def measured(loss, acc):
        arc = result(1.0, 50, acc=(acc, 0.01, True))
        return {"heldout": result(None, 2, loss=(loss, None, False)), "arc": arc, "group": result(3, 50)}

    models = [("base", "m", measured(4.0, 0.5)), ("lora", "out/lora/adapter", measured(1.50004, 0.46))]
    models = [{"name": name, "path": path, "results": results} for name, path, results in models]
    heldout = {"answers": 2, "tokens": 9, "model": "out/lora/adapter", "loss": 1.5}
    plain = {"lm_eval": "0.4", "limit": None, "num_fewshot": None, "apply_chat_template": False, "heldout": heldout}
    return plain | {"models": models} | settings


def test_the_table_has_a_line_for_each_metric_with_the_distance_from_base():
    text = benchmark.format_report(report())
    assert text.splitlines()[2:6] == [
        "| task | metric | samples | base | lora |",
        "| --- | --- | --- | --- | --- |",
        "| heldout | loss ↓ | 2 | 4.0000 | 1.5000 (-2.5000) |",
        "| arc | acc ↑ | 50 | 0.5000 ± 0.0100 | 0.4600 ± 0.0100 (-0.0400) |",
    ]
    assert "lm-eval 0.4; arc version 1.0, 5-shot." in text
    assert "9 tokens, the same for all models: those of out/lora/adapter" in text
    assert "make evaluate: 1.5000 of lora; here it is +0.0000." in text
    assert "plain text" in text and "--limit" not in text


def test_the_table_says_what_was_asked_otherwise():
    text = benchmark.format_report(report(limit=0.5, apply_chat_template=True))
    assert "--limit 0.5" in text and "as a chat" in text
    assert "make evaluate" not in text  # which measures all rows
    alone = benchmark.format_report(report(heldout=None))
    assert "nats" not in alone


def test_models_are_named_by_their_steps_unless_two_have_one_name():
    assert benchmark.name_models("m", ["out/lora/adapter", "out/full/model", "other"]) == [
        "base",
        "lora",
        "full",
        "other",
    ]
    paths = ["a/lora/adapter", "b/lora/adapter"]
    assert benchmark.name_models("m", paths) == ["base", *paths]


def test_lm_eval_is_asked_as_the_options_say_and_its_metrics_are_read(monkeypatch):
    said = {
        "results": {
            "gsm": {"alias": "gsm", "sample_len": 4, "exact,strict": 0.5, "exact_stderr,strict": 0.1},
            "arc": {"acc,none": 0.25, "acc_stderr,none": "N/A", "word,none": "text"},
        },
        "higher_is_better": {"gsm": {"exact": True}, "arc": {"acc": None}},
        "versions": {"gsm": 3.0},
        "n-shot": {"gsm": 5, "arc": 0},
        "n-samples": {"gsm": {"original": 9, "effective": 4}, "arc": {"original": 7, "effective": 7}},
    }
    asked = {}
    lm_eval = SimpleNamespace(simple_evaluate=lambda model, **options: asked.update(options, model=model) or said)
    monkeypatch.setitem(sys.modules, "lm_eval", lm_eval)
    monkeypatch.setattr(benchmark, "wrap_model", lambda *given: given)
    chat = SimpleNamespace(chat_template="...")
    monkeypatch.setattr(benchmark.generation, "load_model", lambda *given: (given, chat))
    options = ["--base_model", "m", "--dtype", "bfloat16", "--limit", "4", "--num_fewshot", "5", "--batch_size", "3"]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *options, "--apply_chat_template"])
    results = benchmark.measure("out/lora/adapter", benchmark.read_arguments(), ["tasks"])
    (name, base, dtype, _), tokenizer, batch_size = asked.pop("model")
    assert (name, base, dtype, tokenizer, batch_size) == ("out/lora/adapter", "m", "bfloat16", chat, 3)
    asked.pop("log_samples")
    assert asked == {"tasks": ["tasks"], "limit": 4, "num_fewshot": 5, "apply_chat_template": True}
    exact = {"value": 0.5, "stderr": 0.1, "higher_is_better": True}
    assert results["gsm"] == {"version": 3.0, "num_fewshot": 5, "samples": 4, "metrics": {"exact (strict)": exact}}
    assert results["arc"]["metrics"] == {"acc": {"value": 0.25, "stderr": None, "higher_is_better": None}}
    chat.chat_template = None
    with pytest.raises(SystemExit, match="Leave out --apply_chat_template"):
        benchmark.measure("out/lora/adapter", benchmark.read_arguments(), ["tasks"])


# Refusals -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", " ,"], "no task is given"),
        (["--tasks", "heldout"], "VALIDATION_ROWS=10"),
        (["--probe", "empty.json"], "VALIDATION_ROWS=10"),
        (["--probe", "damaged.json"], "damaged.json is damaged"),
        (["--limit", "0"], "--limit"),
        (["--limit", "2.5"], "--limit"),
    ],
    ids=["no task", "no probe", "no rows", "a damaged probe", "no limit", "a broken limit"],
)
def test_what_cannot_be_asked_is_refused(options, said, tmp_path, monkeypatch, capsys):
    (tmp_path / "empty.json").write_text(json.dumps({"rows": [], "model": "m", "loss": None}))
    (tmp_path / "damaged.json").write_text("{")
    check_refusal("chain/benchmark.py", options, said, tmp_path, monkeypatch, capsys)


# lm-eval --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def installed():
    ready = PYTHON.exists() and subprocess.run([PYTHON, "-c", "import lm_eval"], capture_output=True).returncode == 0
    if not ready:
        pytest.skip(f"no lm-eval in {PYTHON.parent.parent}: make benchmark installs it")


def make_adapter(base: Path, folder: Path) -> Path:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder


def measure(model, rows: list[dict]) -> tuple[float, list[bool]]:
    """Loss per token, and of each row whether all that is learned is the likeliest."""
    import torch

    total, count, greedy = 0.0, 0, []
    for row in rows:
        chances = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
        places = [place for place, label in enumerate(row["labels"]) if place and label != -100]
        total -= sum(chances[place - 1, row["labels"][place]].item() for place in places)
        count += len(places)
        greedy.append(all(chances[place - 1].argmax() == row["labels"][place] for place in places))
    return total / count, greedy


TASK = """\
task: colors
dataset_path: json
dataset_kwargs: {{data_files: {{train: {file}, test: {file}}}}}
output_type: multiple_choice
training_split: train
test_split: test
doc_to_text: !function texts.ask
doc_to_choice: [red, green, blue]
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 2.0}}
"""


ASK = """
from evaluate import load  # the package, which lm-eval's tasks take metrics from, and not our script

def ask(row):
    return "what color is the " + row["thing"]
"""


def write_task(folder: Path, rows: list[dict], more="") -> None:
    """A task of one's own, colors.yaml, with a function in a file beside it."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "colors.yaml").write_text(TASK.format(file=folder / "rows.jsonl") + more)
    (folder / "texts.py").write_text(ASK)


def start(folder: Path, *options, **environment) -> subprocess.Popen:
    """The command of make benchmark."""
    runner, script = (ROOT / "scripts/chain" / name for name in ("run_step.py", "benchmark.py"))
    command = [PYTHON, runner, "--", script, *options, "--output_dir", folder / "report"]
    environment = os.environ | environment
    return subprocess.Popen(map(str, command), cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def measured(installed, tiny_model, tmp_path_factory):
    """The report on a tiny model and an adapter, a third that is not there; and what the losses are."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("benchmark")
    adapter = make_adapter(tiny_model, folder / "lora/adapter")
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.inference_mode():
        best = base.generate(torch.tensor([[1, 3, 5, 6]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
        likely = best[0].tolist()
        rows = [
            {"input_ids": likely, "labels": [-100, -100, -100, -100, *likely[4:]]},
            # BOS, tokens that no text would become again, and two answers
            {"input_ids": [1, 0, 0, 7, 1, 1, 8, 2], "labels": [1, -100, 0, 7, -100, 1, 8, 2]},
        ]
        expected = {"base": measure(base, rows)}
        expected["lora"] = measure(PeftModel.from_pretrained(base, adapter).eval(), rows)
    probe = {"model": str(adapter), "rows": rows, "loss": expected["lora"][0], "tokens": 8}
    (folder / "probe.json").write_text(json.dumps(probe))
    questions = [{"thing": thing, "answer": number % 3} for number, thing in enumerate("sky sea a b c d".split())]
    write_task(folder, questions)
    models = ["--base_model", tiny_model, "--models", adapter, folder / "missing"]
    tasks = ["--probe", "probe.json", "--tasks", "colors.yaml,heldout", "--num_fewshot", "1", "--batch_size", "2"]
    process = start(folder, *models, *tasks)
    errors = process.communicate()[1]
    return folder, expected, process.returncode, errors


def test_the_held_out_loss_of_lm_eval_is_that_of_the_tokens(measured):
    folder, expected, _, _ = measured
    base, lora = read(folder / "report/benchmark.json")["models"]
    for model in (base, lora):
        result = model["results"]["heldout"]
        loss, greedy = expected[model["name"]]
        assert result["metrics"]["loss"]["value"] == pytest.approx(loss, abs=1e-5)
        assert result["metrics"]["loss"]["higher_is_better"] is False
        assert result["samples"] == 3 and result["num_fewshot"] == 0
    assert expected["base"][1] == [True, False] and expected["base"][0] != pytest.approx(expected["lora"][0], abs=0.01)
    assert base["results"]["heldout"]["metrics"]["acc"]["value"] == pytest.approx(1 / 3)
    text = (folder / "report/benchmark.md").read_text(encoding="utf-8")
    assert f"make evaluate: {expected['lora'][0]:.4f} of lora; here it is +0.0000." in text.replace(
        "-0.0000", "+0.0000"
    )


def test_a_task_of_a_file_is_asked_as_lm_eval_does(measured):
    folder, *_ = measured
    for model in read(folder / "report/benchmark.json")["models"]:
        result = model["results"]["colors"]
        assert (result["version"], result["num_fewshot"], result["samples"]) == (2.0, 1, 6)
        metric = result["metrics"]["acc"]
        assert metric["higher_is_better"] is True and 0 <= metric["value"] <= 1 and isinstance(metric["stderr"], float)
    assert "colors version 2.0, 1-shot" in (folder / "report/benchmark.md").read_text(encoding="utf-8")


def test_what_was_measured_stays_when_a_later_model_fails(measured):
    folder, _, status, errors = measured
    assert status == 1 and f"no model at '{folder / 'missing'}'" in errors and "Traceback" not in errors
    report = read(folder / "report/benchmark.json")
    assert [model["name"] for model in report["models"]] == ["base", "lora"]


FIND_EACH = """
import sys
from lm_eval import tasks
manager = tasks.TaskManager()  # one for all: it reads thousands of files
tasks.TaskManager = lambda **_: manager
sys.path.append(sys.argv[1])  # behind lm-eval's evaluate
import benchmark
for name in sys.argv[2:]:
    try:
        print(name, "has", len(benchmark.find_tasks([name], [])))
    except (SystemExit, RuntimeError) as error:
        print(error)
"""


def test_tasks_that_cannot_be_had_are_refused(installed, tmp_path):
    said = {
        "nosuchtask": "error: lm-eval has no task nosuchtask, ",
        "no.yaml": "error: lm-eval has no task no.yaml, and there is no such file",
        "humaneval": "error: humaneval runs what the model writes",
        "arc_easy": "arc_easy: Couldn't reach 'allenai/ai2_arc' on the Hub",  # the runner says what to do
    }
    command = [PYTHON, "-c", FIND_EACH, ROOT / "scripts/chain", *said]
    lines = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True).stdout.splitlines()
    assert len(lines) == len(said)
    for line, words in zip(lines, said.values(), strict=True):
        assert line.startswith(words)
        assert not line.startswith("error: ") or line.endswith("lm_eval ls tasks")


def test_tasks_are_looked_at_before_a_model_is_loaded(installed, tmp_path):
    write_task(tmp_path, [{"thing": "sky", "answer": 0}], "unsafe_code: true\n")
    process = start(tmp_path, "--base_model", "missing", "--tasks", "colors.yaml")
    errors = process.communicate()[1]
    assert process.returncode == 1 and "error: colors runs what the model writes" in errors
    assert "Traceback" not in errors and not (tmp_path / "report").exists()
