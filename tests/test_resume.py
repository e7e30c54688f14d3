"""A training that was interrupted and goes on ends as one that was not: the same weights and losses, to the last bit.

Both go through the runner, on the CPU. FAULTS=full interrupts each of them by SIGTERM and by SIGKILL, else a few are.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import ROOT, Process, write_rows

FULL = os.environ.get("FAULTS") == "full"
RUNNER = ROOT / "scripts/chain/run_step.py"
SCRIPTS = {"lora": ROOT / "scripts/02_train_lora.py", "full": ROOT / "scripts/03_train_full.py"}
# 28 rows in batches of 4, three times: an epoch has 7 steps.
OPTIONS = ["--learning_rate", "0.01", "--num_train_epochs", "3", "--logging_steps", "4", "--save_steps", "5"]
HELD_OUT = "--dataset_test_split validation"
BEST = f"{HELD_OUT} --metric_for_best_model loss --greater_is_better true --save_total_limit 1 --eval_strategy steps"
BY_EPOCH = f"{HELD_OUT} --save_strategy epoch --eval_strategy epoch --logging_strategy epoch"
QLORA = "--load_in_4bit --use_bnb_nested_quant --lora_target_modules all-linear"
RESULT = "open .*[.]part/(adapter/adapter_config|model/config).json"  # when the result is saved, after the last step

# Options, and the step in which a training is interrupted, or the steps, one after the other.
LORA = {
    "within an epoch": ("", 9),
    "between two logs": ("", 6),
    "before the first checkpoint": ("", 3),
    "at the end of an epoch": ("", 7),
    "at the beginning of an epoch": ("", 8),
    "twice": ("", 6, 18),
    "while the result is saved": ("", RESULT),
    "max_steps, while the result is saved": ("--max_steps 10", RESULT),
    "max_steps, before": ("--max_steps 10", 9),
    "accumulation": ("--gradient_accumulation_steps 3 --logging_steps 2 --save_steps 2", 5),
    "accumulation, at the end of an epoch": ("--gradient_accumulation_steps 3 --logging_steps 2 --save_steps 2", 6),
    "warm-up, cosine": ("--lr_scheduler_type cosine --warmup_steps 0.3", 9),
    "packing": (f"--packing true --max_length 64 --logging_steps 1 --save_steps 2 {HELD_OUT}", 3),
    "evaluation, best at the end": (f"{BEST} --eval_steps 5 --load_best_model_at_end true", 13),
    "save_strategy best": (f"{BEST} --save_strategy best --eval_steps 1 --eval_on_start true", 5),
    "bf16": ("--bf16 true --use_cpu true", 9),
    "max_steps, everything by epoch, while the result is saved": (f"--max_steps 10 {BY_EPOCH}", RESULT),
    "everything by epoch": (BY_EPOCH, 9),
    "logs by epoch": ("--save_steps 7 --logging_strategy epoch", 9),
    "a checkpoint at the end of an epoch that is evaluated": (f"--save_steps 7 --eval_strategy epoch {HELD_OUT}", 8),
    "the signal at the end of such an epoch": (f"--save_steps 7 --eval_strategy epoch {HELD_OUT}", 7),
    "within such an epoch": (f"--save_steps 7 --eval_strategy epoch {HELD_OUT}", 10),
    "paged_adamw_32bit": ("--optim paged_adamw_32bit", 9),
    "adamw_torch_fused": ("--optim adamw_torch_fused", 9),
    "paged_adamw_8bit": ("--optim paged_adamw_8bit", 9),
    "QLoRA": (f"{QLORA} --eval_strategy steps --eval_steps 5 {HELD_OUT}", 9),
    "DoRA": ("--use_dora true", 9),
    "modules_to_save": ("--lora_modules_to_save lm_head", 9),
    "workers": ("--dataloader_num_workers 2", 9),
    "no dropout": ("--lora_dropout 0", 9),
    "random order": ("--train_sampling_strategy random", 9),
    "gradient checkpointing": ("--gradient_checkpointing true", 9),
    "token metrics": ("--token_metrics true", 9),
}
FULL_TRAINING = ("within an epoch", "at the end of an epoch", "twice", "while the result is saved", "bf16", "packing",
                 "paged_adamw_32bit", "gradient checkpointing", "evaluation, best at the end")  # fmt: skip
NONE_YET = ("before the first checkpoint", "the signal at the end of such an epoch")  # killed, they begin anew
CASES = [("lora", name) for name in LORA] + [("full", name) for name in FULL_TRAINING]
SHORT = [
    ("lora", "within an epoch", "SIGKILL"), ("lora", "twice", "SIGTERM"), ("lora", "QLoRA", "SIGKILL"),
    ("lora", "the signal at the end of such an epoch", "SIGTERM"), ("lora", "evaluation, best at the end", "SIGKILL"),
    ("lora", "max_steps, while the result is saved", "SIGKILL"), ("lora", "packing", "SIGTERM"),
    ("lora", "accumulation", "SIGKILL"), ("full", "at the end of an epoch", "SIGTERM"),
]  # fmt: skip


def order(kind: str, model: Path, data: Path, output: Path, *options) -> list:
    """Options of the runner, with a training and its options."""
    args = ["--model_name_or_path", model, "--dataset_name", data, *OPTIONS, *options]
    return [output, "--reads", model, data, "--", SCRIPTS[kind], *args]


def interrupt(args: list, number: int, place: int | str, folder: Path):
    """The result of a training that gets a signal in a step, or just before a change of a file."""
    faults = {"step": (number, place)} if isinstance(place, int) else {"signal": (number, place)}
    return Process(RUNNER, args, folder, **faults).wait()


def finish(args: list, folder: Path, going_on=False) -> str:
    """Runs a training to its end; one that goes on would be killed in the first step."""
    result = Process(RUNNER, args, folder, step=(signal.SIGKILL, 1) if going_on else None).wait()
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def read_weights(output: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in output.glob("*/*.safetensors")}


def read_history(output: Path) -> list[dict]:
    """What was logged, but times."""
    history = json.loads((output / "run.json").read_text())["history"]
    return [{key: entry[key] for key in entry if "second" not in key and "runtime" not in key} for entry in history]


def check_same(whole: Path, parts: Path) -> None:
    """Asserts that weights and logs are the same. A training that is told to end logs in its last step: the mean loss
    of the next log, and that at the end, is then one of other steps. What TRL counts as num_tokens is of a process.
    """
    weights = read_weights(whole)
    assert weights and read_weights(parts) == weights
    logs, others = ([entry for entry in read_history(folder)] for folder in (whole, parts))
    steps = [entry["step"] for entry in logs if "loss" in entry]
    extra = {entry["step"] for entry in others if "loss" in entry} - set(steps)
    cut = {min(step for step in steps if step > stop) for stop in extra}
    means, others_own = {"loss", "entropy", "mean_token_accuracy"}, {"train_loss", "num_tokens"}
    pair = []
    for entries in (logs, others):
        entries = [entry for entry in entries if not ("loss" in entry and entry["step"] in extra)]
        left_out = [others_own | (means if entry["step"] in cut else set()) for entry in entries]
        parts = [{key: entry[key] for key in entry.keys() - out} for entry, out in zip(entries, left_out, strict=True)]
        pair.append(parts)
    assert pair[0] == pair[1]


@pytest.fixture(scope="module")
def uninterrupted(tiny_model, question_rows, tmp_path_factory):
    """Gives the folder of a training to which nothing happened."""
    folder, made = tmp_path_factory.mktemp("uninterrupted"), {}

    def make(kind: str, options: str) -> Path:
        if (kind, options) not in made:
            output = folder / f"{kind}{len(made)}"
            finish(order(kind, tiny_model, question_rows, output, *options.split()), folder)
            made[kind, options] = output
        return made[kind, options]

    return make


@pytest.mark.parametrize(
    ("kind", "name", "number"),
    [(*case, number) for case in CASES for number in ("SIGTERM", "SIGKILL")] if FULL else SHORT,
)
def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    kind, name, number, uninterrupted, tiny_model, question_rows, tmp_path
):
    options, *places = LORA[name]
    whole = uninterrupted(kind, options)
    number, output = getattr(signal, number), tmp_path / "parts"
    args = order(kind, tiny_model, question_rows, output, *options.split())
    for place in places:
        result = interrupt(args, number, place, tmp_path)
        if number == signal.SIGTERM and place == RESULT:  # it is nearly done
            assert result.returncode == 0 and output.exists()
            break
        stopped = number == signal.SIGTERM
        assert result.returncode == (128 + number if stopped else -number), result.stderr[-3000:]
        assert not output.exists() and (tmp_path / "parts.part/step.json").exists()
        assert ("Stopped. Type the same command again" in result.stderr) == stopped
        assert stopped or name in NONE_YET or list(tmp_path.glob("parts.part/checkpoints/checkpoint-*"))
    else:
        going_on = stopped or name not in NONE_YET
        assert ("Going on from" in finish(args, tmp_path, going_on)) == going_on
    check_same(whole, output)


def test_the_best_checkpoint_is_kept_for_the_end(uninterrupted):
    """Its metric is such that this is the first."""
    whole = uninterrupted("lora", LORA["evaluation, best at the end"][0])
    best, last = (whole / f"checkpoints/checkpoint-{step}/adapter_model.safetensors" for step in (5, 21))
    assert (whole / "adapter/adapter_model.safetensors").read_bytes() == best.read_bytes() != last.read_bytes()


def test_a_run_goes_on_with_a_moved_model_and_saves_as_often_as_is_asked_then(
    uninterrupted, tiny_model, question_rows, tmp_path
):
    output = tmp_path / "lora"
    interrupt(order("lora", tiny_model, question_rows, output), signal.SIGTERM, 3, tmp_path)
    model = shutil.copytree(tiny_model, tmp_path / tiny_model.name)
    options = ("--save_steps", "4", "--save_total_limit", "9")
    assert "checkpoint-3\n" in finish(order("lora", model, question_rows, output, *options), tmp_path)
    assert read_weights(output) == read_weights(uninterrupted("lora", ""))
    names = {path.name for path in (output / "checkpoints").glob("checkpoint-*")}
    assert names == {f"checkpoint-{step}" for step in (3, 4, 8, 12, 16, 20, 21)}


def test_the_rate_of_a_run_in_parts_is_that_of_all_of_it(tiny_model, question_rows, tmp_path):
    """The seconds of a log count from the first step on, in whatever process that was."""
    args = order("lora", tiny_model, question_rows, tmp_path / "lora", "--logging_steps", "1")
    for step in (6, 12):
        interrupt(args, signal.SIGTERM, step, tmp_path)
    finish(args, tmp_path)
    seconds = [entry["seconds"] for entry in json.loads((tmp_path / "lora/run.json").read_text())["history"]]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_rows_of_a_file_and_another_order_of_options_are_the_same_run(tiny_model, question_rows, tmp_path):
    rows = [json.loads(line) for line in (question_rows / "train.jsonl").read_text().splitlines()]
    data = write_rows(tmp_path / "rows.jsonl", rows)
    args = order("lora", tiny_model, data, tmp_path / "lora", "--seed", "3", "--weight_decay=0.1")
    interrupt(args, signal.SIGTERM, 3, tmp_path)
    args = order("lora", tiny_model, data, tmp_path / "lora", "--weight_decay", "0.1", "--seed=3")
    assert "checkpoint-3\n" in finish(args, tmp_path)
