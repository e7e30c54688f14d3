"""What happens to long runs, done to short ones: kills, full disks, damaged files, lost networks, signals, resumes.

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
from conftest import ROOT, run, serve, start

FULL = os.environ.get("FAULTS") == "full"
OPTIONS = ["--learning_rate", "0.01", "--logging_steps", "2", "--save_steps", "2", "--save_total_limit", "2"]
SCRIPTS = {
    "download": "01_download.py",
    "train-lora": "02_train_lora.py",
    "train-full": "03_train_full.py",
    "merge": "04_merge_adapter.py",
}
RESULTS = {
    "download": ["base-model", "dataset"],
    "train-lora": ["adapter"],
    "train-full": ["model"],
    "merge": ["model"],
}
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
    """Script and options of a step, which reads results of other steps in inputs."""
    model, data = inputs / "download/base-model", inputs / "download/dataset"
    if step == "download":
        args = ["--model_name_or_path", inputs / "given/model", "--dataset_name", inputs / "given/rows"]
    elif step == "merge":
        args = ["--model_name_or_path", inputs / "train-lora/adapter", "--base_model", model, "--max_new_tokens", 4]
        args += ["--prompts", "what color is the sky"]
    else:
        args = ["--model_name_or_path", model, "--dataset_name", data, *OPTIONS]
    return [SCRIPTS[step], *args, "--output_dir", output, *more]


@pytest.fixture(scope="module")
def good(tiny_model, question_rows, tmp_path_factory):
    """Folder with the result of each step that nothing happened to, and an older result of each; seconds of each."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "given").mkdir()
    shutil.copytree(tiny_model, folder / "given/model")
    shutil.copytree(question_rows, folder / "given/rows")
    other = {"download": ["--dataset_name", folder / "given/rows/train.jsonl"], "merge": ["--dtype", "bfloat16"]}
    seconds = {}
    for step in SCRIPTS:
        finish(command(step, folder, folder / step))
        began = time.time()
        finish(command(step, folder, folder / "older" / step, *other.get(step, ["--seed", "7"])))
        seconds[step] = time.time() - began
        assert read(step, folder / step) != read(step, folder / "older" / step)
    return folder, seconds


def finish(order: list) -> str:
    """Runs a script to its good end; returns what it printed."""
    result = run(*order, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


def error(result: subprocess.CompletedProcess) -> str:
    """The message of a script that failed, which is one or two lines."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    lines = result.stderr[result.stderr.index("error: ") :].strip().splitlines()
    lines = [line for line in lines if line.strip() and "it/s]" not in line and "s/it]" not in line]
    assert len(lines) <= 2, lines
    return "\n".join(lines)


def read(step: str, output: Path) -> dict:
    """What must be equal: the files of the result but for times and paths in them, and the losses."""
    content = {}
    for name in RESULTS[step]:
        for file in (output / name).iterdir():
            if file.name not in ("README.md", "run.json", "SHA256SUMS", "adapter_config.json"):
                content[f"{name}/{file.name}"] = file.read_bytes()
    if step.startswith("train"):
        history = json.loads((output / "run.json").read_text())["history"]
        content["losses"] = [(entry["step"], entry.get("loss"), entry.get("train_loss")) for entry in history]
    return content


def list_checkpoints(output: Path) -> list[Path]:
    found = [path for path in output.glob("checkpoints/checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[11:]))


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def check_whole(step: str, output: Path) -> None:
    """Asserts that whatever stands under its final name is whole, and that run.json is of what stands beside it."""
    for folder in [*(output / name for name in RESULTS[step]), *list_checkpoints(output)]:
        if folder.exists():
            lines = (folder / "SHA256SUMS").read_text().splitlines()[1:]
            files = {file.name for file in folder.iterdir()} - {"README.md", "SHA256SUMS"}
            assert {line[66:]: line[:64] for line in lines} == {name: sha256(folder / name) for name in files}
            assert step != "download" or "run.json" in files
    if (output / "run.json").exists():
        record = json.loads((output / "run.json").read_text())
        assert record["sha256"] and all(
            sha256(output / RESULTS[step][0] / name) == digest for name, digest in record["sha256"].items()
        )


def check_repetition(step: str, good: Path, output: Path) -> None:
    """Asserts that nothing is half after a kill, and that the same command goes on, and ends as if nothing had been."""
    check_whole(step, output)
    done, checkpoints = (output / "run.json").exists(), list_checkpoints(output)
    interrupted = checkpoints and not (
        done and json.loads((output / "run.json").read_text())["started"]
        == json.loads((checkpoints[-1] / "run.json").read_text())["started"]
    )  # fmt: skip
    said = finish(command(step, good, output))
    if interrupted:
        assert f"Going on from {checkpoints[-1]}\n" in said
    else:
        assert "Going on from" not in said
    check_whole(step, output)
    assert read(step, output) == read(step, good / step)
    assert not [path for path in output.rglob("*") if path.suffix in (".tmp", ".old")]


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
                process = start(*command(step, good, output), cwd=ROOT)
                time.sleep(share * seconds[step])
                os.kill(process.number, signal.SIGKILL)
                if process.wait().returncode == -signal.SIGKILL:
                    break
                shutil.rmtree(output)  # it had ended before
                share *= 0.8
            if number % 2:
                check_older(step, good, output)
            check_repetition(step, good, output)


def check_older(step: str, good: Path, output: Path) -> None:
    """Asserts that the older result is there until the new one is whole."""
    for name in RESULTS[step]:
        if not (output / name).exists():  # in the middle of the exchange
            for folder in (output / f"{name}.old", output / f"{name}.tmp"):
                assert (folder / "SHA256SUMS").exists()
        elif (output / name / "SHA256SUMS").read_bytes() != (good / step / name / "SHA256SUMS").read_bytes():
            for file in (good / "older" / step / name).iterdir():
                assert (output / name / file.name).read_bytes() == file.read_bytes()


# Just before each change of a file that matters
SPOTS = {
    "download": [
        r"open .*/base-model.tmp/run.tmp",
        r"open .*/base-model.tmp/SHA256SUMS",
        r"os.rename .*/base-model$",
        r"os.rename .*/base-model.tmp$",
        r"open .*/dataset.tmp/train.jsonl",
        r"open .*/dataset.tmp/SHA256SUMS",
        r"os.rename .*/dataset$",
        r"os.rename .*/dataset.tmp$",
    ],
    "merge": [
        r"os.mkdir .*/model.tmp$",
        r"open .*/model.tmp/SHA256SUMS",
        r"os.remove .*/out/run.json",
        r"os.rename .*/out/model$",
        r"os.rename .*/out/model.tmp$",
        r"open .*/out/run.tmp",
        r"os.rename .*/out/run.tmp",
    ],
}
REMOVAL = "os.remove optimizer.pt"  # in the middle of the removal of a checkpoint
for step, name in (("train-lora", "adapter"), ("train-full", "model")):
    SPOTS[step] = [
        r"os.mkdir .*/new.tmp/checkpoint-2$",
        r"open .*/checkpoint-4/progress.tmp",
        r"os.rename .*/checkpoint-4/run.tmp",
        r"open .*/checkpoint-4/SHA256SUMS",
        r"os.rename .*/new.tmp/checkpoint-4$",
        r"os.rename .*/checkpoints/checkpoint-2$",
        REMOVAL,
        rf"os.mkdir .*/{name}.tmp$",
        rf"open .*/{name}.tmp/SHA256SUMS",
        r"os.remove .*/out/run.json",
        rf"os.rename .*/out/{name}$",
        rf"os.rename .*/out/{name}.tmp$",
        r"open .*/out/run.tmp",
        r"os.rename .*/out/run.tmp",
    ]


@pytest.mark.parametrize("step", SCRIPTS)
def test_a_step_killed_before_any_change_of_a_file_ends_right_when_typed_again(step, good, tmp_path):
    good, _ = good
    for number, spot in enumerate(some(SPOTS[step], 1)):
        with trial(f"SIGKILL before a change of a file: {step}"):
            output = tmp_path / f"{number}/out"
            if spot != REMOVAL:  # else the checkpoints of the older result would be those removed
                shutil.copytree(good / "older" / step, output, symlinks=True)
            result = start(*command(step, good, output), cwd=ROOT, signal=(signal.SIGKILL, spot)).wait()
            assert result.returncode == -signal.SIGKILL, (spot, result)
            if spot != REMOVAL:
                check_older(step, good, output)
            check_repetition(step, good, output)


@pytest.mark.skipif(not FULL, reason="the short form has kills enough")
def test_a_repetition_of_a_finished_training_that_was_killed_goes_on(good, tmp_path):
    good, _ = good
    output = tmp_path / "out"
    shutil.copytree(good / "train-lora", output)
    with trial("SIGKILL while a finished training is repeated"):
        order = command("train-lora", good, output)
        start(*order, cwd=ROOT, signal=(signal.SIGKILL, "open .*/checkpoint-6/progress.tmp")).wait()
        assert (output / "run.json").read_bytes() == (good / "train-lora/run.json").read_bytes()
        assert list_checkpoints(output)[-1].name == "checkpoint-4"
        check_repetition("train-lora", good, output)


@pytest.mark.skipif(not FULL, reason="takes minutes, and a package of 93 MB")
def test_the_conversion_of_the_embedded_model_killed_at_any_moment_ends_right_when_typed_again(tmp_path):
    order = ["01_download.py", "--only", "model", "--model_name_or_path", "embedded", "--output_dir"]
    began = time.time()
    finish([*order, tmp_path / "good"])
    seconds = time.time() - began
    for number in range(3):
        with trial("SIGKILL at a random moment: conversion of the embedded model"):
            output = tmp_path / "out"
            shutil.rmtree(output, ignore_errors=True)
            process = start(*order, output, cwd=ROOT)
            time.sleep((number + chance.random()) / 3 * seconds * 0.9)
            os.kill(process.number, signal.SIGKILL)
            assert process.wait().returncode == -signal.SIGKILL
            assert not (output / "base-model").exists()
            finish([*order, output])
            sums = [(folder / "base-model/SHA256SUMS").read_bytes() for folder in (tmp_path / "good", output)]
            assert sums[0] == sums[1]
            assert sorted(path.name for path in output.iterdir()) == [".lock", "base-model"]


# Full disks -----------------------------------------------------------------------------------------------------------
def compare(good: Path, output: Path) -> list:
    runs = (good / "train-lora/run.json", good / "train-full/run.json")
    return ["compare_runs.py", *runs, "--output_dir", output]


# What is written when the disk is full: where it is then, and the file that is larger than allowed.
DISKS = [
    ("train-lora", [], "open .*/checkpoint-4/progress.tmp", "checkpoints/checkpoint-7/optimizer.pt"),
    ("train-full", [], "open .*/checkpoint-4/progress.tmp", "checkpoints/checkpoint-7/optimizer.pt"),
    ("train-lora", ["--save_strategy", "no"], "open .*/adapter.tmp/SHA256SUMS", "adapter/adapter_model.safetensors"),
    ("train-full", ["--save_strategy", "no"], "open .*/model.tmp/SHA256SUMS", "model/model.safetensors"),
    ("merge", [], "open .*/model.tmp/SHA256SUMS", "model/model.safetensors"),
    ("download", [], "open .*/dataset.tmp/train.jsonl", "dataset/train.jsonl"),
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


def stop_at(spot: str, order: list):
    """A process that was stopped just before a change of a file."""
    process = start(*order, cwd=ROOT, signal=(signal.SIGSTOP, spot))
    while Path(f"/proc/{process.number}/stat").read_text().rsplit(")", 1)[1].split()[0] != "T":
        time.sleep(0.01)
    return process


def check_older_result(step: str, good: Path, output: Path) -> None:
    assert read(step, output) == read(step, good / "older" / step)
    check_whole(step, output)


@pytest.mark.parametrize("how", ["a small disk", "a limit of file sizes"])
@pytest.mark.parametrize(("step", "args", "spot", "file"), some(DISKS, 2), ids=lambda value: str(value)[:20])
def test_a_full_disk_is_named_and_what_was_there_stays(step, args, spot, file, how, good, small_disk, tmp_path):
    good, _ = good
    output = (small_disk if how == "a small disk" else tmp_path) / "out"
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
            said = error(start(*order, cwd=ROOT, file_size=limit).wait())
        assert "ake room" in said or "No space left" in said or "File too large" in said, said
        assert re.search("type the (same )?command again", said), said
        check_older_result(step, good, output)
        finish(order)
        assert read(step, output) == read(step, good / step)
    shutil.rmtree(output)


@pytest.mark.parametrize("how", ["a small disk", "a limit of file sizes"])
def test_a_report_on_a_full_disk_is_whole_or_as_it_was(how, good, small_disk, tmp_path):
    good, _ = good
    output = (small_disk if how == "a small disk" else tmp_path) / "out"
    finish(compare(good, output))
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    with trial(f"full disk, by {how}: report"):
        if how == "a small disk":
            process = stop_at("open .*/comparison.tmp", compare(good, output))
            filler = fill(small_disk)
            os.kill(process.number, signal.SIGCONT)
            said = error(process.wait())
            filler.unlink()
        else:
            limit = len(before["comparison.json"]) - 1
            said = error(start(*compare(good, output), cwd=ROOT, file_size=limit).wait())
        assert "type the same command again" in said
        assert all((output / name).read_bytes() == content for name, content in before.items())
        finish(compare(good, output))
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


def reader(name: str, folder: Path, output: Path) -> list:
    """Script and options of what reads results in folder."""
    model, data, adapter = folder / "download/base-model", folder / "download/dataset", folder / "train-lora/adapter"
    runs = [folder / "train-lora/run.json", folder / "train-full/run.json"]
    if name in SCRIPTS:
        return command(name, folder, output)
    if name in ("base-model", "adapter", "model", "merged"):  # to answer with
        named = {"base-model": model, "adapter": adapter, "model": folder / "train-full/model"}
        args = ["--model_name_or_path", named.get(name, folder / "merge/model"), "--max_new_tokens", 2]
        return ["05_generate.py", *args, "--prompt", "what", *(["--base_model", model] if name == "adapter" else [])]
    if name == "pipeline":
        return ["06_pipeline_infer.py", "--model_name_or_path", model, "--max_new_tokens", 2]
    if name.startswith("push"):
        return ["push_model.py", "--folder", folder / name[5:], "--repo_id", "a/b", "--dry_run"]
    return {
        "audit": ["audit_tokens.py", "--model_name_or_path", model, "--dataset_name", data],
        "evaluate": ["evaluate.py", "--base_model", model, "--models", adapter, "--dataset_name", data,
                     "--max_new_tokens", 2, "--output_dir", output],
        "compare": ["compare_runs.py", *runs, "--output_dir", output],
        "plot": ["plot_loss.py", *runs, "--output", output / "loss.png"],
        "card": ["write_card.py", runs[0]],
        "verify": ["verify_run.py", runs[0]],
        "reproduce": ["reproduce_run.py", runs[0], "--output_dir", output],
    }[name]  # fmt: skip


WEIGHTS = ["model.safetensors", "tokenizer.json", "config.json", "SHA256SUMS"]
READERS = {  # of each file, sealed by SHA256SUMS
    ("download/base-model", (*WEIGHTS, "run.json")): [
        *("train-lora", "train-full", "merge", "audit", "evaluate", "base-model", "adapter", "pipeline")
    ],
    ("download/dataset", ("train.jsonl", "SHA256SUMS", "run.json")): ["train-lora", "train-full", "audit", "evaluate"],
    ("train-lora/adapter", ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "SHA256SUMS")): [
        *("merge", "adapter", "evaluate", "push train-lora/adapter")
    ],
    ("train-full/model", tuple(WEIGHTS)): ["model", "push train-full/model"],
    ("merge/model", tuple(WEIGHTS)): ["merged", "push merge/model"],
}
DAMAGES = [
    (f"{folder}/{file}", name, how)
    for (folder, files), names in READERS.items()
    for file in files
    for name in names
    for how in ("cut off", "one bit flipped")
]
# Without checksums, but cut off they are no JSON.
DAMAGES += [
    ("train-lora/run.json", name, "cut off")
    for name in ("merge", "adapter", "evaluate", "compare", "plot", "card", "verify", "reproduce")
]


def test_a_damaged_file_is_found_and_named_by_whatever_reads_it(good, tmp_path):
    good, _ = good
    shutil.copytree(good, tmp_path / "copy", symlinks=True)
    for number, (file, name, how) in enumerate(some(DAMAGES, 5)):
        damaged, kept = tmp_path / "copy" / file, tmp_path / "kept"
        damaged.rename(kept)
        shutil.copy(kept, damaged)
        damage(damaged, how)
        result = run(*reader(name, tmp_path / "copy", tmp_path / f"{number}"), cwd=ROOT)
        with trial(f"damaged files, {how}: {file.split('/')[-1]}"):
            assert result.returncode, (file, name, how)
            assert damaged.name in error(result), (file, name, how)
        kept.replace(damaged)


CHECKPOINT = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json", "run.json"]


@pytest.mark.parametrize("step", ["train-lora", "train-full"])
def test_the_older_checkpoint_is_gone_on_from_where_the_newest_is_damaged(step, good, tmp_path):
    good, _ = good
    files = [*CHECKPOINT, "SHA256SUMS", "adapter_model.safetensors" if step == "train-lora" else "model.safetensors"]
    for number, (file, how) in enumerate(some([(f, h) for f in files for h in ("cut off", "one bit flipped")], 2)):
        with trial(f"damaged files of the newest checkpoint, {how}: {file}"):
            output = tmp_path / f"{number}/out"
            shutil.copytree(good / step, output)
            (output / "run.json").unlink()
            damage(output / "checkpoints/checkpoint-7" / file, how)
            said = finish(command(step, good, output))
            assert re.search(rf"checkpoint-7/.*{file}.*This checkpoint is left out", said), (file, how, said)
            assert f"Going on from {output}/checkpoints/checkpoint-6\n" in said
            assert read(step, output) == read(step, good / step)
            check_whole(step, output)


def test_data_without_checksums_is_refused_where_it_cannot_be_read(good, tmp_path):
    from datasets import Dataset

    good, _ = good
    lines = (good / "download/dataset/train.jsonl").read_text().splitlines()
    Dataset.from_list([json.loads(line) for line in lines]).to_parquet(tmp_path / "whole.parquet")
    shutil.copy(good / "download/dataset/train.jsonl", tmp_path / "whole.jsonl")
    for kind in ("parquet", "jsonl"):
        for number in range(10 if FULL else 1):
            for how in ("cut off", "one bit flipped"):
                file = tmp_path / f"{number}-{how}.{kind}"
                shutil.copy(tmp_path / f"whole.{kind}", file)
                damage(file, how)
                output = tmp_path / "out"
                args = ["--only", "dataset", "--dataset_name", file, "--output_dir", output]
                result = run("01_download.py", *args, cwd=ROOT)
                counts.setdefault(f"data without checksums, {how}, refused: {kind}", [0, 0])[1] += 1
                if result.returncode:
                    assert file.name in error(result)
                    counts[f"data without checksums, {how}, refused: {kind}"][0] += 1


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
            else:
                content = MODEL[name]
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
    args = ("--only", "model", "--model_name_or_path", "org/model", "--output_dir", "out")
    return run("01_download.py", *args, cwd=folder, **environment)


def check_fetched(folder: Path) -> None:
    assert all((folder / "out/base-model" / name).read_bytes() == content for name, content in MODEL.items())
    check_whole("download", folder / "out")


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
            assert "Type the command again to go on" in said
            assert not (tmp_path / "out/base-model").exists()
        sent.clear()
        with serve(make_hub(sent, 0)) as address:
            assert fetch(address, tmp_path).returncode == 0
            assert [name for name, _, _ in sent if name] == ["model-00002-of-00002.safetensors"]
            check_fetched(tmp_path)


# Two at once ----------------------------------------------------------------------------------------------------------
HELD = {
    "download": "open .*/dataset.tmp/train.jsonl",
    "train-lora": "open .*/checkpoint-4/progress.tmp",
    "train-full": "open .*/checkpoint-4/progress.tmp",
    "merge": "open .*/model.tmp/SHA256SUMS",
}


@pytest.mark.parametrize("step", some(list(SCRIPTS), 2))
def test_a_second_one_is_refused_and_a_dead_one_holds_nothing(step, good, tmp_path):
    good, _ = good
    output = tmp_path / "out"
    with trial(f"two at once in one folder: {step}"):
        first = stop_at(HELD[step], command(step, good, output))
        before = sorted(output.rglob("*"))
        said = error(run(*command(step, good, output), cwd=ROOT))
        assert f"process {first.number} is writing to {output}" in said
        assert sorted(output.rglob("*")) == before
        os.kill(first.number, signal.SIGKILL)
        first.wait()
        check_repetition(step, good, output)


# Signals --------------------------------------------------------------------------------------------------------------
SIGNALS = [
    # where it comes, once or again at the second change, exit status by SIGTERM and by SIGINT, newest checkpoint
    ("open .*/out/.lock", (-15, 130), None),  # before the first step
    ("open .*/checkpoint-4/progress.tmp", (143, 130), 5),  # while a checkpoint is saved: the step after it is the last
    ("open .*/checkpoint-4/(progress.tmp|SHA256SUMS)", (-15, -2), 2),  # twice
    ("open .*/(adapter|model).tmp/SHA256SUMS", (-15, 130), 7),  # while the result is saved
]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", ["train-lora", "train-full"] if FULL else ["train-lora"])
def test_a_signal_leaves_a_checkpoint_and_nothing_half(step, number, good, tmp_path):
    good, _ = good
    for case, (spot, statuses, newest) in enumerate(SIGNALS):
        with trial(f"{signal.Signals(number).name}: {step}"):
            output = tmp_path / f"{case}/out"
            result = start(*command(step, good, output), cwd=ROOT, signal=(number, spot)).wait()
            assert result.returncode == statuses[number == signal.SIGINT], (spot, result)
            assert "Traceback" not in result.stderr
            said = "Type the same command again to go on" in result.stderr
            assert said == (result.returncode in (143, 130) and newest == 5)
            names = [path.name for path in list_checkpoints(output)]
            assert names[-1:] == ([f"checkpoint-{newest}"] if newest else [])
            assert not (output / "run.json").exists()
            check_repetition(step, good, output)


# Soak -----------------------------------------------------------------------------------------------------------------
def test_many_interruptions_in_one_process_leave_nothing_behind(good, tmp_path):
    good, _ = good
    args = command("train-lora", good, tmp_path / "out", "--max_steps", "100000", "--save_steps", "100000")
    args += ["--logging_steps", "100"]  # else the list of losses would grow
    cycles = 200 if FULL else 5
    script = [ROOT / "tests/soak.py", cycles, ROOT / "scripts" / args[0], *args[1:]]
    rows = [json.loads(line) for line in finish(script).splitlines() if line.startswith("{")]
    assert [row["steps"] for row in rows] == list(range(3, 3 * cycles + 3, 3))
    warm = 10 if FULL else 2  # cycles until the libraries have what they keep
    first, last = rows[warm - 1], rows[-1]
    for key in first:
        figures[f"{key}, after cycle {warm} and {cycles}"] = first[key], last[key]
    assert last["open files"] <= first["open files"] and last["threads"] <= first["threads"]
    assert last["memory (MiB)"] <= first["memory (MiB)"] + 32
    assert last["output (kB)"] <= first["output (kB)"] + 32
