"""The README's commands on the embedded model, with fewer steps and held-out rows: some minutes on two cores."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, run, write_rows


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    """Runs make in the repository, with results in a folder of this test's and without a .env."""
    output = tmp_path_factory.mktemp("embedded")
    data = output / "data"
    shutil.copytree(ROOT / "data", data)
    held_out = data / "validation.jsonl"
    held_out.write_text("".join(held_out.read_text().splitlines(keepends=True)[:16]))
    environment = Path(sys.prefix)
    if not (environment / "installed").exists():
        pytest.skip(f"{environment} was not made by make setup")

    def run_make(target, *variables):
        command = ["make", target, f"OUT={output}", f"VENV={sys.prefix}", "BASE_MODEL=embedded", f"DATASET={data}"]
        command += ["RECIPE=embedded", "VALIDATION_ROWS=0", "ARGS=", *variables]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    run_make.output = output
    return run_make


def assert_near(metrics: dict) -> None:
    """The peak of the memory was predicted within a fifth of what was measured."""
    assert metrics["predicted_memory_bytes"] == pytest.approx(metrics["peak_memory_bytes"], rel=0.2)


def test_train_merge_compare_infer_evaluate(make):
    steps = "ARGS=--max_steps 9 --logging_steps 3"
    said = make("train-lora", steps)
    assert "train.jsonl: 302 rows" in said and "trainable params: 4,884,480" in said
    model = make.output / "base-model"
    assert json.loads((model / "config.json").read_text())["num_hidden_layers"] == 30
    assert (model / "model.safetensors").stat().st_size > 5e8
    record = json.loads((make.output / "lora/run.json").read_text())
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert len(losses) == 3 and losses[0] > losses[2]
    assert record["inputs"]["dataset"]["record"]["dataset"]["name"] == str(make.output / "data")
    assert record["base_model"]["name"] == "SmolLM2-135M-Instruct"
    assert record["metrics"]["peak_memory_bytes"] < 4 * 2**30
    assert_near(record["metrics"])
    assert (make.output / "lora/loss.png").stat().st_size > 10_000
    assert "02_train_lora.py" not in make("train-lora", steps)

    assert "LoR" in make("infer", "FROM=base", "PROMPT=What is LoRA?", "ARGS=--max_new_tokens 12")
    answer = make("infer", "PROMPT=What is LoRA?", "ARGS=--max_new_tokens 12").splitlines()[-1]

    assert "trainable params: 134,515,008 || all params: 134,515,008" in make("train-full", steps)
    full = json.loads((make.output / "full/run.json").read_text())
    assert full["metrics"]["peak_memory_bytes"] < 6 * 2**30
    assert_near(full["metrics"])
    make("merge", "ARGS=--max_new_tokens 8")
    ask = ("PROMPT=What is LoRA?", "ARGS=--max_new_tokens 12")
    assert make("infer", "FROM=merged", *ask).splitlines()[-1] == answer
    assert make("pipeline", "FROM=adapter", *ask).splitlines()[-1] == answer
    page = (ROOT / "docs/use.md").read_text(encoding="utf-8").split("## Into Python")[1].split("\n## ")[0]
    code = "\n".join(line[4:] for line in page.splitlines() if line.startswith("    "))
    code = code.replace('"outputs/', f'"{make.output}/')
    python = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=make.output)
    asked = make("infer", "PROMPT=What is LoRA?", "ARGS=--max_new_tokens 64")
    assert python.stdout.strip() and python.stdout.strip() in asked, python.stderr
    assert "model.gguf" in make("export", "FROM=merged") and "adapter.gguf" in make("export")
    assert "up to date" in make("export") and (make.output / "export/adapter-f16/Modelfile").exists()
    assert "| trainable parameters | 4,884,480 | 134,515,008 | 33,554,432 |" in make("compare")
    assert (make.output / "report/comparison.png").stat().st_size > 10_000
    for source in ("adapter", "merged", "full"):
        assert "Dry run" in make("push", f"FROM={source}", "REPO=user/name", "ARGS=--dry_run")

    assert "| merged |" in make("evaluate", "ARGS=--max_new_tokens 4")
    base, *trained = json.loads((make.output / "report/evaluation.json").read_text())["models"]
    assert [model["name"] for model in trained] == ["lora", "full", "merged"]
    assert all(model["loss"] < 0.95 * base["loss"] for model in trained)
    lora, _, merged = trained
    assert round(lora["loss"], 4) == round(merged["loss"], 4) and lora["answers"] == merged["answers"]
    for step, model in (("lora", lora), ("full", trained[1])):
        assert json.loads((make.output / step / "run.json").read_text())["metrics"]["eval_loss"] == pytest.approx(
            model["loss"], abs=1e-4
        )


@pytest.mark.parametrize(
    ("method", "script", "recipe"),
    [("lora", "02_train_lora.py", "embedded"), ("full", "03_train_full.py", "embedded-full")],
)
def test_the_memory_of_longer_rows_is_predicted(method, script, recipe, make, tmp_path):
    make("download")
    model, rows = make.output / "base-model", write_rows(tmp_path / "rows.jsonl", [{"text": "memory " * 400}] * 12)
    options = ["--config", ROOT / f"env/recipes/{recipe}.yaml", "--max_length", "256", "--max_steps", "2"]
    predict = ["--model", model, "--method", method, "--output", "memory.json", "--", *options]
    assert run("chain/predict_memory.py", *predict, cwd=tmp_path).returncode == 0
    train = [ROOT / "scripts" / script, "--model_name_or_path", model, "--dataset_name", rows, *options]
    result = run("chain/run_step.py", "out", "--prediction", "memory.json", "--", *train, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert_near(json.loads((tmp_path / "out/run.json").read_text())["metrics"])
