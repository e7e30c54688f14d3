"""Interrupted trainings go on as if nothing had been, others are not mixed with them, and what goes wrong is said."""

import gc
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import load, run

OPTIONS = ["--learning_rate", "0.01", "--num_train_epochs", "3", "--logging_steps", "4", "--save_steps", "5"]
SCRIPTS = {
    "lora": ("02_train_lora.py", "adapter/adapter_model.safetensors"),
    "full": ("03_train_full.py", "model/model.safetensors"),
}
STEPS = 21  # 28 rows in batches of 4, three times


def command(model, data, output, *args):
    return ["--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, *OPTIONS, *args]


def read(output: Path, kind: str) -> tuple[list, bytes]:
    """Losses and all else that a log has but times, and the weights."""
    record = json.loads((output / "run.json").read_text())
    history = [
        {key: entry[key] for key in entry if "second" not in key and "runtime" not in key}
        for entry in record["history"]
    ]
    return history, (output / SCRIPTS[kind][1]).read_bytes()


def train_until(step: int, kind: str, args: list, monkeypatch, number=signal.SIGTERM):
    """Runs a training in this process; it gets a signal in the middle of a step."""
    module = load(SCRIPTS[kind][0])
    training_step = module.ResumableTrainer.training_step

    def interrupted_step(self, *args, **kwargs):
        if self.state.global_step + 1 == step and not self.stopped_by:
            os.kill(os.getpid(), number)
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(module.ResumableTrainer, "training_step", interrupted_step)
        patch.setattr("sys.argv", [SCRIPTS[kind][0], *map(str, args)])
        with pytest.raises(SystemExit) as stop:
            module.main()
    code = stop.value.code
    del stop
    gc.collect()  # the lock is held as long as the frame of main is there
    return code


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, question_rows, tmp_path_factory):
    """Output folders of a training of each kind."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    for kind, (script, _) in SCRIPTS.items():
        result = run(script, *command(tiny_model, question_rows, folder / kind), cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


# In the middle of an epoch and between two logs; at the end of an epoch; twice; after the last step.
@pytest.mark.parametrize("steps", [[3], [7], [6, 18], [STEPS]])
@pytest.mark.parametrize("kind", SCRIPTS)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    kind, steps, uninterrupted, tiny_model, question_rows, tmp_path, monkeypatch, capsys
):
    args = command(tiny_model, question_rows, tmp_path / kind)
    for step in steps:
        if step == STEPS:  # killed while it saved the result
            shutil.copytree(uninterrupted / kind, tmp_path / kind)
            (tmp_path / kind / "run.json").unlink()
            break
        assert train_until(step, kind, args, monkeypatch) == 128 + signal.SIGTERM
        assert f"Stopped after step {step}. Type the same command again to go on." in capsys.readouterr().err
        assert not (tmp_path / kind / "run.json").exists()
    result = run(SCRIPTS[kind][0], *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"Going on from {tmp_path / kind}/checkpoints/checkpoint-{step}\n" in result.stdout
    assert read(tmp_path / kind, kind) == read(uninterrupted / kind, kind)
    record = json.loads((tmp_path / kind / "run.json").read_text())["metrics"]
    assert record["train_samples_per_second"] * record["train_runtime"] == pytest.approx(84, rel=0.05)
