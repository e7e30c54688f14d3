"""Interrupted trainings go on as if nothing had been, others are not mixed with them, and what goes wrong is said."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import load, run, write_rows
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize(
    ("step", "options"),
    [
        (4, "--save_strategy epoch --eval_strategy epoch --dataset_test_split validation"),
        (7, "--save_steps 7 --eval_strategy epoch --dataset_test_split validation"),
        (7, "--save_steps 7 --logging_strategy epoch"),
        (5, "--save_strategy best --metric_for_best_model loss --greater_is_better true --save_total_limit 1 "
            "--eval_strategy steps --eval_steps 1 --eval_on_start true --dataset_test_split validation"),
        (3, "--packing true --max_length 64 --dataset_test_split validation"),
    ],
)  # fmt: skip
def test_so_does_one_with_other_options(step, options, tiny_model, question_rows, tmp_path, monkeypatch):
    for name in ("whole", "parts"):
        args = command(tiny_model, question_rows, tmp_path / name, *options.split())
        if name == "parts":
            assert train_until(step, "lora", args, monkeypatch) == 128 + signal.SIGTERM
        result = run("02_train_lora.py", *args, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert f"checkpoint-{step}\n" in result.stdout
    assert read(tmp_path / "parts", "lora") == read(tmp_path / "whole", "lora")


def test_a_run_begun_anew_says_how_not_to_lose_it(tiny_model, question_rows, tmp_path, monkeypatch, capsys):
    args = command(tiny_model, question_rows, tmp_path / "lora", "--restart", "true")
    train_until(3, "lora", args, monkeypatch)
    said = "Type the same command, without --restart true (RESTART=1), again to go on."
    assert said in capsys.readouterr().err


def test_a_run_goes_on_with_a_moved_model_and_saves_as_often_as_is_asked_then(
    uninterrupted, tiny_model, question_rows, tmp_path, monkeypatch
):
    train_until(3, "lora", command(tiny_model, question_rows, tmp_path / "lora"), monkeypatch)
    model = shutil.copytree(tiny_model, tmp_path / "model")
    options = ("--save_steps", "4", "--save_total_limit", "9")
    result = run("02_train_lora.py", *command(model, question_rows, tmp_path / "lora", *options), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read(tmp_path / "lora", "lora") == read(uninterrupted / "lora", "lora")
    names = {path.name for path in (tmp_path / "lora/checkpoints").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (3, 4, 8, 12, 16, 20, 21)}


def test_a_checkpoint_that_was_being_exchanged_is_gone_on_from(uninterrupted, tiny_model, question_rows, tmp_path):
    shutil.copytree(uninterrupted / "lora", tmp_path / "lora")
    (tmp_path / "lora/run.json").unlink()
    newest = tmp_path / f"lora/checkpoints/checkpoint-{STEPS}"
    newest.rename(newest.with_name(f"{newest.name}.old"))
    result = run("02_train_lora.py", *command(tiny_model, question_rows, tmp_path / "lora"), cwd=tmp_path)
    assert result.returncode == 0 and f"Going on from {newest}\n" in result.stdout


def test_a_checkpoint_that_was_being_removed_is_gone(uninterrupted, tiny_model, question_rows, tmp_path):
    shutil.copytree(uninterrupted / "lora", tmp_path / "lora")
    last, *others = sorted((tmp_path / "lora/checkpoints").glob("checkpoint-*"))
    for checkpoint in others:
        shutil.rmtree(checkpoint)
    (last / "optimizer.pt").unlink()
    last.rename(last.with_name(f"{last.name}.old"))
    result = run("02_train_lora.py", *command(tiny_model, question_rows, tmp_path / "lora"), cwd=tmp_path)
    assert result.returncode == 0 and "Going on" not in result.stdout, result.stderr


@pytest.mark.parametrize("kind", SCRIPTS)
def test_weights_that_are_not_finite_are_no_result(kind, tiny_model, question_rows, tmp_path, monkeypatch):
    module = load(SCRIPTS[kind][0])
    training_step = module.ResumableTrainer.training_step

    def spoiled_step(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        if self.state.global_step + 1 == STEPS:
            next(weight for weight in self.model.parameters() if weight.requires_grad).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr(module.ResumableTrainer, "training_step", spoiled_step)
    args = command(tiny_model, question_rows, tmp_path / kind, "--save_strategy", "no")
    monkeypatch.setattr("sys.argv", [SCRIPTS[kind][0], *map(str, args)])
    with pytest.raises(SystemExit, match=f"the weights are not finite at step {STEPS},"):
        module.main()
    assert not (tmp_path / kind / "run.json").exists() and not (tmp_path / SCRIPTS[kind][1]).exists()


def test_workers_of_a_dead_process_do_not_hold_its_lock(tmp_path):
    locks = {load(script).lock for script in ("01_download.py", "02_train_lora.py", "04_merge_adapter.py")}
    for lock in locks:
        reader, writer = os.pipe()
        if (parent := os.fork()) == 0:
            held = lock(tmp_path)  # noqa: F841
            if (worker := os.fork()) == 0:
                time.sleep(60)
            os.write(writer, f"{worker}\n".encode())
            os._exit(0)
        os.waitpid(parent, 0)
        worker = int(os.read(reader, 20))
        try:
            lock(tmp_path).close()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_what_nobody_reads_any_more_goes_to_nowhere():
    for script, _ in SCRIPTS.values():
        reader, writer = os.pipe()
        os.close(reader)
        stdout = os.dup(1)
        os.dup2(writer, 1)
        try:
            with pytest.raises(BrokenPipeError):
                os.write(1, b"a")
            load(script).drop_broken_pipes()
            assert os.write(1, b"a") == 1
        finally:
            os.dup2(stdout, 1)


def test_a_run_that_ended_within_an_epoch_gets_no_step_more(tiny_model, question_rows, tmp_path):
    args = command(tiny_model, question_rows, tmp_path / "lora", "--max_steps", "10")
    assert run("02_train_lora.py", *args, cwd=tmp_path).returncode == 0
    before = read(tmp_path / "lora", "lora")
    (tmp_path / "lora/run.json").unlink()
    result = run("02_train_lora.py", *args, cwd=tmp_path)
    assert result.returncode == 0 and "checkpoint-10\n" in result.stdout
    assert read(tmp_path / "lora", "lora") == before


def test_another_run_is_not_mixed_with_an_interrupted_one(tiny_model, question_rows, tmp_path, monkeypatch):
    args = command(tiny_model, question_rows, tmp_path / "lora")
    train_until(3, "lora", args, monkeypatch)
    before = snapshot(tmp_path)
    rows = question_rows / "train.jsonl"
    fewer = write_rows(tmp_path / "fewer.jsonl", [json.loads(line) for line in rows.read_text().splitlines()][:20])
    model, template = (shutil.copytree(tiny_model, tmp_path / name) for name in ("model", "template"))
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 1.01 for name, tensor in weights.items()}, model / "model.safetensors", {"format": "pt"})
    with (template / "chat_template.jinja").open("a") as stream:
        stream.write(" a")
    others = {
        "learning_rate 0.02 instead of 0.01": ["--learning_rate", "0.02"],
        "rows (sha256)": ["--dataset_name", str(fewer)],
        "held-out rows (sha256)": ["--dataset_test_split", "validation"],
        "error: a run was interrupted": ["--model_name_or_path", str(model)],
        "another one: tokens (sha256)": ["--model_name_or_path", str(template)],
        "lora_r 8 instead of 64; seed 1 instead of 42": ["--seed", "1", "--lora_r", "8"],
    }
    for said, options in others.items():
        result = run("02_train_lora.py", *args, *options, cwd=tmp_path)
        assert result.returncode == 1 and "Traceback" not in result.stderr
        assert said in result.stderr and "--restart true (make: RESTART=1)" in result.stderr
        after = snapshot(tmp_path)
        assert {file: after[file] for file in before} == before
    # Another version of a package
    record = tmp_path / "lora/checkpoints/checkpoint-3/run.json"
    record.write_text(record.read_text().replace('"peft": "', '"peft": "0.'))
    load("02_train_lora.py").seal(record.parent)
    result = run("02_train_lora.py", *args, cwd=tmp_path)
    assert result.returncode == 1 and "peft " in result.stderr
    # What does not change the result may change; a restart begins at the first step
    result = run("02_train_lora.py", *args, "--learning_rate", "0.02", "--restart", "true", cwd=tmp_path)
    assert result.returncode == 0 and "Going on from" not in result.stdout
    assert not (tmp_path / "lora/checkpoints/checkpoint-3").exists()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in folder.rglob("*") if file.is_file() and file.name != ".lock"}


def test_how_often_is_saved_may_change_and_a_finished_run_is_no_interrupted_one(
    uninterrupted, tiny_model, question_rows, tmp_path, monkeypatch
):
    output = tmp_path / "lora"
    args = command(tiny_model, question_rows, output)
    train_until(3, "lora", args, monkeypatch)
    result = run("02_train_lora.py", *args, "--save_steps", "2", "--save_total_limit", "1", cwd=tmp_path)
    assert "Going on from" in result.stdout and read(output, "lora") == read(uninterrupted / "lora", "lora")
    assert [path.name for path in output.glob("checkpoints/checkpoint-*")] == [f"checkpoint-{STEPS}"]
    # Another run in the same folder needs no leave, and the result stays until there is a new one.
    before = read(output, "lora")
    other = [*args, "--seed", "1", "--save_steps", "2"]
    train_until(5, "lora", other, monkeypatch)
    assert read(output, "lora") == before
    assert run("02_train_lora.py", *other, cwd=tmp_path).returncode == 0
    assert read(output, "lora")[1] != before[1] and not list(output.rglob("*.old")) + list(output.rglob("*.tmp"))


def test_ctrl_c_before_the_training_and_a_foreign_checkpoint(tiny_model, question_rows, tmp_path):
    (tmp_path / "lora/checkpoints/checkpoint-99").mkdir(parents=True)
    (tmp_path / "lora/checkpoints/mine.pt").touch()
    args = command(tiny_model, question_rows, tmp_path / "lora", "--max_steps", "1")
    result = run("02_train_lora.py", *args, cwd=tmp_path)
    assert result.returncode == 1 and "checkpoint-99 has no SHA256SUMS" in result.stdout
    assert "no checkpoint is whole" in result.stderr and (tmp_path / "lora/checkpoints/checkpoint-99").exists()
    assert run("02_train_lora.py", *args, "--restart", "true", cwd=tmp_path).returncode == 0
    assert (tmp_path / "lora/checkpoints/mine.pt").exists()


def nan_from(step: int, monkeypatch, module, value: float):
    """From a step on the loss, or after it a weight, is no number."""
    training_step = module.SFTTrainer.training_step

    def broken_step(self, *args, **kwargs):
        loss = training_step(self, *args, **kwargs)
        return loss * value if self.state.global_step + 1 >= step else loss

    monkeypatch.setattr(module.SFTTrainer, "training_step", broken_step)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_the_run(value, tiny_model, question_rows, tmp_path, monkeypatch):
    module = load("02_train_lora.py")
    nan_from(8, monkeypatch, module, value)
    args = command(tiny_model, question_rows, tmp_path / "lora")
    monkeypatch.setattr("sys.argv", ["02_train_lora.py", *map(str, args)])
    with pytest.raises(
        SystemExit, match="at step 8, learning rate 0.01. The last good checkpoint: .*checkpoint-5"
    ) as stop:
        module.main()
    assert f"the loss is {value}" in stop.value.code and stop.value.code.count("--") >= 3
    gc.collect()


def test_weights_that_are_no_numbers_are_not_saved(tiny_model, question_rows, tmp_path, monkeypatch):
    module = load("02_train_lora.py")
    evaluate = module.ResumableTrainer._maybe_log_save_evaluate

    def break_weights(self, *args, **kwargs):
        if self.state.global_step == 10:
            next(value for value in self.model.parameters() if value.requires_grad).data[0, 0] = float("nan")
        evaluate(self, *args, **kwargs)

    monkeypatch.setattr(module.ResumableTrainer, "_maybe_log_save_evaluate", break_weights)
    monkeypatch.setattr(
        "sys.argv", ["02_train_lora.py", *map(str, command(tiny_model, question_rows, tmp_path / "lora"))]
    )
    with pytest.raises(SystemExit, match="weights are not finite .*checkpoint-5"):
        module.main()
    assert [path.name for path in tmp_path.glob("lora/checkpoints/checkpoint-*")] == ["checkpoint-5"]
    gc.collect()


def test_a_loss_that_does_not_fall_is_said(tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"prompt": "a b c", "completion": "d"}] * 16)
    for rate, said in (("1e-30", True), ("0.01", False)):
        args = command(tiny_model, rows, tmp_path / rate, "--logging_steps", "1", "--learning_rate", rate)
        result = run("02_train_lora.py", *args, cwd=tmp_path)
        assert result.returncode == 0 and ("warning: the loss did not fall: " in result.stderr) == said


def test_the_disk_is_checked_before_the_first_step(tiny_model, question_rows, tmp_path, monkeypatch):
    module = load("02_train_lora.py")
    usage = shutil.disk_usage(tmp_path)
    args = command(tiny_model, question_rows, tmp_path / "lora")

    def main(free: int, *options):
        monkeypatch.setattr("sys.argv", ["02_train_lora.py", *map(str, args), *options])
        monkeypatch.setattr(module.shutil, "disk_usage", lambda path: usage._replace(free=free))
        module.main()

    with pytest.raises(
        SystemExit, match="3 checkpoints of 0.03 GB and a result of 0.00 GB\\s+do not fit into the 0.09 GB"
    ):
        main(90_000_000)
    assert not list(tmp_path.glob("lora/checkpoints/checkpoint-*")) and not (tmp_path / "lora/run.json").exists()
    gc.collect()
    main(90_000_000, "--save_total_limit", "1")
    gc.collect()


def test_out_of_memory_is_answered_with_settings_that_take_less(tiny_model, question_rows, tmp_path, monkeypatch):
    import torch

    module = load("02_train_lora.py")
    report = {"predictions": [], "smaller": [{"options": "--per_device_train_batch_size 2", "bytes": 2**29}]}
    (tmp_path / "memory.json").write_text(json.dumps(report))
    errors = (
        torch.OutOfMemoryError("HIP out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] . DefaultCPUAllocator: can't allocate memory"),
        MemoryError("std::bad_alloc"),
    )
    for number, error in enumerate(errors):
        for options, said in (
            (["--memory_prediction", str(tmp_path / "memory.json")], "--per_device_train_batch_size 2 (0.50 GiB)"),
            ([], "--per_device_train_batch_size 2 --gradient_accumulation_steps 2, or --gradient_checkpointing true"),
        ):
            args = command(tiny_model, question_rows, tmp_path / f"lora{number}{len(options)}", *options)

            def break_step(self, *args, error=error, **kwargs):
                raise error

            monkeypatch.setattr(module.SFTTrainer, "training_step", break_step)
            monkeypatch.setattr("sys.argv", ["02_train_lora.py", *map(str, args)])
            with pytest.raises(SystemExit, match="out of memory") as stop:
                module.main()
            assert said in stop.value.code
            gc.collect()


def test_memory_that_runs_out_is_an_error_before_the_system_kills_the_process(tiny_model, question_rows, tmp_path):
    # Eager attention over a long row takes more than the limit leaves.
    limit = 1_200_000_000
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "<s> " + "a b c d " * 20_000 + "</s>"}] * 2)
    code = (
        f"import resource, runpy, sys; resource.setrlimit(resource.RLIMIT_DATA, ({limit}, -1)); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    args = command(tiny_model, rows, tmp_path / "lora", "--max_length", "100000", "--attn_implementation", "eager")
    script = str(Path(load("02_train_lora.py").__file__))
    result = subprocess.run([sys.executable, "-c", code, script, *map(str, args)], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    assert "error: out of memory: " in result.stderr and "Traceback" not in result.stderr
