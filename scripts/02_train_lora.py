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
import fcntl
import gc
import hashlib
import json
import math
import os
import pickle
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below
if not {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_RANK"} & os.environ.keys():
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # one accelerator: SFTTrainer refuses several without a launcher

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
POSITIVE = ("learning_rate", "num_train_epochs", "max_length", "save_steps", "gradient_accumulation_steps")
POSITIVE += ("per_device_train_batch_size", "per_device_eval_batch_size")
# Arguments that may change between the parts of a run, and what each checkpoint of it has.
NOT_THE_RUN = {"model_name_or_path", "model_revision", "dataset_name", "output_dir", "memory_prediction", "restart"}
NOT_THE_RUN |= {"save_steps", "save_total_limit", "max_shard_size", "per_device_eval_batch_size", "dataset_num_proc"}
NOT_THE_RUN |= {"run_name", "report_to", "disable_tqdm", "hub_token"}
REFUSED = {
    "resume_from_checkpoint": "an interrupted run goes on by itself, in its --output_dir",
    "save_only_model": "nothing could go on from such a checkpoint. To save room: --save_strategy no",
    "ignore_data_skip": "an interrupted run would see other rows than one that was not",
    "push_to_hub": "the training uploads nothing. Afterwards: push_model.py --help (make push)",
    "hub_token": "every user of this machine could read it there. Put HF_TOKEN=<token> into .env instead",
}
REQUIRED = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "progress.json", "run.json"}


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
    restart: bool = field(
        default=False, metadata={"help": "Begin anew, and lose the checkpoints of a run that was interrupted."}
    )
    token_metrics: bool = field(
        default=False,
        metadata={
            "help": "Log entropy and token accuracy too: TRL then computes the loss in chunks, the same value, which "
            "saves memory where the vocabulary is large, and takes up to twice the time with a small model."
        },
    )


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    pass


def show_help() -> None:
    """Help without the libraries, whose import takes seconds."""
    print(
        f"usage: {Path(__file__).name} [--OPTION VALUE ...] [--config FILE.yaml]\n\n{__doc__}\noptions of this script:"
    )
    for option in fields(ScriptArguments):
        print(f"  --{option.name}  {option.metadata['help']} (default: {option.default})")
    print("\noptions that it sets:")
    for name, value in PARAMETERS.items():
        print(f"  --{name} {value}")
    print("\nall options, those of SFTConfig and ModelConfig too: --help_all")


if __name__ == "__main__" and {"-h", "--help"} & set(sys.argv):
    show_help()
    sys.exit()

gc.disable()  # until all is imported: looking for garbage is a quarter of that time
import numpy as np
import torch
from bitsandbytes.nn import Linear4bit
from datasets import Dataset, load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, Trainer, set_seed
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser, get_peft_config, get_quantization_config

gc.freeze()
gc.enable()


def fail(message: str) -> None:
    """Ends with an error; a token in it is not shown: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    sys.exit("error: " + re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", message.replace(token, "<HF_TOKEN>")))


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


def hash_rows(rows: Dataset) -> str:
    """sha256 of the rows as JSON."""
    digest = hashlib.sha256()
    for part in rows.iter(batch_size=1000):
        digest.update(json.dumps(part).encode())
    return digest.hexdigest()


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
    """Whether the hardware itself computes in bfloat16, and fast. For any AMD GPU PyTorch answers that it does."""
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
    if note.is_file() and (origin := read_json(note).get("base_model")):
        return origin
    if not Path(name).is_dir():
        return {"name": name, "revision": model.config._commit_hash}
    digest = hashlib.sha256()
    for file in sorted(Path(name).glob("*.safetensors")):
        digest.update(np.memmap(file, mode="r"))
    return {"name": name, "sha256": digest.hexdigest()}


def check_loaded(name: str, model, tokenizer, missing: set[str]) -> None:
    """Stops where a model is of another kind, where weights of it are missing (they would be random), or EOS is."""
    kinds = model.config.architectures or [type(model).__name__]
    if type(model).__name__ not in kinds:
        fail(f"{name!r} is a {kinds[0]}, not a causal language model. Give another model.")
    if missing:
        fail(f"{name!r} lacks {len(missing)} weights, {min(missing)} among them. Save or fetch the model again.")
    if not tokenizer.eos_token:
        fail(f"the tokenizer of {name!r} has no EOS token. Name one as eos_token in its tokenizer_config.json.")


def count_bytes(model) -> int:
    """Bytes that the weights take, quantized ones with their scales; what two layers share counts once."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in model.state_dict().values()}.values())


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Folders of the checkpoints, the newest first."""
    found = [path for path in output_dir.glob("checkpoints/checkpoint-*") if path.name[11:].isdigit()]
    return sorted(found, key=lambda path: -int(path.name[11:]))


def find_differences(run: dict, other: dict) -> list[str]:
    """What makes another run of it: arguments, model, rows, packages."""
    pair = []
    for each in json.loads(json.dumps([run, other], default=str)):
        arguments = {key: value for key, value in each["arguments"].items() if key not in NOT_THE_RUN}
        model = each["base_model"].get("sha256") or {key: each["base_model"].get(key) for key in ("name", "revision")}
        sums = {"rows": "sha256", "held-out rows": "held_out_sha256", "tokens": "tokens_sha256"}
        rows = {f"{what} (sha256)": each["dataset"][key] for what, key in sums.items()}
        pair.append({"model": model} | rows | each["packages"] | arguments)
    keys = sorted(pair[0].keys() | pair[1].keys())
    values = [(key, *(side.get(key) for side in pair)) for key in keys]
    return [f"{key} {value} instead of {old}" for key, value, old in values if value != old]


def list_sealed(folder: Path) -> set[str]:
    lines = (folder / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    return {"SHA256SUMS", "README.md"} | {line.partition("  ")[2] for line in lines}


def find_checkpoint(output_dir: Path, run: dict, restart: bool) -> Path | None:
    """The newest whole checkpoint of this run if it was interrupted; stops where another run was. Without one, or to
    restart, what is there is removed, so that the two are not mixed.
    """
    for old in output_dir.glob("checkpoints/checkpoint-*.old"):  # of a process that was killed
        if not old.with_suffix("").exists() and (old / "SHA256SUMS").is_file() and not find_damage(old):
            old.rename(old.with_suffix(""))
    for waste in [*output_dir.glob("checkpoints/*.old"), *output_dir.glob("checkpoints/*.tmp")]:
        shutil.rmtree(waste, ignore_errors=True)
    checkpoints = list_checkpoints(output_dir)
    for checkpoint in [] if restart else checkpoints:
        damage = find_damage(checkpoint) if (checkpoint / "SHA256SUMS").is_file() else f"{checkpoint} has no SHA256SUMS"
        names = {file.name for file in checkpoint.iterdir()}
        if not damage and not names >= REQUIRED:
            damage = f"{checkpoint} has not all of {', '.join(sorted(REQUIRED))}"
        if not damage and (others := names - list_sealed(checkpoint)):  # the trainer would take weights of any name
            damage = f"{checkpoint / min(others)} is not among the files that were written, in SHA256SUMS"
        if damage:
            print(f"{damage}. This checkpoint is left out.")
            continue
        old = read_json(checkpoint / "run.json")
        done = output_dir / "run.json"
        if done.is_file() and read_json(done)["started"] == old["started"]:
            break  # it was not interrupted
        if differences := find_differences(run, old):
            fail(
                f"a run was interrupted after {checkpoint}, and this is another one: {'; '.join(differences)}.\n"
                "Give what it had to go on with it; or begin this one, and lose that: --restart true (make: RESTART=1)"
            )
        run["started"] = old["started"]
        print(f"Going on from {checkpoint}")
        return checkpoint
    else:
        if checkpoints and not restart:
            fail("no checkpoint is whole. Bring what is damaged back, or begin anew: --restart true (make: RESTART=1)")
    for old in [*checkpoints, *output_dir.glob("checkpoints/runs")]:
        replace(old)
    return None


def drop_broken_pipes() -> None:
    """Sends to nowhere what nobody reads any more, as after Ctrl-C in `... | tee log`: writing to it would fail."""
    for number in (1, 2):
        pipe = select.poll()
        pipe.register(number, 0)
        if pipe.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


class ResumableTrainer(SFTTrainer):
    """SFTTrainer that goes on after an interruption as if there had been none, and stops where the loss is no number.

    A checkpoint is whole or not there. It holds the run it is of (run.json), and what the trainer itself would forget:
    the order of the rows, and what was counted since the last log (progress.json).
    """

    run: dict  # the beginning of run.json
    output_dir: Path  # of the whole run; args.output_dir is that of the checkpoints
    result_bytes: int  # what will be saved in the end
    checkpoint: Path | None = None  # to go on from
    stopped_by: int | None = None  # number of a signal
    save_later = epoch_ended = False
    seconds_before, peak_before = 0.0, 0  # of the processes that this one goes on from: their time, their peak memory

    def stop(self, number: int, frame) -> None:
        """Handler of signals."""
        signal.signal(number, signal.SIG_DFL)
        self.stopped_by = number
        drop_broken_pipes()
        os.write(2, b"\nA checkpoint is saved after this step. The same signal again stops at once.\n")

    def give_up(self, cause: str, step: int) -> None:
        rate = self._get_learning_rate()
        last = next(iter(list_checkpoints(self.output_dir)), "none yet")
        fail(
            f"{cause} at step {step}, learning rate {rate:g}. The last good checkpoint: {last}.\n"
            f"Try, each with --restart true (RESTART=1): --learning_rate {rate / 10:g}, or --max_grad_norm 0.1 "
            "--warmup_steps 0.1 --lr_scheduler_type linear, or --bf16 false --fp16 false"
        )

    def check_disk(self) -> None:
        """Stops where the disk has no room for the checkpoints and the result. Adam keeps 8 bytes for a parameter."""
        args, steps = self.args, self.state.max_steps
        weights = [value for value in self.model.parameters() if value.requires_grad]
        size = sum(value.nbytes + 8 * value.numel() for value in weights) + 2**25
        every = {"steps": self.state.save_steps, "epoch": steps / args.num_train_epochs}.get(args.save_strategy, steps)
        left = 0 if args.save_strategy == "no" else math.ceil((steps - self.state.global_step) / every)
        count = min(left, (args.save_total_limit or left) + 1 - len(list_checkpoints(self.output_dir)))
        needed, free = max(count, 0) * size + self.result_bytes, shutil.disk_usage(self.output_dir).free
        if needed > free:
            fail(
                f"{max(count, 0)} checkpoints of {size / 1e9:.2f} GB and a result of {self.result_bytes / 1e9:.2f} GB "
                f"do not fit into the {free / 1e9:.2f} GB that are free in {self.output_dir}.\n"
                "Make room, take another --output_dir (OUT), or save fewer: --save_total_limit 1, --save_strategy no"
            )

    def training_step(self, *args, **kwargs) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if not torch.isfinite(loss):
            self.give_up(f"the loss is {loss.item()}", self.state.global_step + 1)
        return loss

    def check_weights(self) -> None:
        if not all(value.isfinite().all() for value in self.model.parameters() if value.requires_grad):
            self.give_up("the weights are not finite", self.state.global_step)

    def restore(self) -> None:
        """Takes over from the checkpoint what was counted since its last log and in its process."""
        if self.checkpoint:
            progress = read_json(self.checkpoint / "progress.json")
            self.checkpoint = None
            self._tr_loss.fill_(progress["loss"])
            self._total_loss_scalar, self._globalstep_last_logged = progress["total_loss"], progress["last_logged"]
            self._metrics["train"].update(progress["metrics"])
            self._total_train_tokens, self.seconds_before = progress["tokens"], progress["seconds"]
            self.peak_before = progress["peak_memory_bytes"]
            self.state.compute_steps(self.args, self.state.max_steps)  # how often to save may be another now
            self.model.train()  # else SFTTrainer would not log it
            self._initial_global_step = 0  # the mean loss is that of the whole run
            self.epoch_rng = torch.tensor(list(bytes.fromhex(progress["epoch_rng"])), dtype=torch.uint8)

    def _run_epoch(self, **kwargs) -> None:
        self.began, checkpoint = kwargs["start_time"], kwargs["resume_from_checkpoint"]
        if kwargs["epoch"] == kwargs["epochs_trained"]:  # the first of this process
            self.check_disk()
            self.restore()
            if checkpoint and kwargs["steps_trained_in_current_epoch"]:
                torch.set_rng_state(self.epoch_rng)  # the same order of rows
            elif checkpoint:
                self._load_rng_state(checkpoint)
        self.epoch_rng = torch.get_rng_state()
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)
        else:  # of a run that was interrupted after its last step
            self.control.should_training_stop = True

    def _finalize_training(self, *args):
        self.restore()  # where no epoch was left to run
        limit, self.args.save_total_limit = self.args.save_total_limit, None  # 1 would remove all but the best
        try:
            return super()._finalize_training(*args)
        finally:
            self.args.save_total_limit = limit

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Called after each step, and again at the end of an epoch, where what is due then comes before the save."""
        control, last_of_epoch = self.control, self.state.epoch == int(self.state.epoch)
        if self.stopped_by and self.state.global_step < self.state.max_steps:
            if control.should_training_stop and not last_of_epoch:
                return  # the epoch was broken off: it has no end
            drop_broken_pipes()
            control.should_save = control.should_training_stop = True
        if last_of_epoch and not self.epoch_ended:
            self.save_later, control.should_save = control.should_save, False
        else:
            control.should_save |= self.save_later
            self.save_later = False
        self.epoch_ended = last_of_epoch and not self.epoch_ended
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def _determine_best_metric(self, metrics: dict, trial) -> bool:
        return super()._determine_best_metric(metrics, trial) or self.stopped_by is not None

    def _save_checkpoint(self, model, trial) -> None:
        self.check_weights()
        args, folder, limit = self.args, self.args.output_dir, self.args.save_total_limit
        args.output_dir, args.save_total_limit = f"{folder}/new.tmp", None
        try:
            super()._save_checkpoint(model, trial)
            new = Path(args.output_dir, f"checkpoint-{self.state.global_step}")
            best = Path(folder, f"checkpoint-{self.state.best_global_step}")
            self.state.best_model_checkpoint = str(best) if best.name == new.name or best.exists() else None
            self.state.save_to_json(str(new / "trainer_state.json"))
            progress = {
                "loss": self._tr_loss.item(),
                "total_loss": self._total_loss_scalar,
                "last_logged": self._globalstep_last_logged,
                "metrics": self._metrics["train"],
                "tokens": self._total_train_tokens,
                "seconds": self.seconds_before + time.time() - self.began,
                "peak_memory_bytes": max(self.peak_before, peak_memory()),
                "epoch_rng": self.epoch_rng.numpy().tobytes().hex(),
            }
            write_json(new / "progress.json", progress)
            write_json(new / "run.json", self.run)
            seal(new)
            replace(Path(folder, new.name), new)
            for old in list_checkpoints(self.output_dir)[limit:] if limit else []:
                if old != best:
                    replace(old)
        except Exception as error:  # a full disk: each library raises its own
            last = next(iter(list_checkpoints(self.output_dir)), "none")
            fail(
                f"cannot save a checkpoint: {' '.join(str(error).split())[:300]}. The last good one: {last}.\n"
                "Make room, and type the same command again to go on."
            )
        finally:
            shutil.rmtree(args.output_dir, ignore_errors=True)
            args.output_dir, args.save_total_limit = folder, limit

    def log(self, logs: dict, start_time: float | None = None) -> None:
        if "train_runtime" in logs:  # of the last process, with the samples and steps of all
            seconds = self.seconds_before + logs["train_runtime"]
            for key in ("train_samples_per_second", "train_steps_per_second"):
                logs[key] = round(logs[key] * logs["train_runtime"] / seconds, 3)
            logs["train_runtime"] = round(seconds, 4)
        super().log(logs, start_time)


class PlainLossTrainer(ResumableTrainer):
    @cached_property
    def needs_mask(self) -> bool:
        """Whether attention needs the mask of the padding. Rows are padded on the right, where no token of a causal
        model looks: without a mask attention computes the same, and is faster. But on an accelerator PyTorch has no
        fused kernel in float32 without a mask for keys that several heads share, and keeps all scores; transformers
        makes it do so in a batch without padding. NVIDIA's before Ampere have none in half precision either.
        """
        text = self.model.config.get_text_config()
        if not all(getattr(part, "is_causal", True) for part in (text, *self.model.modules())):
            return True
        shared = any((getattr(layer, "num_key_value_groups", 1) or 1) > 1 for layer in self.model.modules())
        fused = self.args.bf16 or self.args.fp16 or self.model.dtype != torch.float32
        if self.args.device.type == "cuda" and not torch.version.hip:
            fused = fused and torch.cuda.get_device_capability() >= (8, 0)
        return shared and not fused and self.args.device.type != "cpu"

    def compute_loss(self, model, inputs: dict, *args, **kwargs):
        """The loss as Trainer computes it, where TRL's is no other: that of a mixture of experts has a part for their
        balance.
        """
        if self.args.loss_type != "nll" or self.aux_loss_enabled:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if not self.needs_mask:
            inputs = {name: value for name, value in inputs.items() if name != "attention_mask"}
        return Trainer.compute_loss(self, model, inputs, *args, **kwargs)


def limit_memory() -> None:
    """On the CPU: what takes more memory than is free fails, and is explained, before the system kills the process."""
    free = re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())
    own = re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())
    limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
    free_bytes = (int(free[1]) + int(own[1])) * 1024
    groups = [Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current")]
    if all(file.is_file() for file in groups) and (most := groups[0].read_text().strip()).isdigit():
        cached = re.findall(r"^(?:in)?active_file (\d+)", groups[1].with_name("memory.stat").read_text(), re.MULTILINE)
        used = int(groups[1].read_text()) - sum(map(int, cached))
        free_bytes = min(free_bytes, int(most) - used + int(own[1]) * 1024)
    resource.setrlimit(resource.RLIMIT_DATA, (free_bytes if limit < 0 else min(limit, free_bytes), hard))


def explain_memory(error: Exception, report: dict, args: SFTConfig) -> None:
    """Stops with settings that take less if the error is one of memory; report: that of 00_check_gpu.py --model."""
    text = " ".join(str(error).split())
    if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory|ALLOC_FAILED", text):
        return
    smaller = [f"{each['options']} ({each['bytes'] / 2**30:.2f} GiB)" for each in report.get("smaller", [])]
    if not smaller:
        batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
        smaller = ["--gradient_checkpointing true", f"--max_length {(args.max_length or 1024) // 2}"]
        if torch.cuda.is_available():
            smaller.insert(0, "--token_metrics true")
        if batch > 1:
            smaller.insert(0, f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {steps * 2}")
    fail(f"out of memory: {text[:200]}\nTake less, with --restart true (make: RESTART=1): {', or '.join(smaller[:4])}")


@torch.inference_mode()
def held_out_loss(model, rows: Dataset, collator, batch_size: int) -> tuple[float, int]:
    """Mean cross-entropy in nats over all labelled tokens of tokenized rows, and their number."""
    rows = rows.select_columns(["input_ids", "labels"])
    rows = rows.select(sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"])))
    total, count = 0.0, 0
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):
        labelled = (batch["labels"][:, 1:] != -100).sum().item()
        inputs = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        loss = model.eval()(**inputs).loss
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
    status = Path("/proc/self/status")
    if status.is_file() and (most := re.search(r"VmHWM:\s+(\d+)", status.read_text())):
        return int(most[1]) * 1024
    # This begins with what the process took that began this one.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> None:
    parser = TrlParser(
        (ScriptArguments, ModelConfig, SFTConfig), usage="%(prog)s [--OPTION VALUE ...] [--config FILE.yaml]",
        description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--help_all", action="help", help="Show all options.")
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.set_defaults(**PARAMETERS)
    try:
        script_args, model_args, training_args = parser.parse_args_and_config()
    except IndexError:
        fail("--config has no file after it. Give --config FILE.yaml, or leave it out.")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the file of --config: {error}. Give a YAML file, or leave it out.")
    except Exception as error:  # of YAML, of the values
        fail(f"{' '.join(str(error).split())} See --help.")
    check_positive(training_args, *POSITIVE)
    if training_args.weight_decay < 0:
        fail(f"--weight_decay is {training_args.weight_decay}: weights would grow. Give 0 or more.")
    output_dir = Path(training_args.output_dir)
    for name, reason in REFUSED.items():
        if getattr(training_args, name):
            fail(f"--{name} is refused: {reason}. Leave it out.")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        fail("this is for one accelerator, and runs as one process. Start it without a launcher.")
    training_args.output_dir = str(output_dir / "checkpoints")
    training_args.include_num_input_tokens_seen = "non_padding"
    model_args.use_peft = True

    predicted, prediction = None, {}
    if report := script_args.memory_prediction:
        if not Path(report).is_file():
            fail(f"no memory prediction at {report!r}. Leave the option out, or make one: 00_check_gpu.py --help")
        prediction = read_json(Path(report))
        predicted = prediction["predictions"]  # none: an unknown architecture
    held = lock(output_dir)  # noqa: F841  until the end of main

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
    check_files(Path(name))
    if sys.platform == "linux" and not torch.cuda.is_available():
        limit_memory()
    hub = dict(revision=model_args.model_revision, trust_remote_code=training_args.trust_remote_code)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **hub)
        quantization = choose_quantization(model_args)
        model, loading = AutoModelForCausalLM.from_pretrained(
            name, dtype=model_args.dtype, use_safetensors=True,
            attn_implementation=model_args.attn_implementation,
            quantization_config=quantization, **hub, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # each kind of file raises its own
        text = " ".join(str(error).split())[:300]
        named = model_args.attn_implementation and "ttention" in text
        other = " Give another --attn_implementation, sdpa or eager (with make: in ARGS)." if named else ""
        fail(f"cannot load the model {name!r}: {text}{other}")
    check_loaded(name, model, tokenizer, loading["missing_keys"])
    for layer in model.modules():
        if isinstance(layer, Linear4bit):
            # On CPUs with AVX512-BF16 an evaluation would repack the weights, and no gradient passes through them then.
            layer.support_avx512bf16_for_cpu = False
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "right"
    base, weights_bytes = describe_model(name, model), count_bytes(model)

    # Train the adapter: the trainer puts the LoRA layers into the model
    trainer_class = ResumableTrainer if script_args.token_metrics else PlainLossTrainer
    try:
        set_seed(training_args.seed)  # the adapter's first values are random
        trainer = trainer_class(
            model=model,
            args=training_args,
            train_dataset=format_rows(rows, tokenizer),
            eval_dataset=held_out and format_rows(held_out, tokenizer),
            processing_class=tokenizer,
            peft_config=get_peft_config(model_args),
        )
    except Exception as error:  # of an option, of a row, of the chat template: each raises its own
        explain_memory(error, prediction, training_args)
        fail(f"{' '.join(str(error).split())[:600]} Look at the rows: audit_tokens.py (make audit), or see --help.")
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:  # TRL makes an adapter of 4-bit weights bfloat16, which rounds small updates away
            parameter.data = parameter.data.float()
    for what, part in (("row", trainer.train_dataset), ("held-out row", trainer.eval_dataset)):
        if part is not None and len(part) == 0:
            fail(f"no {what} has a token with loss within --max_length {training_args.max_length}. Give a larger one.")
    if max(max(ids) for ids in trainer.train_dataset["input_ids"]) >= len(model.get_input_embeddings().weight):
        fail(f"the tokenizer of {name!r} has tokens that the model has no embedding of. Give it its own tokenizer.")
    trainable, total = trainer.model.get_nb_trainable_parameters()
    trainer.model.print_trainable_parameters()
    note = Path(script_args.dataset_name, "run.json")
    trainer.run = {
        "script": Path(__file__).name,
        "started": datetime.now().astimezone().isoformat(),
        "base_model": base,
        "dataset": {
            "name": script_args.dataset_name,
            "origin": read_json(note).get("dataset") if note.is_file() else None,
            "rows": len(rows),
            "sha256": hash_rows(rows),
            "held_out_sha256": held_out and hash_rows(held_out),
            "tokens_sha256": hash_rows(trainer.train_dataset.select_columns("input_ids")),
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
    }
    trainer.output_dir = output_dir
    trainer.result_bytes = sum(value.nbytes for value in trainer.model.parameters() if value.requires_grad)
    trainer.checkpoint = find_checkpoint(output_dir, trainer.run, script_args.restart)
    training_args.eval_on_start &= trainer.checkpoint is None
    handlers = {number: signal.signal(number, trainer.stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        metrics = trainer.train(resume_from_checkpoint=trainer.checkpoint and str(trainer.checkpoint)).metrics
    except pickle.UnpicklingError:
        fail(
            f"a checkpoint in {output_dir} holds more than numbers; nothing of it was executed.\n"
            "Bring the one back that was written, or begin anew: --restart true (make: RESTART=1)"
        )
    except (RuntimeError, MemoryError) as error:
        explain_memory(error, prediction, training_args)
        raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if trainer.stopped_by and trainer.state.global_step < trainer.state.max_steps:
        again = "the same command, without --restart true (RESTART=1)," if script_args.restart else "the same command"
        print(f"Stopped after step {trainer.state.global_step}. Type {again} again to go on.", file=sys.stderr)
        sys.exit(128 + trainer.stopped_by)
    trainer.check_weights()
    metrics["tokens_per_second"] = trainer.state.num_input_tokens_seen / metrics["train_runtime"]
    metrics |= {"weights_bytes": weights_bytes, "peak_memory_bytes": max(trainer.peak_before, peak_memory())}
    if predicted:
        metrics["predicted_memory_bytes"] = predicted[0]["bytes"]["allocated"]

    # Save the adapter; one whose base came from a hub names the hub id, so that it loads anywhere
    if "revision" in base:
        config = trainer.model.peft_config["default"]
        config.base_model_name_or_path, config.revision = base["name"], base["revision"]
    temporary = output_dir / "adapter.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        trainer.model.save_pretrained(temporary, save_embedding_layers=False)
        tokenizer.save_pretrained(temporary)
        sums = seal(temporary)
    except Exception as error:  # a full disk: each library raises its own
        reason = " ".join(str(error).split())[:300]
        fail(f"cannot save the adapter: {reason}. Make room, and type the same command again: no step is lost.")
    metrics["size_bytes"] = sum(file.stat().st_size for file in temporary.iterdir())

    # Measure it on the held-out rows
    if held_out:
        batch_size = training_args.per_device_train_batch_size  # that of which the memory sufficed
        loss, tokens = held_out_loss(trainer.model, trainer.eval_dataset, trainer.data_collator, batch_size)
        metrics |= {"eval_loss": loss, "eval_tokens": tokens}
        print(f"held-out loss {loss:.4f} over {tokens} tokens")

    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    first, last = losses[: len(losses) // 4 + 1], losses[-(len(losses) // 4 + 1) :]
    if len(losses) > 1 and sum(last) >= sum(first):
        print(
            f"warning: the loss did not fall: {sum(first) / len(first):.4f} first, {sum(last) / len(last):.4f} last. "
            "Try another --learning_rate, and look at the rows: audit_tokens.py (make audit)",
            file=sys.stderr,
        )

    # Put all in the place of the last result; run.json is there only when the rest is
    run = trainer.run | {
        "parameters": {"trainable": trainable, "total": total, "trainable_percent": 100 * trainable / total},
        "metrics": metrics,
        "history": trainer.state.log_history,
        "sha256": {name: digest for name, digest in sums.items() if name.endswith(".safetensors")},
    }
    (output_dir / "run.json").unlink(missing_ok=True)
    replace(output_dir / "adapter", temporary)
    write_json(output_dir / "run.json", run)
    note = f" ({metrics['predicted_memory_bytes'] / 2**30:.2f} predicted)" if predicted else ""
    peak = f"{metrics['peak_memory_bytes'] / 2**30:.2f} GiB{note}"
    print(f"{metrics['tokens_per_second']:.0f} tokens/s, peak memory {peak}")
    print(f"The adapter is in {output_dir / 'adapter'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
