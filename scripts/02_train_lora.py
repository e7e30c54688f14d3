# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "trl==1.16.0; python_version >= '3.11'",
#     "trl==1.14.2; python_version < '3.11'",
#     "peft==0.21.2",
#     "datasets==5.2.0",
#     "accelerate==1.15.0",
#     "bitsandbytes==0.50.2",
#     "tensorboard==2.21.0",
#     "python-dotenv==1.2.4",
# ]
# ///
"""Fine-tune a causal language model with LoRA and save the adapter.

    python 02_train_lora.py --model_name_or_path MODEL --dataset_name DATA --output_dir out

Reads   MODEL (hub id or folder) and DATA (hub id, folder, .jsonl, .json, .csv or .parquet file) with the columns
        text, or messages, or prompt and completion (then the loss is on the completion alone).
        --dataset_test_split names rows that are not trained on; their loss is then measured at the end.
Writes  out/adapter/ (adapter, tokenizer), out/checkpoints/ (with tensorboard logs)
        and, when all is done, out/run.json.

Without options it runs the tutorial's own model, data and parameters.
Every field of trl.SFTConfig and trl.ModelConfig is an option, here or in --config FILE.yaml.
"""

import argparse
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below
if not {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_RANK"} & os.environ.keys():
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # one accelerator: SFTTrainer refuses several without a launcher

import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

# Fine-tuning parameters: the tutorial's. Options and --config change them.
PARAMETERS = dict(
    model_name_or_path="meta-llama/Llama-2-7b-chat-hf",
    dtype="float32",  # else transformers takes the checkpoint's own, float16 for Llama-2
    lora_r=64,
    lora_alpha=16,
    lora_dropout=0.1,
    lora_task_type="CAUSAL_LM",
    output_dir="results",
    max_length=1024,
    num_train_epochs=1,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    gradient_checkpointing=False,  # SFTConfig has True
    optim="paged_adamw_32bit",
    save_steps=50,
    save_total_limit=2,
    logging_steps=50,
    learning_rate=4e-5,
    weight_decay=0.001,
    fp16=False,
    bf16=False,  # SFTConfig has True
    max_grad_norm=0.3,
    max_steps=-1,
    warmup_steps=0.03,  # below 1 a share of all steps; the constant schedule has no warm-up
    train_sampling_strategy="group_by_length",
    lr_scheduler_type="constant",
    report_to="tensorboard",
    eval_packing=False,
)
PACKAGES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "bitsandbytes")  # noted in run.json


@dataclass
class ScriptArguments:
    dataset_name: str = field(
        default="mlabonne/guanaco-llama2-1k",
        metadata={"help": "Hub id, folder, or .jsonl, .json, .csv or .parquet file."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to measure the held-out loss on."})
    memory_prediction: str | None = field(
        default=None,
        metadata={"help": "Report of 00_check_gpu.py --model --method: its figure is kept beside the measured one."},
    )
    token_metrics: bool = field(
        default=True,
        metadata={
            "help": "Log entropy and token accuracy too: TRL then computes the loss in chunks, which saves memory with "
            "a large model. false: the loss of transformers' Trainer, the same value, faster with a small model."
        },
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


class PlainLossTrainer(SFTTrainer):
    compute_loss = Trainer.compute_loss


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None and not Path(name).parent.exists()


def load_rows(name: str, split: str, text_field: str = "text") -> Dataset:
    """Rows of a hub id, folder or file: their columns prompt and completion, or messages, or text_field; and tools."""
    formats = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
    files = [file for file in (Path(name), *Path(name).glob(f"{split}.*")) if file.is_file() and file.suffix in formats]
    if not (files or Path(name).is_dir() or is_hub_id(name)):
        fail(f"no data set at {name!r}. Give a hub id (user/name), a folder, or a file of {', '.join(formats)}.")
    number = 0
    try:
        if files and files[0].suffix == ".jsonl":
            for number, line in enumerate(files[0].open(encoding="utf-8"), 1):
                json.loads(line if line.strip() else "{}")
        if files:
            options = {"keep_default_na": False} if files[0].suffix == ".csv" else {}  # None and NA are words too
            rows = load_dataset(formats[files[0].suffix], data_files=str(files[0]), split="train", **options)
        else:
            rows = load_dataset(name, split=split)
    except Exception as error:  # each reader raises its own kind
        place = f"line {number}" if isinstance(error, json.JSONDecodeError) else f"split {split!r}"
        reason = " ".join(str(error.__cause__ or error).split())[:300] or "no rows"  # of an empty file
        fail(f"cannot read {name!r}, {place}: {reason}. Mend it, or give another data set.")
    if len(rows) == 0:
        fail(f"{name!r} has no rows in the split {split!r}. Give another data set, or another split.")
    forms = (["prompt", "completion"], ["messages"], [text_field])
    form = next((form for form in forms if set(form) <= set(rows.column_names)), None)
    if form is None:
        fail(f"{name!r} has the columns {rows.column_names}. Rename to text, or messages, or prompt and completion.")
    if bad := next((number for number, row in enumerate(rows, 1) if not all(row[key] for key in form)), None):
        fail(f"{name!r}, row {bad}: no {' or no '.join(form)}. Mend or remove that row.")
    return rows.select_columns([*form, *({"tools"} & set(rows.column_names))])


def format_rows(rows: Dataset, tokenizer) -> Dataset:
    """Chat form for prompt and completion strings, if there is a template; one BOS, the tokenizer's, for texts."""
    first = rows.column_names[0]
    if not isinstance(rows[0][first], str):
        return rows
    if first == "prompt" and tokenizer.chat_template:
        roles = {"prompt": "user", "completion": "assistant"}
        return rows.map(lambda row: {key: [{"role": role, "content": row[key]}] for key, role in roles.items()})
    if tokenizer.bos_token and tokenizer("a").input_ids[0] == tokenizer.bos_token_id:
        return rows.map(lambda row: {first: row[first].removeprefix(tokenizer.bos_token)})
    return rows


def has_bf16() -> bool:
    """Whether the hardware computes in bfloat16 itself: where it is emulated, float32 is faster."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is ARM's


def choose_quantization(model_args: ModelConfig) -> BitsAndBytesConfig | None:
    """How the base weights are quantized; None: not at all. 4-bit weights are computed with in --dtype, or faster."""
    quantization = get_quantization_config(model_args)
    if model_args.load_in_4bit:
        if model_args.dtype == "float32" and has_bf16():
            quantization.bnb_4bit_compute_dtype = torch.bfloat16
        print(f"4-bit weights, computed with in {quantization.bnb_4bit_compute_dtype}".replace("torch.", ""))
    return quantization


def describe_model(name: str, model) -> dict:
    """Origin of the weights: as 01_download.py noted it, or hub id and commit, or sha256 of the safetensors files."""
    note = Path(name, "run.json")
    if note.is_file() and (origin := json.loads(note.read_text(encoding="utf-8")).get("base_model")):
        return origin
    if not Path(name).is_dir():
        return {"name": name, "revision": model.config._commit_hash}
    digest = hashlib.sha256()
    for file in sorted(Path(name).glob("*.safetensors")):
        digest.update(np.memmap(file, mode="r"))
    return {"name": name, "sha256": digest.hexdigest()}


def count_bytes(model) -> int:
    """Bytes that the weights take, quantized ones with their scales; what two layers share counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


@torch.inference_mode()
def held_out_loss(model, rows: Dataset, collator, batch_size: int) -> tuple[float, int]:
    """Mean cross-entropy in nats over all labelled tokens of tokenized rows, and their number."""
    rows = rows.select_columns(["input_ids", "labels"])
    rows = rows.select(sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"])))
    total, count = 0.0, 0
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):
        labelled = (batch["labels"][:, 1:] != -100).sum().item()
        loss = model.eval()(**{key: value.to(model.device) for key, value in batch.items()}).loss
        total, count = total + loss.item() * labelled, count + labelled
    return total / count, count


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


def peak_memory() -> int:
    """Bytes: the most that tensors took on the accelerator, else the most that this process took."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def write_json(file: Path, content: dict) -> None:
    """Writes the file whole or not at all."""
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2, default=str) + "\n", encoding="utf-8")
    temporary.replace(file)


def main() -> None:
    parser = TrlParser(
        (ScriptArguments, ModelConfig, SFTConfig), usage="%(prog)s [--OPTION VALUE ...] [--config FILE.yaml]",
        description=__doc__, formatter_class=HelpFormatter,
    )  # fmt: skip
    parser.set_defaults(**PARAMETERS)
    try:
        script_args, model_args, training_args = parser.parse_args_and_config()
    except Exception as error:  # of the file, of YAML, of the values
        fail(f"{' '.join(str(error).split())} See --help.")
    output_dir = Path(training_args.output_dir)
    training_args.output_dir = str(output_dir / "checkpoints")
    training_args.include_num_input_tokens_seen = "non_padding"
    model_args.use_peft = True

    predicted = None
    if report := script_args.memory_prediction:
        if not Path(report).is_file():
            fail(f"no memory prediction at {report!r}. Leave the option out, or make one: 00_check_gpu.py --help")
        predicted = json.loads(Path(report).read_text(encoding="utf-8"))["predictions"]  # none: an unknown architecture

    # Data, tokenizer, base model
    rows = load_rows(script_args.dataset_name, script_args.dataset_train_split, training_args.dataset_text_field)
    held_out = None
    if test_split := script_args.dataset_test_split:
        if Path(script_args.dataset_name).is_file():
            fail(f"a file has no split {test_split!r}. Give a folder with train.* and {test_split}.* files.")
        held_out = load_rows(script_args.dataset_name, test_split, training_args.dataset_text_field)
    name = model_args.model_name_or_path
    if not (Path(name, "config.json").is_file() or is_hub_id(name)):
        fail(f"no model at {name!r}. Give a hub id (user/name) or a folder with a config.json.")
    hub = dict(revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        quantization = choose_quantization(model_args)
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation,
            quantization_config=quantization, **hub,
        )  # fmt: skip
    except Exception as error:  # each kind of file raises its own
        fail(f"cannot load the model {name!r}: {' '.join(str(error).split())[:300]}")
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # On CPUs with AVX512-BF16 an evaluation would repack the weights, and no gradient passes through them then.
            layer.support_avx512bf16_for_cpu = False
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    base, weights_bytes = describe_model(name, model), count_bytes(model)

    # Train the adapter: the trainer puts the LoRA layers into the model
    (output_dir / "run.json").unlink(missing_ok=True)
    trainer_class = SFTTrainer if script_args.token_metrics else PlainLossTrainer
    set_seed(training_args.seed)  # the adapter's first values are random
    try:
        trainer = trainer_class(
            model=model,
            args=training_args,
            train_dataset=format_rows(rows, tokenizer),
            eval_dataset=held_out and format_rows(held_out, tokenizer),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
    except ValueError as error:
        fail(" ".join(str(error).split()))
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes an adapter of 4-bit weights bfloat16, which rounds small updates away
            parameter.data = parameter.data.float()
    if held_out and len(trainer.eval_dataset) == 0:
        fail(
            f"no held-out row has a token with loss within --max_length {training_args.max_length}. Give a larger one."
        )
    if not training_args.resume_from_checkpoint:
        for old in [*output_dir.glob("checkpoints/checkpoint-*"), *output_dir.glob("checkpoints/runs")]:
            shutil.rmtree(old)  # of an earlier run: the newest by number would outlive those of this one
    trainer.model.print_trainable_parameters()
    metrics = trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint).metrics
    metrics["tokens_per_second"] = trainer.state.num_input_tokens_seen / metrics["train_runtime"]
    metrics |= {"weights_bytes": weights_bytes, "peak_memory_bytes": peak_memory()}
    if predicted:
        metrics["predicted_memory_bytes"] = predicted[0]["bytes"]["allocated"]

    # Save the adapter; one whose base came from a hub names the hub id, so that it loads anywhere
    if not trainer.is_world_process_zero():
        return
    if "revision" in base:
        config = trainer.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = base["name"], base["revision"]
    temporary = output_dir / "adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    trainer.model.save_pretrained(temporary, save_embedding_layers=False)
    tokenizer.save_pretrained(temporary)
    metrics["size_bytes"] = sum(file.stat().st_size for file in temporary.iterdir())
    shutil.rmtree(output_dir / "adapter", ignore_errors=True)
    temporary.rename(output_dir / "adapter")

    # Measure it on the held-out rows
    if held_out:
        batch_size = training_args.per_device_eval_batch_size
        loss, tokens = held_out_loss(trainer.model, trainer.eval_dataset, trainer.data_collator, batch_size)
        metrics |= {"eval_loss": loss, "eval_tokens": tokens}
        print(f"held-out loss {loss:.4f} over {tokens} tokens")

    # Record the run: run.json is there only when all the rest is
    trainable, total = trainer.model.get_nb_trainable_parameters()
    note = Path(script_args.dataset_name, "run.json")
    run = {
        "script": Path(__file__).name,
        "base_model": base,
        "dataset": {
            "name": script_args.dataset_name,
            "origin": json.loads(note.read_text(encoding="utf-8")).get("dataset") if note.is_file() else None,
            "rows": len(rows),
            "sha256": hashlib.sha256(json.dumps(rows[:]).encode()).hexdigest(),
        },
        "recipe": next((value for key, value in zip(sys.argv, sys.argv[1:], strict=False) if key == "--config"), None),
        "arguments": {
            **asdict(script_args),
            **asdict(model_args),
            **training_args.to_dict(),  # hides hub_token, and with it all that ends like it
            "eos_token": training_args.eos_token,
        },
        **describe_machine(),
        "quantization": quantization and quantization.to_dict(),
        "parameters": {"trainable": trainable, "total": total, "trainable_percent": 100 * trainable / total},
        "metrics": metrics,
        "history": trainer.state.log_history,
    }
    write_json(output_dir / "run.json", run)
    note = f" ({metrics['predicted_memory_bytes'] / 2**30:.2f} predicted)" if predicted else ""
    peak = f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB{note}"
    print(f"{metrics['tokens_per_second']:.0f} tokens/s, peak memory {peak}")
    print(f"The adapter is in {output_dir / 'adapter'}")


if __name__ == "__main__":
    main()
