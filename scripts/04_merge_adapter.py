# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "python-dotenv==1.2.4",
# ]
# ///
"""Merge a LoRA adapter into its base model and save a model that needs neither of them.

    python 04_merge_adapter.py --model_name_or_path out/adapter --output_dir merged

Reads   a folder with an adapter_config.json; its base model is the one named there, or --base_model.
Writes  merged/model/ (weights, config, tokenizer) and, when all is done, merged/run.json.

The merge is done in float32, and checked against the adapter on its base: on the greedy answers to --prompts, which
must come out the same, and on their logits. What was saved is read back, and its logits must be within the tolerance of
the type it was saved in. Otherwise nothing is kept.

An adapter that was trained on quantized weights (QLoRA) is merged into those of full precision. The answers that it
gives there are measured on the quantized weights too; run.json has the difference.
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
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal, TextIO

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below
if not {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_RANK"} & os.environ.keys():
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # one accelerator

gc.disable()  # until all is imported: looking for garbage is a quarter of that time
from transformers import HfArgumentParser

PACKAGES = ("torch", "transformers", "peft", "accelerate")  # noted in run.json
PROMPTS = ["What is a large language model?", "What is LoRA?", "Name three colors.", "Write one line of Python."]
# How far a logit may be off, as a share of the spread (standard deviation) of all. float32 rounds the sum of base and
# adapter in another order, seen: 2e-5. The shorter types round each weight and sum, seen: 0.02 and 0.13. The base alone
# is 4.6 off, an adapter at half its strength 2.8, at 97 % 0.12.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(default="results/adapter", metadata={"help": "Folder of the adapter."})
    base_model: str | None = field(
        default=None, metadata={"help": "Base model of the adapter, if not the one its adapter_config.json names."}
    )
    output_dir: str = field(default="merged", metadata={"help": "Folder for model/ and run.json."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the weights that are saved."}
    )
    max_shard_size: str = field(default="5GB", metadata={"help": "The largest file of weights; more are split."})
    prompts: list[str] = field(default_factory=lambda: PROMPTS, metadata={"help": "Prompts of the check."})
    max_new_tokens: int = field(default=48, metadata={"help": "The most tokens of an answer of the check."})


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

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

gc.freeze()
gc.enable()


def check_positive(args, *names: str) -> None:
    """Stops where an option is not a number above 0."""
    for name in names:
        value = getattr(args, name)
        if name == "max_length" and value is None:  # any length
            continue
        if not isinstance(value, int | float) or not value > 0:
            fail(f"--{name} is {value!r}. Give a number above 0.")


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


def read_json(file: Path) -> dict:
    """Content of a JSON file; stops where it is cut off or not JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        fail(f"{file} is damaged: {error}. Bring it back, or remove it and make it anew.")


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


def find_base(name: str, base_model: str | None) -> tuple[str, str | None]:
    """Base model (hub id or folder) and revision of an adapter, base_model if given; of a model, the model itself."""
    folder = Path(name)
    check_files(folder)
    if (folder / "adapter_config.json").is_file():
        if not (folder / "adapter_model.safetensors").is_file():
            fail(f"{name!r} has no adapter_model.safetensors. Train it again: 02_train_lora.py")
        config = read_json(folder / "adapter_config.json")
        base, revision = base_model or config.get("base_model_name_or_path") or "?", config.get("revision")
        if base_model:
            revision = None
        if not (Path(base, "config.json").is_file() or is_hub_id(base)):
            fail(f"the adapter {name!r} needs its base model, and {base!r} is not there. Give it with --base_model.")
        check_files(Path(base))
        notes = [file for file in (folder.parent / "run.json", Path(base, "run.json")) if file.is_file()]
        origins = [read_json(note).get("base_model") for note in notes]
        pins = [[origin.get(key) for key in ("name", "revision", "sha256")] for origin in origins if origin]
        if len(pins) == 2 and pins[0] != pins[1]:
            fail(f"the adapter {name!r} was trained on {origins[0]}, and {base!r} is {origins[1]}. Train it again.")
        return base, revision
    if not ((folder / "config.json").is_file() or is_hub_id(name)):
        fail(f"no model at {name!r}. Give a hub id (user/name) or a folder with a config.json or adapter_config.json.")
    return name, None


def check_loaded(name: str, model, tokenizer, missing: set[str]) -> None:
    """Stops where a model is of another kind, where weights of it are missing (they would be random), or EOS is."""
    kinds = model.config.architectures or [type(model).__name__]
    if type(model).__name__ not in kinds:
        fail(f"{name!r} is a {kinds[0]}, not a causal language model. Give another model.")
    if missing:
        fail(f"{name!r} lacks {len(missing)} weights, {min(missing)} among them. Save or fetch the model again.")
    if not tokenizer.eos_token:
        fail(f"the tokenizer of {name!r} has no EOS token. Name one as eos_token in its tokenizer_config.json.")


def load_model(name: str, base_model: str | None, dtype: str):
    """Model, ready to infer on the accelerator if there is one, and tokenizer of a hub id, model or adapter folder."""
    base, revision = find_base(name, base_model)
    try:
        source = name if Path(name, "tokenizer_config.json").is_file() else base
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        model, loading = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, revision=revision or "main", use_safetensors=True, trust_remote_code=False,
            output_loading_info=True,
        )  # fmt: skip
        check_loaded(base, model, tokenizer, loading["missing_keys"])
        if base != name:
            model = PeftModel.from_pretrained(model, name)
    except Exception as error:  # each kind of file raises its own
        if "size mismatch" in str(error):
            fail(f"the adapter {name!r} does not fit {base!r}: the shapes differ. Give its own base with --base_model.")
        fail(f"cannot load {name!r} (base model {base!r}): {' '.join(str(error).split())[:300]}")
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    device = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    return model.to(device).eval(), tokenizer


@torch.inference_mode()
def answer_prompts(model, tokenizer, prompts: list[str], max_new_tokens: int) -> list[tuple[torch.Tensor, int]]:
    """Token ids of each prompt with its greedy answer, on the CPU, and where the answer begins."""
    rows = []
    for prompt in prompts:
        if tokenizer.chat_template:
            messages = [{"role": "user", "content": prompt}]
            prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        greedy |= {"max_new_tokens": max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
        row = model.generate(**inputs.to(model.device), **greedy)[0].cpu()
        rows.append((row, inputs["input_ids"].shape[1]))
    return rows


@torch.inference_mode()
def compute_logits(model, rows: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Logits that choose each token of the answers: [tokens, vocabulary], float32, on the CPU."""
    logits = [model(row[None].to(model.device)).logits[0, start - 1 : -1].float().cpu() for row, start in rows]
    return torch.cat(logits)


def check(what: str, expected: torch.Tensor, found: torch.Tensor, dtype: str) -> dict:
    """Stops where the logits differ by more than the tolerance, or in float32 where another token would be chosen."""
    difference = ((expected - found).abs().max() / expected.std()).item()
    same, tokens = (expected.argmax(-1) == found.argmax(-1)).sum().item(), len(expected)
    print(
        f"{what} in {dtype}: {same} of {tokens} tokens of the adapter's answers are chosen again; the logits differ by "
        f"at most {difference:.2g} of their spread (tolerance {TOLERANCE[dtype]:g})"
    )
    if not difference <= TOLERANCE[dtype] or (dtype == "float32" and same < tokens):
        fail("the merged model is not what the adapter is on its base; it is not kept. Use the adapter: 05_generate.py")
    return {"largest_difference": difference, "tolerance": TOLERANCE[dtype], "tokens": tokens, "same_tokens": same}


def compare_with_quantized(
    name: str, base: str, revision: str | None, training: dict, rows: list, logits
) -> dict | None:
    """The adapter on the quantized weights that it was trained on, against logits, the same on those of full precision:
    tokens of the answers that both choose, mean loss on them (nats per token), mean difference of log-probabilities.
    """
    try:
        from bitsandbytes.nn import Linear4bit  # only adapters of quantized weights need it

        quantization = BitsAndBytesConfig(**training["quantization"])
        dtype = training["arguments"]["dtype"]
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, revision=revision or "main", use_safetensors=True, trust_remote_code=False,
            quantization_config=quantization,
        )  # fmt: skip
        model = PeftModel.from_pretrained(model, name).eval()
    except Exception as error:  # no package, or one without a library for this machine; the merge does not need it
        reason = " ".join(str(error).split())[:300]
        print(f"cannot quantize {base!r} as for the training, so the difference is not measured: {reason}")
        return None
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            layer.support_avx512bf16_for_cpu = False  # it would compute in bfloat16 whatever the training did
    chosen = torch.cat([row[start:] for row, start in rows])[:, None]
    quantized, full = (each.log_softmax(-1) for each in (compute_logits(model, rows), logits))
    found = {
        "tokens": len(chosen),
        "same_tokens": (quantized.argmax(-1) == full.argmax(-1)).sum().item(),
        "loss_quantized": -quantized.gather(1, chosen).mean().item(),
        "loss_full_precision": -full.gather(1, chosen).mean().item(),
        "mean_difference": (quantized - full).gather(1, chosen).abs().mean().item(),
    }
    print(
        f"on the quantized weights: {found['same_tokens']} of {len(chosen)} tokens of these answers are chosen again; "
        f"their loss is {found['loss_quantized']:.4f} instead of {found['loss_full_precision']:.4f}, "
        f"their log-probabilities differ by {found['mean_difference']:.4f} in the mean"
    )
    return found


def describe_machine() -> dict:
    """Versions of the packages, the accelerator, and the git commit of the folder of this script where it has one."""
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    cpu = f"CPU, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "packages": {name: version(name) for name in PACKAGES},
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "git_commit": commit or None,
    }


def main() -> None:
    args = parse_arguments()
    check_positive(args, "max_new_tokens")
    if not re.fullmatch(r"[0-9.]+[KMGT]B", args.max_shard_size):
        fail(f"--max_shard_size {args.max_shard_size} is not a size. Give one like 5GB or 500MB.")
    name, folder, output_dir = args.model_name_or_path, Path(args.model_name_or_path), Path(args.output_dir)
    if not (folder / "adapter_config.json").is_file():
        if (folder / "config.json").is_file():
            fail(f"{name!r} is a whole model, there is nothing to merge. Use it as it is, or give an adapter's folder.")
        fail(f"no adapter at {name!r}. Give a folder with an adapter_config.json, or train one: 02_train_lora.py")
    if output_dir.resolve() == folder.resolve().parent:
        fail(f"{output_dir} holds the record of the adapter's training. Give another --output_dir.")
    base, revision = find_base(name, args.base_model)
    adapter_sha256 = sha256(folder / "adapter_model.safetensors")
    held = lock(output_dir)  # noqa: F841  until the end of main
    try:
        config = AutoConfig.from_pretrained(base, revision=revision or "main", trust_remote_code=False)
    except Exception as error:  # each kind of file raises its own
        fail(f"cannot load the config of {base!r}: {' '.join(str(error).split())[:300]}")
    if getattr(config, "quantization_config", None):
        fail(
            f"the base model {base!r} is quantized: its few bits would round the adapter away. "
            "Merge into the model it was quantized from: --base_model MODEL"
        )
    note = folder.parent / "run.json"
    training = read_json(note) if note.is_file() else {}
    if training.get("quantization"):
        print("The adapter was trained on quantized weights. It is merged into those of full precision.")

    # What the adapter answers on its base model
    model, tokenizer = load_model(name, args.base_model, "float32")
    rows = answer_prompts(model, tokenizer, args.prompts, args.max_new_tokens)
    expected = compute_logits(model, rows)
    quantized = None
    if training.get("quantization"):
        quantized = compare_with_quantized(name, base, revision, training, rows, expected)

    # Merge in float32; save in the type asked for, beside what is there, and read it back
    temporary = output_dir / "model.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        model = model.merge_and_unload(safe_merge=True)
        needed = sum(value.numel() for value in model.parameters()) * getattr(torch, args.dtype).itemsize
        if (free := shutil.disk_usage(output_dir).free) < needed + 2**25:
            fail(f"the model takes {needed / 1e9:.2f} GB, {free / 1e9:.2f} are free in {output_dir}. Make room for it.")
        check("merged", expected, compute_logits(model, rows), "float32")
        model.to(getattr(torch, args.dtype)).save_pretrained(temporary, max_shard_size=args.max_shard_size)
        source = name if (folder / "tokenizer_config.json").is_file() else base
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)  # not as load_model sets it
        tokenizer.save_pretrained(temporary)
        del model  # before the next one is loaded
        saved, _ = load_model(str(temporary), None, args.dtype)
        checked = check("saved", expected, compute_logits(saved, rows), args.dtype)
        sums = seal(temporary)
    except Exception as error:  # a full disk: each library raises its own
        shutil.rmtree(temporary, ignore_errors=True)
        fail(f"cannot save the model: {' '.join(str(error).split())[:300]}. Make room, and type the command again.")
    except SystemExit:  # the check
        shutil.rmtree(temporary, ignore_errors=True)
        raise

    if sha256(folder / "adapter_model.safetensors") != adapter_sha256:
        shutil.rmtree(temporary)
        fail(f"a training wrote another adapter to {name} meanwhile. Type the same command again.")

    # Put all in the place of the last result; run.json is there only when the rest is
    run = {
        "script": Path(__file__).name,
        "base_model": training.get("base_model") or {"name": base, "revision": revision},
        "dataset": training.get("dataset"),
        "adapter": {"name": name, "sha256": adapter_sha256},
        "training": {key: value for key, value in training.items() if key not in ("base_model", "dataset", "history")},
        "arguments": asdict(args),
        **describe_machine(),
        "check": checked,
        "quantized_base": quantized,
        "metrics": {"size_bytes": sum(file.stat().st_size for file in temporary.iterdir())},
        "sha256": {name: digest for name, digest in sums.items() if name.endswith(".safetensors")},
    }
    (output_dir / "run.json").unlink(missing_ok=True)
    replace(output_dir / "model", temporary)
    write_json(output_dir / "run.json", run)
    print(f"The merged model is in {output_dir / 'model'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
