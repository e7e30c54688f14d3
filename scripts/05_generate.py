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
"""Answer prompts with a base model, a LoRA adapter on its base model, or a fully tuned model.

    python 05_generate.py --model_name_or_path out/adapter --prompt "What is LoRA?"

Reads   a hub id or a folder; a folder with an adapter_config.json is an adapter, and its base model is the one
        named there, or --base_model.
Writes  the answers to the terminal, as they come for a single prompt; with --output FILE also as JSON lines.

The model's chat template is applied unless --raw. Decoding is greedy unless --do_sample.
"""

import argparse
import contextlib
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
        default_factory=list, metadata={"help": "One or more prompts; may be repeated.", "action": "extend"}
    )
    prompts_file: str | None = field(default=None, metadata={"help": "File with a prompt on each line."})
    chat: bool = field(default=False, metadata={"help": "Keep a conversation on the terminal."})
    raw: bool = field(default=False, metadata={"help": "Continue the prompt as it stands, without chat template."})
    max_new_tokens: int = field(default=256, metadata={"help": "The most tokens to generate for a prompt."})
    do_sample: bool = field(default=False, metadata={"help": "Draw tokens at random instead of taking the likeliest."})
    temperature: float = field(default=0.7, metadata={"help": "With --do_sample: below 1 sharper, above 1 flatter."})
    top_p: float = field(default=0.95, metadata={"help": "With --do_sample: share of the probability kept."})
    seed: int = field(default=42, metadata={"help": "Seed of --do_sample."})
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
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, set_seed

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


@torch.inference_mode()
def generate(model, tokenizer, prompts: list, raw: bool, **options) -> list[str]:
    """Answers to the prompts (texts, or conversations as lists of messages), generated as one batch."""
    texts = prompts
    if not raw:
        chats = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
        texts = tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
    # A chat template writes the special tokens itself.
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=raw).to(model.device)
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}  # some models bring sampling settings along
    outputs = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **options)
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(model, tokenizer, **options) -> None:
    """Keeps a conversation on the terminal; its oldest turns are dropped when it no longer fits the model's context."""
    import readline  # noqa: F401  input() then edits lines

    messages = []
    print("Type a message; /new begins another conversation, an empty line or Ctrl-D ends it.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := input("\n> ").strip():
            if text == "/new":
                messages = []
                continue
            messages.append({"role": "user", "content": text})
            room = model.config.max_position_embeddings - options["max_new_tokens"]
            while len(messages) > 1 and len(tokenizer.apply_chat_template(messages, return_dict=False)) > room:
                del messages[:2]
            (answer,) = generate(model, tokenizer, [messages], False, **options)
            messages.append({"role": "assistant", "content": answer})


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
    check_positive(args, "max_new_tokens", "temperature", "top_p")
    if args.top_p > 1:
        fail(f"--top_p is {args.top_p}. Give a share of the probability, above 0 and up to 1.")
    if args.output and Path(args.output).is_dir():
        fail(f"--output {args.output} is a folder. Give a file, such as {args.output}/answers.jsonl")
    prompts = list(args.prompt)
    if args.prompts_file:
        if not Path(args.prompts_file).is_file():
            fail(f"no file {args.prompts_file!r}. Give a text file with a prompt on each line.")
        try:
            lines = Path(args.prompts_file).read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            fail(f"{args.prompts_file} is not UTF-8 text: {error}. Give a text file with a prompt on each line.")
        prompts += [line for line in lines if line.strip()]
    if args.chat and (prompts or args.raw or args.output):
        fail("--chat goes without --prompt, --prompts_file, --raw and --output. Leave them out, or leave out --chat.")
    if not (prompts or args.chat):
        fail('no prompt. Give --prompt "What is LoRA?", --prompts_file FILE or --chat.')

    model, tokenizer = load_model(args.model_name_or_path, args.base_model, args.dtype)
    if not (args.raw or tokenizer.chat_template):
        fail(f"the tokenizer of {args.model_name_or_path!r} has no chat template. Add --raw to continue the prompt.")
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample}
    if args.do_sample:
        options |= {"temperature": args.temperature, "top_p": args.top_p}

    # A single prompt streams; several go through the model as one batch
    if len(prompts) == 1 or args.chat:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    try:
        if args.do_sample:
            set_seed(args.seed)
        if args.chat:
            chat(model, tokenizer, **options)
            return
        answers = generate(model, tokenizer, prompts, args.raw, **options)
    except Exception as error:  # of an option, of the chat template: each raises its own
        fail(f"cannot answer: {' '.join(str(error).split())[:300]} See --help, or add --raw for no chat template.")
    if len(prompts) > 1:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"> {prompt}\n{answer.strip()}\n")
    if args.output:
        write_answers(Path(args.output), prompts, answers, args.model_name_or_path)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
