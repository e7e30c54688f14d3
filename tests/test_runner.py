"""What the runner does for any script: one at a time, on verified inputs, whole or not there, recorded, explained."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from conftest import ROOT, Process, load, run, write_rows

FULL = os.environ.get("FAULTS") == "full"
RUNNER = ROOT / "scripts/chain/run_step.py"
LORA, FULL_TRAINING = ROOT / "scripts/02_train_lora.py", ROOT / "scripts/03_train_full.py"
OPTIONS = ["--learning_rate", "0.01", "--num_train_epochs", "3", "--logging_steps", "4", "--save_steps", "5"]
# A step of its own: reads a file, writes another.
COPY = """
import pathlib, sys
print("copying", *sys.argv[1:-2])
folder = pathlib.Path(sys.argv[-1])
(folder / "part").mkdir()
(folder / "part/copy.txt").write_text(pathlib.Path(sys.argv[1], "text.txt").read_text())
(folder / "run.json").write_text('{"metrics": {"letters": 3}}')
"""


@pytest.fixture
def script(tmp_path):
    """Makes a script."""

    def make(source: str, name="own.py") -> Path:
        (tmp_path / name).write_text(source)
        return tmp_path / name

    return make


@pytest.fixture
def given(tmp_path):
    """A sealed folder with text.txt and more/numbers.bin."""
    (tmp_path / "given/more").mkdir(parents=True)
    (tmp_path / "given/text.txt").write_text("abc")
    (tmp_path / "given/more/numbers.bin").write_bytes(bytes(range(256)))
    load("chain/folders.py").seal(tmp_path / "given")
    return tmp_path / "given"


def step(folder: Path, *args, **faults) -> subprocess.CompletedProcess:
    return Process(RUNNER, args, folder, **faults).wait()


def train(model: Path, data: Path, output: Path, *options, script=LORA) -> list:
    """Options of the runner for a training."""
    args = ["--model_name_or_path", model, "--dataset_name", data, *OPTIONS, *options]
    return [output, "--reads", model, data, "--", script, *args]


def error(result: subprocess.CompletedProcess, lines=3) -> str:
    """The message of a step that failed, which is short."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-3000:]
    message = result.stderr[result.stderr.index("error: ") :]
    kept = [line for line in message.splitlines() if line.strip() and not re.search(r"it/s\]|s/it\]|\?it", line)]
    assert len(kept) <= lines, message
    return "\n".join(kept)


def snapshot(folder: Path) -> dict[str, bytes]:
    """All that is written to a folder, but for locks and what is noted of sums that were right."""
    files = [file for file in folder.rglob("*") if file.is_file() and file.suffix != ".lock"]
    return {str(file): file.read_bytes() for file in files if file.name != ".verified"}


# Results --------------------------------------------------------------------------------------------------------------
def test_a_result_is_sealed_recorded_and_in_its_place(script, given, tmp_path):
    result = step(tmp_path, "out/copy", "--reads", given, "--", script(COPY), given, "--letters", "all")
    assert result.returncode == 0 and "copying" in result.stdout, result.stderr
    output = tmp_path / "out/copy"
    assert f"The result is in {output.relative_to(tmp_path)}, after a peak of " in result.stdout
    assert (output / "part/copy.txt").read_text() == "abc"
    assert sorted(path.name for path in output.parent.iterdir()) == [".copy.lock", "copy"]
    check = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(check, cwd=output, capture_output=True).returncode == 0
    record = json.loads((output / "run.json").read_text())
    assert (record["script"], record["options"]) == ("own.py", {"letters": "all"})
    assert record["inputs"] == {"given": {"sha256": load("chain/folders.py").verify(given), "record": {}}}
    assert record["packages"]["torch"] and record["started"] < record.get("ended", "3")
    assert record["metrics"]["letters"] == 3 and record["metrics"]["peak_memory_bytes"] > 2**20


def test_a_result_is_whole_or_not_there_and_the_last_one_stays_until_then(script, given, tmp_path):
    args = ("copy", "--reads", given, "--", tmp_path / "own.py", given)
    for older in (False, True):
        script(COPY + "raise SystemExit('error: in the middle')")
        before = snapshot(tmp_path / "copy")
        assert error(step(tmp_path, *args)) == "error: in the middle"
        assert snapshot(tmp_path / "copy") == before and (tmp_path / "copy").exists() == older
        script(COPY.replace('"metrics"', f'"number": {int(older)}, "metrics"'))
        assert step(tmp_path, *args).returncode == 0
        assert json.loads((tmp_path / "copy/run.json").read_text())["number"] == older
    assert not list(tmp_path.glob("copy.*"))


def test_an_exchange_that_was_broken_off_leaves_the_older_result(script, given, tmp_path):
    args = ("copy", "--reads", given, "--", tmp_path / "own.py", given)
    script(COPY)
    assert step(tmp_path, *args).returncode == 0
    before = snapshot(tmp_path / "copy")
    assert step(tmp_path, *args, signal=(signal.SIGKILL, "os.rename .*copy.part$")).returncode == -9
    assert not (tmp_path / "copy").exists()
    script("raise ValueError('no')")
    assert "error: no" in error(step(tmp_path, *args))
    assert snapshot(tmp_path / "copy") == before and not (tmp_path / ".copy.old").exists()


def test_a_note_is_never_of_another_result_than_the_one_that_stands(script, given, tmp_path):
    args = ("copy", "--reads", given, "--note", "note", "--", script(COPY), given)
    (tmp_path / "note").write_text("of the result before")
    assert step(tmp_path, *args, signal=(signal.SIGKILL, "os.rename .*copy.part$")).returncode == -9
    assert not (tmp_path / "note").exists()
    assert step(tmp_path, *args).returncode == 0 and (tmp_path / "note").exists()


def test_a_folder_that_no_step_made_is_refused_and_stays(script, given, tmp_path):
    args = ("mine", "--reads", given, "--", script(COPY), given)
    (tmp_path / "mine/runs").mkdir(parents=True)
    (tmp_path / "mine.old").mkdir()  # a name that people give to copies
    (tmp_path / "mine/runs/weights").write_text("mine")
    assert "mine was not made by a step" in error(step(tmp_path, *args))
    assert (tmp_path / "mine/runs/weights").read_text() == "mine"
    shutil.rmtree(tmp_path / "mine")
    for _ in range(2):
        assert step(tmp_path, *args).returncode == 0
    assert (tmp_path / "mine.old").is_dir()


def test_a_result_may_be_a_link_to_another_disk(script, given, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "copy").symlink_to("disk/copy")
    for _ in range(2):
        assert step(tmp_path, "copy", "--reads", given, "--", script(COPY), given).returncode == 0
    assert (tmp_path / "copy").is_symlink() and (tmp_path / "disk/copy/run.json").is_file()


def test_a_result_is_not_made_from_links_into_itself(script, given, tmp_path):
    assert step(tmp_path, "copy", "--reads", given, "--", script(COPY), given).returncode == 0
    (tmp_path / "links").mkdir()
    (tmp_path / "links/text.txt").symlink_to(tmp_path / "copy/part/copy.txt")
    before = snapshot(tmp_path)
    result = step(tmp_path, "copy", "--reads", "links", "--", tmp_path / "own.py", tmp_path / "links")
    assert "copy is where the result goes" in error(result) and snapshot(tmp_path) == before


def test_an_input_that_changes_while_it_is_read_is_not_recorded(script, given, tmp_path):
    replaced = f"\npathlib.Path({str(given)!r}, 'text.txt').write_text('abd')"
    args = ("copy", "--reads", given, "--", script(COPY + replaced), given)
    assert "text.txt is not what was written" in error(step(tmp_path, *args))
    (given / "text.txt").write_text("abc")
    resealed = f"\nimport sys; sys.path.append({str(ROOT / 'scripts/chain')!r})\nimport folders\n"
    script(COPY + replaced + resealed + f"folders.seal(pathlib.Path({str(given)!r}))")
    assert "what it read has changed meanwhile" in error(step(tmp_path, *args))
    assert not (tmp_path / "copy").exists()


def test_a_file_that_was_put_into_an_input_is_named(script, given, tmp_path):
    (given / "more.txt").write_text("more")
    said = error(step(tmp_path, "--reads", given, "--", script("print('ran')")))
    assert "more.txt is not among the files that were written" in said


def test_a_script_may_record_a_loss_alone(script, tmp_path):
    code = "import pathlib, sys; pathlib.Path(sys.argv[-1], 'run.json').write_text('{\"metrics\": {\"eval_loss\": 1}}')"
    assert step(tmp_path, "out", "--", script(code)).returncode == 0


def test_options_may_be_longer_than_the_name_of_a_file(script, tmp_path):
    result = step(tmp_path, "out", "--", script(""), "--prompts", "what color is the sky " * 20)
    assert result.returncode == 0, result.stderr


def test_without_a_folder_nothing_is_written_and_the_inputs_are_verified(script, given, tmp_path):
    args = ("--reads", given, "--", script("import sys; print(sys.argv[1:])"), "--a", "b")
    before = snapshot(tmp_path)
    assert step(tmp_path, *args).stdout == "['--a', 'b']\n"
    assert snapshot(tmp_path) == before
    (given / "text.txt").write_text("other")
    assert "text.txt" in error(step(tmp_path, *args))


def test_the_status_of_the_script_is_handed_on(script, tmp_path):
    for folder in ((), ("out",)):
        for end, status in (("sys.exit(3)", 3), ("sys.exit()", 0), ("os.kill(os.getpid(), 9)", -9), ("os._exit(4)", 4)):
            result = step(tmp_path, *folder, "--", script(f"import os, sys; {end}"))
            assert (result.returncode, result.stderr) == (status, "")
    assert (tmp_path / "out/SHA256SUMS").exists()


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, -15), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_ends_a_step_and_its_result_is_not_there(number, status, script, tmp_path):
    code = f"import pathlib, sys, os\npathlib.Path(sys.argv[-1], 'a').touch()\nos.kill(os.getpid(), {int(number)})"
    result = step(tmp_path, "out", "--", script(code))
    assert (result.returncode, result.stderr) == (status, "")
    assert (tmp_path / "out.part/a").exists() and not (tmp_path / "out").exists()
    script("")
    assert step(tmp_path, "out", "--", tmp_path / "own.py").returncode == 0
    assert not (tmp_path / "out/a").exists() and not (tmp_path / "out.part").exists()


# One at a time --------------------------------------------------------------------------------------------------------
def test_a_second_one_is_refused_and_a_dead_one_holds_nothing(script, tmp_path):
    wait = script("import pathlib, time; pathlib.Path('begun').touch(); time.sleep(60)")
    first = Process(RUNNER, ("out", "--", wait), tmp_path)
    while not (tmp_path / "begun").exists():
        assert Path(f"/proc/{first.number}/stat").read_text().split()[2] != "Z"
        time.sleep(0.01)
    args = ("out", "--", script("", "other.py"))
    assert f"process {first.number} is writing to out. Wait for its end" in error(step(tmp_path, *args))
    assert step(tmp_path, "another", *args[1:]).returncode == 0
    os.kill(first.number, signal.SIGKILL)
    first.wait()
    assert step(tmp_path, *args).returncode == 0


def test_workers_of_a_dead_process_do_not_hold_its_lock(tmp_path):
    lock = load("chain/folders.py").lock
    reader, writer = os.pipe()
    if (parent := os.fork()) == 0:
        held = lock(tmp_path / "out")  # noqa: F841
        if (worker := os.fork()) == 0:
            time.sleep(60)
        os.write(writer, f"{worker}\n".encode())
        os._exit(0)
    os.waitpid(parent, 0)
    worker = int(os.read(reader, 20))
    try:
        lock(tmp_path / "out").close()
    finally:
        os.kill(worker, signal.SIGKILL)


# Inputs ---------------------------------------------------------------------------------------------------------------
def cut_off(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("name", ["text.txt", "more/numbers.bin", "SHA256SUMS"])
@pytest.mark.parametrize("harm", [cut_off, flip, os.remove])
def test_an_input_that_is_not_as_it_was_written_is_named(harm, name, given, script, tmp_path):
    args = ("out", "--reads", given, "--", script(COPY), given)
    assert step(tmp_path, *args).returncode == 0  # which noted what the files look like
    before = snapshot(tmp_path / "out")
    harm(given / name)
    result = step(tmp_path, *args)
    if name == "SHA256SUMS" and harm == os.remove:  # that is how a change of one's own is said
        assert result.returncode == 0
        return
    said = error(result)
    assert str(given / name) in said or str(given) in said and name == "SHA256SUMS"
    assert "Bring it back" in said and snapshot(tmp_path / "out") == before


def test_sums_are_not_computed_again_for_what_has_not_changed(given, tmp_path, monkeypatch):
    folders = load("chain/folders.py")
    read, sha256 = [], folders.sha256
    monkeypatch.setattr(folders, "sha256", lambda file: read.append(file.name) or sha256(file))
    text = given / "text.txt"

    def verify() -> list[str]:
        read.clear()
        folders.verify(given)
        return sorted(read)

    assert verify() == []  # the seal has noted them
    later = text.stat().st_mtime_ns + 10**9
    os.utime(text, ns=(later, later))  # another time
    assert verify() == ["text.txt"] and verify() == []
    copy = shutil.copy2(text, given.parent / "copy")
    Path(copy).replace(text)  # the same size and time, another inode
    assert verify() == ["text.txt"] and verify() == []
    text.write_text("abd")  # of the same size, and given the same time
    os.utime(text, ns=(later, later))
    with pytest.raises(SystemExit, match="text.txt is not what was written"):
        verify()
    text.write_text("abcd")  # another size
    with pytest.raises(SystemExit, match="text.txt is not what was written"):
        verify()
    text.write_text("abc")
    (given / ".verified").unlink()
    assert verify() == ["numbers.bin", "text.txt"] and verify() == []
    (given / ".verified").write_text("{")  # cut off
    assert verify() == ["numbers.bin", "text.txt"] and verify() == []
    # Another list of the same files, as after they were brought back
    lines = (given / "SHA256SUMS").read_text().splitlines()
    (given / "SHA256SUMS").write_text("\n".join([lines[0], *reversed(lines[1:])]) + "\n")
    assert verify() == ["numbers.bin", "text.txt"] and verify() == []

    # One that is changed while it is read
    def sha256_late(file: Path) -> str:
        digest = sha256(file)
        if file.name == "text.txt":
            file.write_text("abd")
        return digest

    (given / ".verified").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(folders, "sha256", sha256_late)
        verify()
    with pytest.raises(SystemExit, match="text.txt is not what was written"):
        verify()
    text.write_text("abc")

    # In a folder that only others may write to, there is no note
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    (given / ".verified").unlink()
    monkeypatch.setattr(Path, "write_text", refuse)
    assert verify() == verify() == ["numbers.bin", "text.txt"]


def test_a_large_input_is_verified_in_a_moment_the_second_time(tmp_path):
    folders = load("chain/folders.py")
    with (tmp_path / "model.safetensors").open("wb") as stream:
        stream.truncate(13 * 10**9 if FULL else 3 * 10**8)
    (tmp_path / "config.json").write_text("{}")
    folders.seal(tmp_path)
    (tmp_path / ".verified").unlink()
    seconds = []
    for _ in range(2):
        began = time.time()
        folders.verify(tmp_path)
        seconds.append(time.time() - began)
    assert seconds[1] < 0.5 and seconds[0] > 10 * seconds[1]


def test_files_are_read_several_at_a_time(tmp_path, monkeypatch):
    folders = load("chain/folders.py")
    for name in "ab":
        (tmp_path / name).touch()
    both = threading.Barrier(2, timeout=10)
    monkeypatch.setattr(folders, "sha256", lambda file: both.wait() and file.name or file.name)
    assert folders.add_up(tmp_path, ["a", "b"]) == {"a": "a", "b": "b"}


def test_an_adapter_of_another_base_is_refused_and_one_of_the_same_base_fetched_again_is_not(script, given, tmp_path):
    folders = load("chain/folders.py")
    assert step(tmp_path, "adapter", "--reads", given, "--", script(COPY), given).returncode == 0
    merge = ("merged", "--reads", "adapter", given, "--", script("", "merge.py"))
    (given / "run.json").write_text('{"started": "later"}')
    folders.seal(given)
    assert step(tmp_path, *merge).returncode == 0
    moved = shutil.copytree(given, tmp_path / "elsewhere/given")
    assert step(tmp_path, "merged", "--reads", "adapter", moved, "--", "merge.py").returncode == 0
    (given / "text.txt").write_text("another")
    folders.seal(given)
    said = error(step(tmp_path, *merge))
    assert f"adapter was made from another given than {given}. Make it anew" in said


# Attempts -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def interrupted(tiny_model, question_rows, tmp_path_factory):
    """A folder with copies of the script, the model and the rows, and a training of them that was interrupted twice."""
    folder = tmp_path_factory.mktemp("interrupted")
    shutil.copytree(tiny_model, folder / "model")
    shutil.copytree(question_rows, folder / "rows")
    shutil.copy(LORA, folder)
    (folder / "recipe.yaml").write_text("weight_decay: 0.01\n")
    load("chain/folders.py").seal(folder / "model")
    for place in (5, 8):
        result = step(folder, *attempt(), step=(signal.SIGTERM, place))
        assert result.returncode == 143 and "Type the same command again, without RESTART=1" in result.stderr
    assert "Going on from lora.part/checkpoints/checkpoint-5" in result.stdout
    return folder


def attempt(*options) -> list:
    return train("model", "rows", "lora", "--config", "recipe.yaml", *options, script="02_train_lora.py")


@pytest.fixture
def copy(interrupted, tmp_path):
    return shutil.copytree(interrupted, tmp_path / "copy")


def rewrite(file: Path, old: str, new: str) -> None:
    file.write_text(file.read_text().replace(old, new))


OTHERS = {
    "--learning_rate 0.02 instead of 0.01": lambda folder: ["--learning_rate", "0.02"],
    "--seed 1 instead of none": lambda folder: ["--seed", "1"],
    "--lora_r 8 instead of none; --use_dora": lambda folder: ["--use_dora", "--lora_r=8"],
    "02_train_lora.py ": lambda folder: rewrite(folder / "02_train_lora.py", "# Train the", "# Train this"),
    "--config recipe.yaml (": lambda folder: rewrite(folder / "recipe.yaml", "0.01", "0.02"),
    "another one: rows ": lambda folder: rewrite(folder / "rows/train.jsonl", "red", "blue"),
    "another one: model ": lambda folder: (
        rewrite(folder / "model/chat_template.jinja", "INST", "ASK")
        or load("chain/folders.py").seal(folder / "model")
        and None
    ),
    "peft 0.": lambda folder: rewrite(folder / "lora.part/step.json", '"peft": "0', '"peft": "9'),
}


def test_another_attempt_is_refused_with_what_differs_and_nothing_is_lost(interrupted, tmp_path):
    for number, (said, change) in enumerate(OTHERS.items()):
        folder = shutil.copytree(interrupted, tmp_path / f"{number}")
        options = change(folder) or []
        before = snapshot(folder / "lora.part")
        message = error(step(folder, *attempt(*options)))
        assert said in message, message
        assert "a run was interrupted after lora.part/checkpoints/checkpoint-8, and this is another one" in message
        assert "--restart (make: RESTART=1)" in message
        assert snapshot(folder / "lora.part") == before
    result = step(folder, "--restart", *attempt("--max_steps", "1"))  # begins anew
    assert result.returncode == 0 and "Going on" not in result.stdout
    assert [path.name for path in folder.glob("lora/checkpoints/checkpoint-*")] == ["checkpoint-1"]


def test_what_changes_no_result_may_be_another(copy):
    (copy / "elsewhere").mkdir()
    for name in ("model", "rows", "recipe.yaml", "lora.part"):
        (copy / name).rename(copy / "elsewhere" / name)
    options = ["--save_steps", "9", "--save_total_limit", "1", "--run_name", "b", "--disable_tqdm", "true"]
    args = [Path("elsewhere", word) if word in ("model", "rows", "recipe.yaml", "lora") else word for word in attempt()]
    result = step(copy, *args, *options, "--report_to", "none")
    assert result.returncode == 0 and "Going on from elsewhere/lora.part/checkpoints/checkpoint-8" in result.stdout


def test_a_checkpoint_is_gone_on_from_if_nothing_in_it_is_other_or_more(copy):
    checkpoints = copy / "lora.part/checkpoints"
    (checkpoints / "checkpoint-8/pytorch_model.bin").write_bytes(b"")  # the trainer would take it
    (checkpoints / "checkpoint-9").mkdir()  # was being written
    result = step(copy, *attempt())
    said = f"{checkpoints.relative_to(copy)}/checkpoint-8/pytorch_model.bin is not among the files that were written"
    assert said in result.stdout and "This checkpoint is left out." in result.stdout
    assert result.returncode == 0 and "Going on from lora.part/checkpoints/checkpoint-5\n" in result.stdout


def test_where_no_checkpoint_is_whole_nothing_is_removed(copy):
    for checkpoint in copy.glob("lora.part/checkpoints/checkpoint-*"):
        cut_off(checkpoint / "optimizer.pt")
    before = snapshot(copy)
    assert "no checkpoint is whole. Bring what is damaged back" in error(step(copy, *attempt()))
    assert snapshot(copy) == before


def test_a_checkpoint_with_a_pickle_executes_nothing(copy):
    files = [checkpoint / "optimizer.pt" for checkpoint in copy.glob("lora.part/checkpoints/checkpoint-*")]
    for file in files:
        file.write_bytes(b"cos\nsystem\n(S'touch executed'\ntR.")
        load("chain/folders.py").seal(file.parent)
    said = error(step(copy, *attempt()))
    assert "A checkpoint holds more than numbers; nothing of it was executed." in said and "--restart" in said
    assert not (copy / "executed").exists()


# Errors ---------------------------------------------------------------------------------------------------------------
HUB = """
import types
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
try:
    answer = types.SimpleNamespace(headers={{}}, request=None)
    raise {kind}("403 Client Error for https://huggingface.co/org/gated/resolve/main/config.json", response=answer)
except Exception as error:
    raise OSError("You are trying to access a gated repo.") from error
"""
ERRORS = [  # what a script raises, and what is said of it
    ("def f(row):\n    return row['a']\n\nf({})", ["KeyError: 'a' (own.py, line 2).", "TRACEBACK=1"]),
    ("import json\njson.loads('[')", ["error: Expecting value: line 1 column 2 (char 1) (own.py, line 2).\nMend that"]),
    ("raise ValueError('some\\n   rows')", ["error: some rows (own.py, line 1).\nMend that"]),
    (HUB.format(kind="GatedRepoError"), ["org/gated is gated", "  1. ask for access at https://huggingface.co/org/gated",
                                         "  3. put HF_TOKEN=<token> into .env"]),
    (HUB.format(kind="GatedRepoError").replace("org/gated", "meta-llama/Llama-2-7b"),
     ["meta-llama/Llama-2-7b is gated", "\nWithout a gate: NousResearch/Llama-2-7b-chat-hf."]),
    ("raise ValueError(\"Dataset 'org/gated' is a gated dataset on the Hub.\")",
     ["error: org/gated is gated", "  1. ask for access at https://huggingface.co/datasets/org/gated\n"]),
    (HUB.format(kind="RepositoryNotFoundError"), ["Check the name and the revision"]),
    ("try:\n    raise ValueError('User Access Token \"x\" is expired')\nexcept ValueError as error:\n"
     "    raise SystemExit('error: no model.')", ["error: no model.\nHF_TOKEN of .env, or else"]),
    ("raise OSError(\"We couldn't connect to 'https://huggingface.co' to load the files\")", ["See to the network"]),
    ("raise ConnectionError('503 Server Error')", ["See to the network, and type the same command again"]),
    ("raise OSError(28, 'No space left on device', 'a.bin')", ["a.bin", "Make room, and type the same command again"]),
    ("raise OSError(122, 'Disk quota exceeded')", ["Make room"]),
    ("raise RuntimeError('PytorchStreamWriter failed writing file data/7')", ["Make room"]),
    ("bytearray(2**60)", ["error: out of memory: MemoryError\nTake less", "--gradient_checkpointing true"]),
    ("import torch\ntorch.empty(2**50)", ["error: out of memory: ", "--per_device_train_batch_size"]),
    ("import torch\nraise torch.OutOfMemoryError('HIP out of memory. Tried')", ["error: out of memory: HIP"]),
    ("raise ValueError('unrecognized argument --lora_q')", ["See --help (make: ARGS=--help)."]),
    ("import sys\nsys.exit('error: no rows in that file.')", ["error: no rows in that file."]),
    ("open('there/is/none')", ["No such file or directory: 'there/is/none' (own.py, line 1).\nMend that"]),
]  # fmt: skip


@pytest.mark.parametrize(("source", "said"), ERRORS, ids=lambda value: value[0][:40] if isinstance(value, list) else "")
def test_an_error_is_a_cause_and_what_to_do_in_few_lines(source, said, script, tmp_path):
    message = error(step(tmp_path, "out", "--", script(source)), lines=5 if "ated" in source else 2)
    assert "NousResearch" not in message or "Llama" in source
    assert all(words in message for words in said), message
    assert not (tmp_path / "out").exists()


def test_all_that_python_says_is_shown_on_demand(script, tmp_path):
    result = step(tmp_path, "--", script("1 / 0"), code="import os; os.environ['TRACEBACK'] = '1'")
    assert "Traceback (most recent call last)" in result.stderr and "1 / 0" in result.stderr
    assert result.stderr.endswith("TRACEBACK=1\n") and result.returncode == 1


@pytest.mark.parametrize("token", ["hf_abcdefghijklmnopqrstuvwxyz", "secret-without-a-form"])
def test_a_token_is_shown_nowhere(token, script, tmp_path):
    environment = f"import os; os.environ |= {{'HF_TOKEN': {token!r}, 'TRACEBACK': '1'}}"
    for end in (
        f"raise ValueError('a header Bearer {token} of')",
        f"raise SystemExit('error: token {token} is wrong')",
    ):
        for folder in ((), ("out",)):
            result = step(tmp_path, *folder, "--", script(end), code=environment)
            assert result.returncode == 1 and token not in result.stderr + result.stdout
            assert "<HF_TOKEN>" in result.stderr
    assert "--hub_token is refused" in error(step(tmp_path, "--", script(""), f"--hub_token={token}"))
    other = "hf_" + "Z" * 30  # one that is not in the environment, in a message
    assert other not in step(tmp_path, "--", script(f"raise KeyError('{other}')")).stderr


def test_a_bad_command_of_the_runner_is_one_line(tmp_path):
    for args, said in (
        (["out"], "no script after --"),
        (["out", "--", "none.py"], "no script none.py"),
        (["out", "--unknown", "--", "none.py"], "--unknown. See --help"),
        (["out", "--reads", "none", "--", RUNNER], "none is not there. Make it first"),
        (["/proc/out", "--", RUNNER], "Mend that"),
    ):
        assert said in error(step(tmp_path, *args), lines=1)


# Trainings ------------------------------------------------------------------------------------------------------------
BREAK = """
import sys
from transformers import Trainer
from trl import SFTTrainer
training_step = SFTTrainer.training_step
def broken_step(self, *args, **kwargs):
    loss = training_step(self, *args, **kwargs)
    if self.state.global_step + 1 == {step}:
        {what}
    return loss
SFTTrainer.training_step = broken_step
"""
WEIGHT = "next(value for value in self.model.parameters() if value.requires_grad)"


@pytest.mark.parametrize("kind", [LORA, FULL_TRAINING])
@pytest.mark.parametrize(
    ("at", "what", "options", "said"),
    [
        (8, "loss *= float('nan')", "", ["the loss is nan at step 8", "checkpoint-5"]),
        (8, "loss *= float('inf')", "", ["the loss is inf at step 8", "checkpoint-5"]),
        (10, f"{WEIGHT}.grad.fill_(float('inf'))", "", ["not finite at step 10", "checkpoint-5"]),
        (21, f"{WEIGHT}.grad.fill_(float('inf'))", "--save_strategy no", ["not finite at step 21", "checkpoint: none"]),
    ],
)
def test_numbers_that_are_none_are_neither_saved_nor_a_result(
    at, what, options, said, kind, tiny_model, question_rows, tmp_path
):
    args = train(tiny_model, question_rows, tmp_path / "out", *options.split(), script=kind)
    message = error(step(tmp_path, *args, code=BREAK.format(step=at, what=what)))
    assert all(words in message for words in said), message
    assert "Try, with --restart (make: RESTART=1): a tenth of the learning rate" in message
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("a*_model.safetensors")) or "none" not in said[1]
    saved = [path.parent.name for path in tmp_path.rglob("checkpoint-*/SHA256SUMS")]
    assert saved == (["checkpoint-5"] if not options else [])


def test_memory_that_runs_out_is_answered_with_settings_that_were_predicted(tiny_model, question_rows, tmp_path):
    smaller = [{"options": "--per_device_train_batch_size 2", "bytes": 2**29}]
    (tmp_path / "memory.json").write_text(json.dumps({"predictions": [], "smaller": smaller}))
    code = BREAK.format(step=1, what="raise MemoryError('std::bad_alloc')")
    args = train(tiny_model, question_rows, tmp_path / "out")
    said = error(step(tmp_path, "--prediction", tmp_path / "memory.json", *args, code=code))
    assert said.endswith("Take less, with --restart (make: RESTART=1): --per_device_train_batch_size 2 (0.50 GiB)")


def test_memory_that_runs_out_is_an_error_before_the_system_kills_the_process(tiny_model, tmp_path):
    # Eager attention over a long row takes more than the limit leaves.
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "<s> " + "a b c d " * 5_000 + "</s>"}] * 2)
    options = ("--max_length", "100000", "--attn_implementation", "eager")
    code = "import resource; resource.setrlimit(resource.RLIMIT_DATA, (2 * 10**9, -1))"
    said = error(step(tmp_path, *train(tiny_model, rows, tmp_path / "out", *options), code=code))
    assert said.startswith("error: out of memory: ")


def test_the_disk_is_checked_before_the_first_step(tiny_model, question_rows, tmp_path):
    code = (
        "import shutil; usage = shutil.disk_usage('/')._replace(free=9 * 10**7); shutil.disk_usage = lambda path: usage"
    )
    args = train(tiny_model, question_rows, tmp_path / "out")
    said = error(step(tmp_path, *args, code=code))
    assert "3 checkpoints of 0.03 GB and a result of 0.00 GB do not fit into the 0.09 GB that are free" in said
    assert "--save_total_limit 1" in said and not list(tmp_path.rglob("checkpoint-*"))
    assert step(tmp_path, *args, "--save_total_limit", "1", code=code).returncode == 0


def test_a_pipe_that_nobody_reads_any_more_does_not_end_a_training(tiny_model, question_rows, tmp_path):
    code = """
import os
from transformers.trainer_callback import CallbackHandler
begin = CallbackHandler.on_step_begin
def on_step_begin(self, args, state, control):
    if state.global_step == 3:
        reader, writer = os.pipe()
        os.dup2(writer, 1), os.dup2(writer, 2)
        os.close(reader), os.close(writer)
    return begin(self, args, state, control)
CallbackHandler.on_step_begin = on_step_begin
"""
    result = step(tmp_path, *train(tiny_model, question_rows, tmp_path / "out"), code=code)
    assert result.returncode == 0 and (tmp_path / "out/adapter").exists(), result.stderr


def test_a_kill_in_a_second_save_of_one_step_leaves_an_older_checkpoint(tiny_model, question_rows, tmp_path):
    """After a signal in the last step of an epoch that is evaluated there are two saves of it, one on the other."""
    options = "--save_total_limit 1 --save_steps 5 --eval_strategy epoch --dataset_test_split validation".split()
    args = train(tiny_model, question_rows, tmp_path / "out", *options)
    code = """
import os, sys
saves = []
def hook(event, args):
    if event == "open" and str(args[0]).endswith("checkpoint-7/SHA256SUMS.tmp"):
        saves.append(args[0])
        if len(saves) == 2:
            os.kill(os.getpid(), 9)
sys.addaudithook(hook)
"""
    assert step(tmp_path, *args, step=(signal.SIGTERM, 7), code=code).returncode == -9
    result = step(tmp_path, *args)
    assert result.returncode == 0 and "Going on from" in result.stdout, result.stderr


# What happens before a checkpoint is sealed
BEFORE_SEAL = """
import folders, os, threading, time
from transformers.trainer_callback import CallbackHandler
reached = threading.Event()
def on_step_begin(self, args, state, control, begin=CallbackHandler.on_step_begin):
    if state.global_step + 1 == 13:
        reached.set()
    return begin(self, args, state, control)
def late_seal(folder, *args, seal=folders.seal, **kwargs):
    if folder.name == "checkpoint-{number}":
        {what}
    return seal(folder, *args, **kwargs)
CallbackHandler.on_step_begin, folders.seal = on_step_begin, late_seal
"""
# A callback of the script that asks for a checkpoint, and for no log before it
SAVE_AT_6 = """
from transformers.trainer_callback import CallbackHandler
def on_step_end(self, args, state, control, end=CallbackHandler.on_step_end):
    control = end(self, args, state, control)
    control.should_save |= state.global_step == 6
    return control
CallbackHandler.on_step_end = on_step_end
"""
UNTIL_13 = "assert reached.wait(20), 'the training waits'"
FULL_DISK = "raise OSError(28, 'No space left on device', 'a.bin')"


def list_checkpoints(folder: Path) -> dict[str, bool]:
    """Whether they are sealed, by their names."""
    return {path.name: (path / "SHA256SUMS").is_file() for path in sorted(folder.rglob("checkpoint-*"))}


def test_a_training_goes_on_while_a_checkpoint_is_sealed(tiny_model, question_rows, tmp_path):
    args = train(tiny_model, question_rows, tmp_path / "out", "--save_total_limit", "1")
    result = step(tmp_path, *args, code=BEFORE_SEAL.format(number=10, what=UNTIL_13))
    assert result.returncode == 0, result.stderr
    assert list_checkpoints(tmp_path) == {"checkpoint-21": True}


def test_a_kill_while_a_checkpoint_is_sealed_leaves_the_older_one(tiny_model, question_rows, tmp_path):
    args = train(tiny_model, question_rows, tmp_path / "out", "--save_total_limit", "1")
    code = BEFORE_SEAL.format(number=10, what=f"{UNTIL_13}; os.kill(os.getpid(), 9)")
    assert step(tmp_path, *args, code=code).returncode == -9
    assert list_checkpoints(tmp_path) == {"checkpoint-10": False, "checkpoint-5": True}
    result = step(tmp_path, *args)
    assert result.returncode == 0 and "checkpoint-5\n" in result.stdout, result.stderr


@pytest.mark.parametrize("number", [5, 21])
def test_a_seal_that_fails_ends_the_training_before_more_is_saved(number, tiny_model, question_rows, tmp_path):
    args = train(tiny_model, question_rows, tmp_path / "out")
    said = error(step(tmp_path, *args, code=BEFORE_SEAL.format(number=number, what=FULL_DISK)))
    assert "a.bin" in said and "Make room, and type the same command again" in said
    assert not (tmp_path / "out").exists()
    assert [name for name, whole in list_checkpoints(tmp_path).items() if not whole] == [f"checkpoint-{number}"]


def test_a_stop_waits_for_its_checkpoint_and_says_if_that_is_not_whole(tiny_model, question_rows, tmp_path):
    args = train(tiny_model, question_rows, tmp_path / "out", "--save_total_limit", "1")
    failed = step(tmp_path, *args, step=(signal.SIGTERM, 8), code=BEFORE_SEAL.format(number=8, what=FULL_DISK))
    assert "Make room" in error(failed) and list_checkpoints(tmp_path) == {"checkpoint-5": True, "checkpoint-8": False}
    late = BEFORE_SEAL.format(number=8, what="time.sleep(2)")
    assert step(tmp_path, *args, step=(signal.SIGTERM, 8), code=late).returncode == 143
    assert list_checkpoints(tmp_path) == {"checkpoint-8": True}


def test_an_error_after_a_save_ends_when_that_is_sealed(tiny_model, question_rows, tmp_path):
    code = BEFORE_SEAL.format(number=5, what="time.sleep(2)") + BREAK.format(
        step=6, what="raise ArithmeticError('own')"
    )
    said = error(step(tmp_path, *train(tiny_model, question_rows, tmp_path / "out"), code=code))
    assert "The last good checkpoint: " in said and "checkpoint-5 " in said


def test_nothing_is_written_into_a_checkpoint_that_is_being_sealed(tiny_model, question_rows, tmp_path):
    """After a signal in the last step of an epoch there are two saves of it, one on the other."""
    args = train(tiny_model, question_rows, tmp_path / "out", "--save_total_limit", "1")
    files = "{name: folders.look(folder / name) for name in folders.list_files(folder)}"
    code = BEFORE_SEAL.format(number=7, what=f"before = {files}; time.sleep(2); assert before == {files}, 'written'")
    assert step(tmp_path, *args, step=(signal.SIGTERM, 7), code=code).returncode == 143
    assert list_checkpoints(tmp_path) == {"checkpoint-7": True}


def test_a_save_while_the_one_before_is_being_sealed(tiny_model, question_rows, tmp_path):
    args = train(tiny_model, question_rows, tmp_path / "out", "--save_total_limit", "1")
    late = BEFORE_SEAL.format(number=5, what="time.sleep(2)")
    killed = step(tmp_path, *args, code=SAVE_AT_6 + late + BEFORE_SEAL.format(number=6, what="os.kill(os.getpid(), 9)"))
    assert killed.returncode == -9 and list_checkpoints(tmp_path) == {"checkpoint-5": True, "checkpoint-6": False}
    code = SAVE_AT_6 + BEFORE_SEAL.format(number=5, what=f"time.sleep(2); {FULL_DISK}")
    assert "Make room" in error(step(tmp_path, "--restart", *args, code=code))
    assert list_checkpoints(tmp_path) == {"checkpoint-5": False, "checkpoint-6": False}


def test_an_evaluation_without_a_training_is_none_of_its_business(tiny_model, script, tmp_path):
    source = """
import sys
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments
rows = [{"input_ids": [1, 5, 6], "labels": [1, 5, 6]}]
args = TrainingArguments(sys.argv[-1], report_to="none")
print(Trainer(AutoModelForCausalLM.from_pretrained(sys.argv[1]), args, eval_dataset=rows).evaluate())
"""
    result = step(tmp_path, "out", "--reads", tiny_model, "--", script(source), tiny_model)
    assert result.returncode == 0 and "eval_loss" in result.stdout, result.stderr


# Around scripts that are not ours -------------------------------------------------------------------------------------
@pytest.fixture
def elsewhere(tmp_path):
    """A folder with the runner and what it needs, and nothing else."""
    (tmp_path / "elsewhere").mkdir()
    for name in ("run_step.py", "folders.py"):
        shutil.copy(ROOT / "scripts/chain" / name, tmp_path / "elsewhere")
    return tmp_path / "elsewhere"


def test_the_runner_copied_out_runs_any_script_with_the_standard_library_alone(elsewhere, given):
    (elsewhere / "own.py").write_text(COPY)
    command = [sys.executable, "-S", "run_step.py", "out", "--reads", given, "--", "own.py", given]
    began = time.time()
    result = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert time.time() - began < 5 and (elsewhere / "out/part/copy.txt").read_text() == "abc"


def test_the_runner_copied_out_makes_another_projects_training_go_on_after_a_kill(elsewhere, tiny_model, question_rows):
    import trl

    shutil.copytree(tiny_model, elsewhere / "model")
    sft = Path(trl.__file__).parent / "scripts/sft.py"
    options = "--model_name_or_path model --dataset_name rows --bf16 false --max_steps 10 --save_steps 3 --use_peft"
    shutil.copytree(question_rows, elsewhere / "rows")
    options += " --report_to none --save_total_limit 2 --learning_rate 0.01 --logging_steps 1"
    args = ("--reads", "model", "rows", "--", sft, *options.split())
    assert Process(elsewhere / "run_step.py", ("whole", *args), elsewhere).wait().returncode == 0
    killed = Process(elsewhere / "run_step.py", ("out", *args), elsewhere, step=(signal.SIGKILL, 8)).wait()
    assert killed.returncode == -9 and not (elsewhere / "out").exists()
    # In a process of its own, which imports the libraries after the runner
    result = run(elsewhere / "run_step.py", "out", *args, cwd=elsewhere, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "Going on from out.part/checkpoint-6\n" in result.stdout
    weights = [(elsewhere / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "out")]
    assert weights[0] == weights[1]
    assert sorted(path.name for path in elsewhere.glob("out/checkpoint-*")) == ["checkpoint-10", "checkpoint-9"]
    assert all((path / "SHA256SUMS").is_file() for path in elsewhere.glob("out/checkpoint-*"))
    record = json.loads((elsewhere / "out/run.json").read_text())
    assert record["script"] == "sft.py" and record["options"]["max_steps"] == "10"
    assert set(record["inputs"]) == {"model", "rows"} and record["sha256"].keys() == {"adapter_model.safetensors"}
    assert load("chain/folders.py").find_damage(elsewhere / "out") is None


OF_ITSELF = ["--model_name_or_path={}", "--model_name_or_path {}", "--model_name_or_path {}/model", "--reads {}"]


@pytest.mark.parametrize("form", OF_ITSELF)
def test_a_result_is_not_made_from_itself_or_from_what_is_in_it(form, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "out/base-model")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out/base-model").iterdir()}
    options = form.format("out/base-model").split()
    runner, options = (options, []) if "--reads" in options else ([], options)
    command = ("chain/run_step.py", "out/base-model", *runner, "--", ROOT / "scripts/01_download.py", *options)
    result = run(*command, cwd=tmp_path)
    assert result.returncode == 1 and "out/base-model is where the result goes" in result.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out/base-model").iterdir()} == before


WRONG_CALLS = {
    "--rest": "unrecognized arguments: --rest",  # it would be taken for --restart
    "--reads a/rows b/rows": "two of --reads have the same name",
}


@pytest.mark.parametrize("options", WRONG_CALLS)
def test_a_wrong_call_is_answered_before_anything_is_lost(options, script, tmp_path):
    result = step(tmp_path, "out", *options.split(), "--", script("print('ran')"))
    assert WRONG_CALLS[options] in error(result) and "ran" not in result.stdout
    assert not (tmp_path / "out").exists()


def test_a_launcher_of_several_processes_is_refused(script, tmp_path):
    result = run("chain/run_step.py", "out", "--", script("print('ran')"), cwd=tmp_path, WORLD_SIZE="2")
    assert "one process on one accelerator" in error(result) and "ran" not in result.stdout


def test_a_checkpoint_that_a_callback_takes_something_out_of_is_left_out(tmp_path, monkeypatch):
    folders = load("chain/folders.py")
    older, newer = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    for folder in (older, newer):
        folder.mkdir()
        (folder / "weights").write_text("1")
    monkeypatch.setattr(folders, "list_files", lambda folder: ["weights", "optimizer"])  # which is gone meanwhile
    folders.seal_checkpoint(newer, [older])
    assert older.is_dir() and not (newer / folders.SUMS).exists()
    monkeypatch.undo()
    folders.seal_checkpoint(newer, [older])
    assert not older.exists() and (newer / folders.SUMS).is_file()
