# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "python-dotenv==1.2.4",
# ]
# ///
"""Answer prompts through transformers' pipeline, with a base, fully tuned or merged model, or an adapter.

    python 06_pipeline_infer.py --model_name_or_path out/adapter --prompt "What is LoRA?"

Reads   a hub id or a folder; a folder with an adapter_config.json is an adapter, and its base model is the one
        named there, or --base_model.
Writes  the answers to the terminal; with --output FILE also as JSON lines.

The model's chat template is applied unless --raw. Decoding is greedy. 05_generate.py does the same without the
pipeline, and more.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below
if not {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_RANK"} & os.environ.keys():
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # one accelerator

gc.disable()  # until all is imported: looking for garbage is a quarter of that time
from transformers import HfArgumentParser


@dataclass
class ScriptArguments:
    model_name_or_path: str = field(
        default="meta-llama/Llama-2-7b-chat-hf", metadata={"help": "Hub id or folder of a model or an adapter."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Base model of the adapter, if not the one its adapter_config.json names."}
    )
    prompt: list[str] = field(
        default_factory=lambda: ["What is a large language model?"], metadata={"help": "One or more prompts."}
    )
    raw: bool = field(default=False, metadata={"help": "Continue the prompt as it stands, without chat template."})
    max_new_tokens: int = field(default=256, metadata={"help": "The most tokens to generate for a prompt."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the weights."}
    )
    output: str | None = field(default=None, metadata={"help": "File for the answers, one JSON object a line."})


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
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

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


def sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**22):
            digest.update(block)
    return digest.hexdigest()


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


def write_text(file: Path, text: str) -> None:
    """Writes the file whole or not at all, and sees that it is on the disk."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_answers(file: Path, prompts: list[str], answers: list[str], model: str) -> None:
    """Writes a JSON object a line."""
    rows = [{"prompt": p, "answer": a, "model": model} for p, a in zip(prompts, answers, strict=True)]
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def main() -> None:
    args = parse_arguments()
    check_positive(args, "max_new_tokens")
    if args.output and Path(args.output).is_dir():
        fail(f"--output {args.output} is a folder. Give a file, such as {args.output}/answers.jsonl")
    name = args.model_name_or_path
    model, tokenizer = load_model(name, args.base_model, args.dtype)
    if not (args.raw or tokenizer.chat_template):
        fail(f"the tokenizer of {name!r} has no chat template. Add --raw to continue the prompt.")

    # Set the pipeline; it takes a hub id or a folder too, an adapter's with the newest revision of its base
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, device=model.device)

    # Generate tokens; a conversation goes through the chat template, a text as it stands
    inputs = args.prompt if args.raw else [[{"role": "user", "content": prompt}] for prompt in args.prompt]
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    try:
        outputs = pipe(inputs, max_new_tokens=args.max_new_tokens, return_full_text=False, **greedy)
    except Exception as error:  # each chat template raises its own
        fail(f"cannot answer: {' '.join(str(error).split())[:300]} See --help, or add --raw for no chat template.")
    answers = [output[0]["generated_text"] for output in outputs]
    for answer in answers:
        print(answer)
    if args.output:
        write_answers(Path(args.output), args.prompt, answers, name)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
