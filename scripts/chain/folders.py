"""Folders of results: locked while they are written, sealed, verified, and put in the place of the last one when whole.
What an interrupted attempt left is taken up where the next one is the same.

SHA256SUMS lists the files of a folder with their sums, as sha256sum --check reads them. What was true of the files when
their sums were last right (size, times, inode) is noted beside it, in .verified: what has not changed since is not read
again.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn, TextIO

SUMS, NOTE = "SHA256SUMS", ".verified"
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")
# Options that change no result: they may be others when a training goes on.
FREE = {"output_dir", "resume_from_checkpoint", "save_steps", "save_total_limit", "max_shard_size", "report_to"}
FREE |= {"run_name", "disable_tqdm", "dataset_num_proc", "per_device_eval_batch_size"}
RECORDS = ("run.json", "step.json")  # of how a folder was made; what is in it may be the same the next time
# What is written into a finished folder later, or may be removed from it; checkpoints are sealed one by one.
UNSEALED = re.compile(r"(.*/)?(README\.md|(SHA256SUMS|\.verified)(\.tmp)?|[^/]*\.png|checkpoint-\d+/.*|runs/.*)")


def mask(text: str) -> str:
    """The text without a token of the Hub: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    return re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", text.replace(token, "<HF_TOKEN>"))


def fail(message: str) -> NoReturn:
    """Ends with an error: its cause, and what to type or to give instead."""
    sys.exit("error: " + mask(message))


def make_parser(description: str) -> argparse.ArgumentParser:
    """A parser that answers what is wrong in a line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=formatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}. See --help.")
    return parser


# Files ----------------------------------------------------------------------------------------------------------------
def flush(path: Path) -> None:
    """Sees that a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Writes the file whole or not at all, and sees that it is on the disk."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)
    flush(file.parent)


def write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=2, default=str) + "\n")


def read_json(file: Path) -> dict:
    """The object in a JSON file; stops where it is cut off or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it holds no object")
    except ValueError as error:
        fail(f"{file} is damaged: {error}. Bring it back, or remove it and make it anew.")
    return content


def read_record(folder: Path, name: str = "run.json") -> dict:
    """What the record of a folder says of it, if there is one."""
    return read_json(folder / name) if (folder / name).is_file() else {}


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb", buffering=0) as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


# Seals ----------------------------------------------------------------------------------------------------------------
def look(file: Path) -> list[int]:
    """What changes when a file does, without reading it: size, times in nanoseconds, inode."""
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def add_up(folder: Path, names: list[str]) -> dict[str, str]:
    """Sums of the files, several at a time: hashing leaves Python to other threads."""
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(lambda name: sha256(folder / name), names), strict=True))


def note(folder: Path, seen: dict[str, list[int]], digest: str) -> None:
    """Notes that the files, when they looked so, were as the list of that sum says."""
    with contextlib.suppress(OSError):  # a folder that only others may write to is read each time
        temporary = folder / f"{NOTE}.tmp"
        temporary.write_text(json.dumps(seen | {"sums": digest}), encoding="utf-8")
        temporary.replace(folder / NOTE)


def list_files(folder: Path) -> list[str]:
    """Names of the files of a folder and the folders in it that a seal is for."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if not UNSEALED.fullmatch(name))


def check_download(file: Path, digest: str) -> None:
    """Stops at a file whose sum is not what a hub states, which is its name in the hub's cache; removes it there."""
    link = file
    while link.is_symlink():
        link = link.parent / link.readlink()
        if link.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", link.name) and link.name != digest:
            link.unlink()
            fail(f"{file} came damaged: the hub states another sha256. It is removed: type the same command again.")


def seal(folder: Path, known: dict[str, str] | None = None) -> dict[str, str]:
    """Writes SHA256SUMS, with the sums that are known, and sees that all of the folder is on the disk; returns them."""
    names, known = list_files(folder), known or {}
    seen = {name: look(folder / name) for name in names}
    sums = add_up(folder, [name for name in names if name not in known]) | known
    sums = {name: sums[name] for name in names}
    for name, digest in sums.items():
        check_download(folder / name, digest)
    # With their number, so that a list that was cut off is known; to sha256sum --check that line is a comment.
    text = f"# {len(sums)} files\n" + "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    paths = [folder / name for name in names]
    for path in [*paths, *sorted({path.parent for path in paths})]:
        flush(path)
    write_text(folder / SUMS, text)  # when all that it lists is on the disk
    flush(folder.parent)
    note(folder, seen, hashlib.sha256(text.encode()).hexdigest())
    return sums


def seal_checkpoint(folder: Path, over: list[Path]) -> None:
    """Seals it, and then removes what is over; one that a callback of the script takes something out of is left out."""
    with contextlib.suppress(FileNotFoundError):
        seal(folder)
        for path in over:
            shutil.rmtree(path, ignore_errors=True)


def find_damage(folder: Path) -> str | None:
    """What of a folder is missing, not as SHA256SUMS there says, or not listed; None where nothing is, or no sums."""
    if not (sums := folder / SUMS).is_file():
        return None
    text = sums.read_text(encoding="utf-8", errors="replace")
    *lines, end = text.split("\n")
    if end or lines[:1] != [f"# {len(lines) - 1} files"]:
        return f"{sums} is not what was written: it does not list as many files as it says"
    expected = {name: digest for digest, _, name in (line.partition("  ") for line in lines[1:])}
    if (missing := next((name for name in expected if not (folder / name).is_file()), None)) is not None:
        return f"{folder / missing} is missing: {SUMS} lists it"
    if others := set(list_files(folder)) - expected.keys():
        return f"{folder / min(others)} is not among the files that were written, in {SUMS}: take it out"
    digest = hashlib.sha256(text.encode()).hexdigest()
    seen = {}
    with contextlib.suppress(OSError, ValueError):
        seen = json.loads((folder / NOTE).read_text(encoding="utf-8"))
    now = {name: look(folder / name) for name in expected}
    changed = [name for name in expected if seen.get("sums") != digest or seen.get(name) != now[name]]
    for name, found in add_up(folder, changed).items():
        if found != expected[name]:
            return f"{folder / name} is not what was written: it differs from {SUMS}"
    if changed:
        note(folder, now, digest)
    return None


def verify(path: Path) -> str:
    """A sum of what a folder, but for its records, or a file holds; stops where that is not as SHA256SUMS says."""
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        fail(f"{path} is not there. Make it first, or give another.")
    if damage := find_damage(path):
        advice = f"remove {path}, with what it links to, and make it anew. If you changed it: remove its {SUMS}."
        fail(f"{damage}. Bring it back, or {advice}")
    if (path / SUMS).is_file():
        lines = (path / SUMS).read_text(encoding="utf-8").splitlines()[1:]
        sums = {line[66:]: line[:64] for line in lines}
    else:
        sums = add_up(path, list_files(path))
    content = {name: digest for name, digest in sums.items() if name not in RECORDS}
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def check_inputs(inputs: dict[Path, str]) -> None:
    """Stops where an input was made from another one than is read beside it: an adapter of another base model."""
    for path in inputs:
        made_from = read_record(path).get("inputs", {})
        for other, digest in inputs.items():
            if made_from.get(other.name, {}).get("sha256", digest) != digest:
                fail(f"{path} was made from another {other.name} than {other}. Make it anew, or bring that one back.")


# Exchange -------------------------------------------------------------------------------------------------------------
def lock(folder: Path) -> TextIO:
    """Keeps other processes from making a folder, until the file returned is closed or this process has ended; ends an
    exchange that was broken off.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    stream = folder.with_name(f".{folder.name}.lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no worker process inherits
    except BlockingIOError:
        stream.seek(0)
        fail(f"process {stream.read().strip()} is writing to {folder}. Wait for its end, or take another folder (OUT).")
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    put_back(folder)
    if folder.exists() and not (folder / "step.json").is_file() and (folder.is_file() or any(folder.iterdir())):
        fail(f"{folder} was not made by a step, and would be lost. Move it away, or take another folder (OUT).")
    return stream


def put_back(folder: Path) -> None:
    """Ends an exchange that was broken off between its two renames: the old folder is there again."""
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        old.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def replace(folder: Path, new: Path) -> None:
    """Puts a sealed folder in the place of an older one, which is whole until then."""
    old = folder.with_name(f".{folder.name}.old")
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


# Attempts -------------------------------------------------------------------------------------------------------------
def read_options(options: list[str], reads: list[Path]) -> dict[str, str]:
    """The options by name, without those that change no result; an input or a file by what it holds, not its place."""
    found, name = {}, "arguments"
    for word in options:
        if word.startswith("--"):
            name, _, word = word[2:].replace("-", "_").partition("=")
            found[name] = []
        if word:
            found.setdefault(name, []).append(word)
    inputs = {str(path) for path in reads}
    described = {}
    for name, values in found.items():
        if name in FREE or set(values) & inputs:
            continue
        files = [value for value in values if os.path.isfile(value)]  # noqa: PTH113  a prompt may be long
        described[name] = " ".join(
            f"{Path(value).name} ({sha256(Path(value))[:12]})" if value in files else value for value in values
        )
    return described


def describe_step(script: Path, options: list[str], inputs: dict[Path, str]) -> dict:
    """What makes an attempt the same as another: script, options, inputs by their sums, packages."""
    packages = {}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            packages[name] = version(name)
    return {
        "script": {script.name: sha256(script)[:12]},
        "options": read_options(options, list(inputs)),
        "inputs": {path.name: digest[:12] for path, digest in inputs.items()},
        "packages": packages,
    }


def describe_machine(script: Path) -> dict:
    """The accelerator, and the git commit of the folder of the script where it has one."""
    git = ["git", "-C", str(script.resolve().parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    accelerator = None
    if torch := sys.modules.get("torch"):
        cpu = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
        accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu
    return {"accelerator": accelerator, "git_commit": commit or None}


def find_differences(step: dict, other: dict) -> list[str]:
    differences = []
    for kind in ("script", "options", "inputs", "packages"):
        new, old = step[kind], other.get(kind, {})
        for name in sorted(new.keys() | old.keys()):
            if new.get(name) != old.get(name):
                label = f"--{name}" if kind == "options" else name
                differences.append(f"{label} {new.get(name, 'left out')} instead of {old.get(name, 'none')}")
    return differences


def list_checkpoints(folder: Path) -> list[Path]:
    """Folders of the checkpoints, the newest first."""
    found = [path for path in folder.rglob("checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[11:]))


def take_up(part: Path, step: dict, restart: bool) -> Path | None:
    """The newest whole checkpoint of an interrupted attempt; stops where another attempt has one that would be lost.
    Where there is none, the folder is made anew.
    """
    sealed = [path for path in list_checkpoints(part) if (path / SUMS).is_file()]
    if restart or not sealed:  # one that was never sealed was being written
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_json(part / "step.json", step | {"started": datetime.now().astimezone().isoformat()})
        return None
    for whole in sealed:
        if not (damage := find_damage(whole)):
            break
        print(f"{damage}. This checkpoint is left out.")
    else:
        fail("no checkpoint is whole. Bring what is damaged back, or begin anew: --restart (make: RESTART=1)")
    if differences := find_differences(step, read_record(part, "step.json")):
        fail(
            f"a run was interrupted after {whole}, and this is another one: {'; '.join(differences)}.\n"
            "Give what it had to go on with it; or begin this one, and lose that: --restart (make: RESTART=1)"
        )
    for path in list_checkpoints(part):
        if int(path.name[11:]) > int(whole.name[11:]):
            shutil.rmtree(path)
    print(f"Going on from {whole}", flush=True)
    return whole
