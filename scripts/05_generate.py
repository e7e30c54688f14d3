# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "huggingface-hub==2.4.0",
#     "python-dotenv==1.2.4",
# ]
# tool.uv.index = [{ name = "pytorch", url = "https://download.pytorch.org/whl/cpu", explicit = true }]
# tool.uv.sources.torch = { index = "pytorch" }
# ///
"""Answer prompts with a base model, a LoRA adapter on its base model, or a fully tuned model.

    python 05_generate.py --model_name_or_path out/adapter --prompt "What is LoRA?"

Reads   a hub id or a folder; what has an adapter_config.json is an adapter, and its base model is the one named there,
        or --base_model.
Writes  the answers to the terminal, as they come for a single prompt; with --output FILE also as JSON lines.
"""

import contextlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below

import torch
from huggingface_hub import errors, hf_hub_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TextStreamer, set_seed
from transformers.models.auto.tokenization_auto import get_tokenizer_config

DTYPE = "auto" if torch.accelerator.is_available() else "float32"  # auto: as the model is stored


@dataclass
class Arguments:
    model_name_or_path: str = field(default="meta-llama/Llama-2-7b-chat-hf", metadata={"help": "Hub id or folder."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapter, if not the one it names."})
    prompt: list[str] = field(default_factory=list, metadata={"help": "May be repeated.", "action": "extend"})
    prompts_file: str | None = field(default=None, metadata={"help": "File with a prompt on each line."})
    chat: bool = field(default=False, metadata={"help": "Keep a conversation on the terminal."})
    raw: bool = field(default=False, metadata={"help": "Continue the prompt as it stands, without chat template."})
    max_new_tokens: int = field(default=256, metadata={"help": "The most tokens to generate for a prompt."})
    do_sample: bool = field(default=False, metadata={"help": "Draw tokens at random instead of taking the likeliest."})
    temperature: float = field(default=0.7, metadata={"help": "With --do_sample: below 1 sharper, above 1 flatter."})
    top_p: float = field(default=0.95, metadata={"help": "With --do_sample: share of the probability kept."})
    seed: int = field(default=42, metadata={"help": "Seed of --do_sample."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default=DTYPE, metadata={"help": "Of weights."})
    output: str | None = field(default=None, metadata={"help": "File for the answers, one JSON object a line."})


def find_config(name: str, revision: str = "main") -> Path:
    """adapter_config.json of an adapter, config.json of a model; each is a hub id or a folder."""
    for file in ("adapter_config.json", "config.json"):
        try:
            in_folder = Path(name, file) if Path(name).is_dir() and Path(name, file).resolve(strict=True) else None
            return in_folder or Path(hf_hub_download(name, file, revision=revision))
        except errors.GatedRepoError:
            steps = "make a token at https://huggingface.co/settings/tokens, put HF_TOKEN=<token> into .env"
            sys.exit(f"error: {name} is gated. Three steps: ask for access at https://huggingface.co/{name}, {steps}.")
        except Exception as error:  # no such file there, no such id, no network
            reason = " ".join(str(error).split())[:200]
    sys.exit(f"error: no model at {name!r}, a folder or a hub id: {reason}")


def load_model(name: str, base_model: str | None, dtype: str, merge: bool = False):
    """Model, on the accelerator if there is one, and tokenizer of a model or an adapter, in memory merged or not."""
    config, revision, base = find_config(name), "main", name
    if config.name == "adapter_config.json":
        adapter = json.loads(config.read_text(encoding="utf-8"))
        base = base_model or adapter["base_model_name_or_path"]
        revision = "main" if base_model else adapter.get("revision") or "main"
        find_config(base, revision)
    device = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    safe = {"use_safetensors": True, "trust_remote_code": False}  # else the library asks whether to run its code
    safe["device_map"] = None if device == "cpu" else device
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=dtype, **safe)
    source, of = (name, "main") if get_tokenizer_config(name) else (base, revision)
    inputs = ["input_ids", "attention_mask"]  # no token_type_ids
    tokenizer = AutoTokenizer.from_pretrained(source, revision=of, trust_remote_code=False, model_input_names=inputs)
    tokenizer.pad_token, tokenizer.padding_side = tokenizer.eos_token, "left"
    ends = model.generation_config.eos_token_id  # one, several or none
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config.eos_token_id = sorted(ends)  # also the one that was trained
    if base != name:  # in the type of its base, as autocast takes it in a training
        model = PeftModel.from_pretrained(model, name, autocast_adapter_dtype=False)
        # A sum in 16 bits would round away what a short training learned
        if merge and model.dtype == torch.float32 and hasattr(model, "merge_and_unload"):
            model = model.merge_and_unload()
    return model.eval(), tokenizer


@torch.inference_mode()
def generate(model, tokenizer, prompts: list, raw: bool, tools: list | None = None, **options) -> list[str]:
    """Answers to the prompts (texts, or conversations as lists of messages), generated as one batch."""
    if not raw:  # a chat template writes the special tokens itself
        chats = [[{"role": "user", "content": text}] if isinstance(text, str) else text for text in prompts]
        prompts = tokenizer.apply_chat_template(chats, tools=tools, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=raw).to(model.device)
    if not options["do_sample"]:
        options |= {"temperature": None, "top_p": None, "top_k": None}  # some models bring sampling settings along
    outputs = model.generate(**inputs, pad_token_id=tokenizer.pad_token_id, **options)
    return tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def chat(model, tokenizer, **options) -> None:
    """Keeps a conversation on the terminal; its oldest turns are dropped when it no longer fits the model's context."""
    messages = []
    print("Type a message; /new begins another conversation, an empty line or Ctrl-D ends it.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while text := input("\n> ").strip():
            if text == "/new":
                messages = []
                continue
            messages.append({"role": "user", "content": text})
            room = model.config.get_text_config().max_position_embeddings - options["max_new_tokens"]
            while len(messages) > 1 and len(tokenizer.apply_chat_template(messages, return_dict=False)) > room:
                del messages[:2]
            (answer,) = generate(model, tokenizer, [messages], False, **options)
            messages.append({"role": "assistant", "content": answer})


def main() -> None:
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    text = Path(args.prompts_file).read_text(encoding="utf-8-sig") if args.prompts_file else ""
    prompts = args.prompt + [line for line in text.splitlines() if line.strip()]
    if not (prompts or args.chat):
        sys.exit('error: no prompt. Give --prompt "What is LoRA?", --prompts_file FILE or --chat.')
    merge = torch.accelerator.is_available()  # where a token waits for each product to begin, also for the adapter's
    model, tokenizer = load_model(args.model_name_or_path, args.base_model, args.dtype, merge)
    if not (args.raw or tokenizer.chat_template):
        sys.exit(f"error: {args.model_name_or_path!r} has no chat template. Add --raw to continue the prompt.")

    # A single prompt streams; several go through the model as one batch
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": args.do_sample}
    if args.do_sample:
        set_seed(args.seed)
        options |= {"temperature": args.temperature, "top_p": args.top_p}
    if len(prompts) == 1 or args.chat:
        options["streamer"] = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    if args.chat:
        chat(model, tokenizer, **options)
        return
    lines = []
    for prompt, answer in zip(prompts, generate(model, tokenizer, prompts, args.raw, **options), strict=True):
        if len(prompts) > 1:
            print(f"> {prompt}\n{answer.strip()}\n")
        lines.append(json.dumps({"prompt": prompt, "answer": answer, "model": args.model_name_or_path}) + "\n")
    if args.output:
        Path(args.output).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
