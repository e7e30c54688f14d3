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
"""Answer prompts through transformers' pipeline, with a base, fully tuned or merged model, or an adapter.

    python 06_pipeline_infer.py --model_name_or_path out/adapter --prompt "What is LoRA?"

Reads   a hub id or a folder; what has an adapter_config.json is an adapter, and its base model is the one named there,
        or --base_model.
Writes  the answers to the terminal; with --output FILE also as JSON lines.
"""

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
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, pipeline
from transformers.models.auto.tokenization_auto import get_tokenizer_config

DTYPE = "auto" if torch.accelerator.is_available() else "float32"  # auto: as the model is stored


@dataclass
class Arguments:
    model_name_or_path: str = field(default="meta-llama/Llama-2-7b-chat-hf", metadata={"help": "Hub id or folder."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapter, if not the one it names."})
    prompt: list[str] = field(default_factory=lambda: ["What is a large language model?"])
    raw: bool = field(default=False, metadata={"help": "Continue the prompt as it stands, without chat template."})
    max_new_tokens: int = field(default=256, metadata={"help": "The most tokens to generate for a prompt."})
    output: str | None = field(default=None, metadata={"help": "File for the answers, one JSON object a line."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(default=DTYPE, metadata={"help": "Of weights."})


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


def main() -> None:
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    name, config = args.model_name_or_path, find_config(args.model_name_or_path)
    adapter = json.loads(config.read_text(encoding="utf-8")) if config.name == "adapter_config.json" else {}
    base = (args.base_model or adapter["base_model_name_or_path"]) if adapter else name
    revision = (None if args.base_model else adapter.get("revision")) or "main"
    find_config(base, revision)
    source, of = (name, "main") if get_tokenizer_config(name) else (base, revision)

    # Set the pipeline; the tutorial gives it the name of a model alone
    safe = {"use_safetensors": True, "trust_remote_code": False}  # else the library asks whether to run its code
    model = AutoModelForCausalLM.from_pretrained(base, revision=revision, dtype=args.dtype, **safe)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=of, trust_remote_code=False)
    ends = model.generation_config.eos_token_id  # one, several or none
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config.eos_token_id = sorted(ends)  # also the one that was trained
    model = PeftModel.from_pretrained(model, name, autocast_adapter_dtype=False) if adapter else model
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    if not (args.raw or pipe.tokenizer.chat_template):
        sys.exit(f"error: {name!r} has no chat template. Add --raw to continue the prompt.")

    # Generate tokens; a conversation goes through the chat template, a text as it stands
    inputs = args.prompt if args.raw else [[{"role": "user", "content": prompt}] for prompt in args.prompt]
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    outputs = pipe(inputs, max_new_tokens=args.max_new_tokens, return_full_text=False, **greedy)
    rows = [{"prompt": prompt, "model": name} for prompt in args.prompt]
    for row, output in zip(rows, outputs, strict=True):
        row["answer"] = output[0]["generated_text"]
        print(row["answer"])
    if args.output:
        Path(args.output).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
