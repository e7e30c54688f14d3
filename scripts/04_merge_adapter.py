# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "peft==0.21.2",
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "huggingface-hub==2.4.0",
#     "python-dotenv==1.2.4",
# ]
# tool.uv.index = [{ name = "pytorch", url = "https://download.pytorch.org/whl/cpu", explicit = true }]
# tool.uv.sources.torch = { index = "pytorch" }
# ///
"""Merge a LoRA adapter into its base model and save a model that needs neither of them.

    python 04_merge_adapter.py --model_name_or_path out/adapter --output_dir merged

Reads   an adapter (hub id or folder); its base model is the one it names, or --base_model.
Writes  merged/model/ (weights, config, tokenizer) and merged/run.json.
The merge is done in float32, and checked against the adapter on its base: the greedy answers to --prompts must come out
the same, and their logits, also of what was saved and is read back, within the tolerance of its type. An adapter that
was trained on quantized weights (QLoRA) is merged into those of full precision; the difference is measured.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below

import torch
from huggingface_hub import errors, hf_hub_download
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, HfArgumentParser
from transformers.models.auto.tokenization_auto import get_tokenizer_config

PROMPTS = ["What is a large language model?", "What is LoRA?", "Name three colors.", "Write one line of Python."]
# How far a logit may be off, as a share of the spread of all. Seen: 2e-5, 0.02, 0.13; with half of the adapter 2.8.
TOLERANCE = {"float32": 1e-3, "float16": 0.1, "bfloat16": 0.5}


@dataclass
class Arguments:
    model_name_or_path: str = field(default="results/adapter", metadata={"help": "The adapter: hub id or folder."})
    base_model: str | None = field(default=None, metadata={"help": "Base of the adapter, if not the one it names."})
    output_dir: str = field(default="merged", metadata={"help": "Folder for model/ and run.json."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(default="float32", metadata={"help": "Of what is saved."})
    prompts: list[str] = field(default_factory=lambda: PROMPTS, metadata={"help": "Prompts of the check."})
    max_new_tokens: int = field(default=48, metadata={"help": "The most tokens of an answer of the check."})


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


def load_model(name: str, revision: str, dtype: str = "float32", quantization: BitsAndBytesConfig | None = None):
    """A model on the accelerator, if there is one."""
    device = "cuda:0" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    options = {"device_map": device} if quantization is None else {"quantization_config": quantization}
    options |= {"use_safetensors": True, "trust_remote_code": False}  # else the library asks whether to run its code
    model = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, **options)
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False  # 4-bit layers would compute in bfloat16 whatever the training did
    return model.eval()


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
        row = model.generate(**inputs.to(model.device), max_new_tokens=max_new_tokens, **greedy)[0].cpu()
        rows.append((row, inputs["input_ids"].shape[1]))
    return rows


@torch.inference_mode()
def compute_logits(model, rows: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """Logits that choose each token of the answers: [tokens, vocabulary], float32, on the CPU."""
    return torch.cat([model(row[None].to(model.device)).logits[0, start - 1 : -1].float().cpu() for row, start in rows])


def check(what: str, expected: torch.Tensor, found: torch.Tensor, dtype: str) -> dict:
    """Stops where the logits differ by more than the tolerance, or in float32 where another token would be chosen."""
    difference = ((expected - found).abs().max() / expected.std()).item()
    same, tokens = (expected.argmax(-1) == found.argmax(-1)).sum().item(), len(expected)
    print(
        f"{what} in {dtype}: {same} of {tokens} tokens of the adapter's answers are chosen again; the logits differ by "
        f"at most {difference:.2g} of their spread (tolerance {TOLERANCE[dtype]:g})"
    )
    if not difference <= TOLERANCE[dtype] or (dtype == "float32" and same < tokens):
        sys.exit("error: the merged model is not what the adapter is on its base. Use the adapter: 05_generate.py")
    return {"largest_difference": difference, "tolerance": TOLERANCE[dtype], "tokens": tokens, "same_tokens": same}


def compare_with_quantized(model, rows: list, expected: torch.Tensor) -> dict:
    """The adapter on quantized weights against its logits on those of full precision: choices, nats per token."""
    chosen = torch.cat([row[start:] for row, start in rows])[:, None]
    quantized, full = (logits.log_softmax(-1) for logits in (compute_logits(model, rows), expected))
    return {
        "tokens": len(chosen),
        "same_tokens": (quantized.argmax(-1) == full.argmax(-1)).sum().item(),
        "loss_quantized": -quantized.gather(1, chosen).mean().item(),
        "loss_full_precision": -full.gather(1, chosen).mean().item(),
        "mean_difference": (quantized - full).gather(1, chosen).abs().mean().item(),
    }


def main() -> None:
    (args,) = HfArgumentParser(Arguments, allow_abbrev=False).parse_args_into_dataclasses()
    name, output_dir = args.model_name_or_path, Path(args.output_dir)
    config = find_config(name)
    if config.name != "adapter_config.json":
        sys.exit(f"error: {name!r} is a whole model, there is nothing to merge. Give an adapter: 02_train_lora.py")
    adapter = json.loads(config.read_text(encoding="utf-8"))
    base = args.base_model or adapter["base_model_name_or_path"]
    revision = "main" if args.base_model else adapter.get("revision") or "main"
    if '"quantization_config"' in find_config(base, revision).read_text(encoding="utf-8"):
        sys.exit(f"error: {base!r} is quantized, too coarse for an adapter. Give what it was made of: --base_model")
    note = config.parent.parent / "run.json"
    training = json.loads(note.read_text(encoding="utf-8")) if note.is_file() else {}

    # What the adapter answers on its base model
    source, of = (name, "main") if get_tokenizer_config(name) else (base, revision)
    inputs = ["input_ids", "attention_mask"]  # no token_type_ids
    tokenizer = AutoTokenizer.from_pretrained(source, revision=of, trust_remote_code=False, model_input_names=inputs)
    model = load_model(base, revision)
    ends = model.generation_config.eos_token_id  # one, several or none
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    model.generation_config.eos_token_id = sorted(ends)  # also the one that was trained
    if not model.generation_config.do_sample:  # beside these, which some copies of Llama-2 have, it cannot be saved
        vars(model.generation_config).update(
            dict.fromkeys(("temperature", "top_p", "top_k", "min_p", "typical_p", "top_h"))
        )
    model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
    model = PeftModel.from_pretrained(model, name).eval()
    rows = answer_prompts(model, tokenizer, args.prompts, args.max_new_tokens)
    expected = compute_logits(model, rows)
    quantized = None
    if training.get("quantization"):
        try:
            trained_on = load_model(base, revision, quantization=BitsAndBytesConfig(**training["quantization"]))
            quantized = compare_with_quantized(PeftModel.from_pretrained(trained_on, name), rows, expected)
            print(f"Trained on quantized weights, merged into those of full precision: {quantized}")
        except Exception as error:  # no bitsandbytes for this machine; the merge does not need it
            print(f"The difference to the quantized weights of the training is not measured: {error}")

    # Merge in float32; save in the type asked for, and read it back
    model = model.merge_and_unload(safe_merge=True)
    check("merged", expected, compute_logits(model, rows), "float32")
    model.to(getattr(torch, args.dtype)).save_pretrained(output_dir / "model", max_shard_size="5GB")
    tokenizer.save_pretrained(output_dir / "model")
    del model  # before the other takes as much memory
    saved = load_model(str(output_dir / "model"), "main", args.dtype)
    run = {
        "base_model": training.get("base_model", {"name": base, "revision": revision}),
        "adapter": {"name": name},
        "arguments": asdict(args),
        "check": check("saved", expected, compute_logits(saved, rows), args.dtype),
        "quantized_base": quantized,
    }
    (output_dir / "run.json").write_text(json.dumps(run, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
