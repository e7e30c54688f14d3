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
#     "python-dotenv==1.2.4",
# ]
# ///
"""Measure base and trained models on held-out rows, and let each answer the same prompts.

    python evaluate.py --base_model MODEL --models out/adapter --dataset_name DATA --output_dir report

Reads   MODEL (hub id or folder), adapters or full models, and the validation rows of DATA. With rows of prompt and
        completion the loss is on the completions alone, as in training.
Writes  report/evaluation.md and report/evaluation.json: loss (nats per token), perplexity, greedy answers.
"""

import argparse
import gc
import hashlib
import json
import math
import os
import re
import sys
import tempfile
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
    base_model: str = field(
        default="meta-llama/Llama-2-7b-chat-hf", metadata={"help": "Hub id or folder of the model before training."}
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "Folders of adapters or trained models to set beside it."}
    )
    dataset_name: str = field(
        default="outputs/dataset", metadata={"help": "Hub id, folder, or .jsonl, .json, .csv or .parquet file."}
    )
    dataset_test_split: str = field(default="validation", metadata={"help": "Split to measure on."})
    prompts: list[str] = field(
        default_factory=list, metadata={"help": "Prompts to answer (default: the first five of the split)."}
    )
    max_length: int = field(default=1024, metadata={"help": "Rows are cut to that many tokens."})
    max_new_tokens: int = field(default=96, metadata={"help": "The most tokens of an answer."})
    batch_size: int = field(default=8, metadata={"help": "Rows in a batch."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of the weights."}
    )
    output_dir: str = field(default="report", metadata={"help": "Folder for evaluation.md and evaluation.json."})


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
from datasets import Dataset, load_dataset
from peft import PeftModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import SFTConfig, SFTTrainer

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


def tokenize_rows(rows: Dataset, tokenizer, args: SFTConfig) -> SFTTrainer:
    """A trainer that holds the rows as it tokenizes and labels them. A model 8 wide stands in: only tokens matter."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ids))
    return SFTTrainer(model=model, args=args, train_dataset=format_rows(rows, tokenizer), processing_class=tokenizer)


def choose_prompts(rows: Dataset, count: int = 5) -> list[dict]:
    """Questions of the first rows with the answers that stand there, or the tutorial's query for rows of text."""
    if not {"prompt", "messages"} & set(rows.column_names):
        return [{"prompt": "What is a large language model?", "reference": None}]
    chosen = []
    for row in rows.select(range(min(count, len(rows)))):
        if "messages" in row:
            number = next(i for i, message in enumerate(row["messages"]) if message["role"] == "user")
            question, *answer = (message["content"] for message in row["messages"][number : number + 2])
        elif isinstance(row["prompt"], str):
            question, answer = row["prompt"], [row["completion"]]
        else:
            question, answer = row["prompt"][-1]["content"], [row["completion"][-1]["content"]]
        chosen.append({"prompt": question, "reference": answer[0] if answer else None})
    return chosen


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


def check_training_rows(models: list[str], dataset_name: str, held_out: Dataset) -> None:
    """Refuses a model trained on the held-out rows, or on others than those beside them: they may be among these."""
    beside = load_rows(dataset_name, "train") if Path(dataset_name, "train.jsonl").is_file() else None
    pins = [rows and hash_rows(rows) for rows in (held_out, beside)]
    for model in models:
        note = Path(model).parent / "run.json"
        trained_on = read_json(note).get("dataset") if note.is_file() else None
        if trained_on and trained_on["sha256"] == pins[0]:
            fail(f"{model} was trained on these rows of {dataset_name}. Give rows that it has not seen.")
        if trained_on and beside and trained_on["sha256"] != pins[1]:
            fail(f"{model} was trained on other rows than {dataset_name}/train.jsonl. Train again: make train-lora")


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


def format_report(report: dict) -> str:
    """The report as Markdown: a table of losses, then each prompt with the answers."""
    base = report["models"][0]["loss"]
    lines = [
        "# Evaluation",
        "",
        f"{report['rows']} held-out rows of {report['dataset']}, {report['tokens']} tokens with loss.",
        "",
        "| model | loss | against base | perplexity |",
        "| --- | --- | --- | --- |",
    ]
    for model in report["models"]:
        change = f"{100 * (model['loss'] / base - 1):+.1f} %"
        lines.append(f"| {model['name']} | {model['loss']:.4f} | {change} | {model['perplexity']:.2f} |")
    for model in report["models"]:
        if on_quantized := model.get("loss_quantized"):
            lines += [
                "",
                f"{model['name']} was trained on quantized weights, where its loss is {on_quantized:.4f}. Here",
            ]
            lines += ["it is measured on those of full precision."]
    for number, prompt in enumerate(report["prompts"]):
        lines += ["", f"## {prompt['prompt']}", ""]
        if prompt["reference"]:
            lines.append(f"- **the data set**: {prompt['reference']}")
        lines += [f"- **{model['name']}**: {' '.join(model['answers'][number].split())}" for model in report["models"]]
    return "\n".join(lines) + "\n"


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


def main() -> None:
    args = parse_arguments()
    check_positive(args, "max_length", "max_new_tokens", "batch_size")
    if (Path(args.dataset_name) / "train.jsonl").is_file() and not any(Path(args.dataset_name).glob("validation.*")):
        fail(
            f"{args.dataset_name} has no validation rows. Hold some out: make train-lora VALIDATION_ROWS=50 DATASET=..."
        )
    rows = load_rows(args.dataset_name, args.dataset_test_split)
    check_training_rows(args.models, args.dataset_name, rows)
    prompts = [{"prompt": prompt, "reference": None} for prompt in args.prompts] or choose_prompts(rows)

    models = []
    for path in [args.base_model, *args.models]:
        model, tokenizer = load_model(path, args.base_model, args.dtype)
        if not models:
            with tempfile.TemporaryDirectory() as folder:
                config = SFTConfig(folder, max_length=args.max_length, use_cpu=True, bf16=False, report_to=[])
                trainer = tokenize_rows(rows, tokenizer, config)
            if len(trainer.train_dataset) == 0:
                fail(f"no row has a token with loss within --max_length {args.max_length}. Give a larger one.")
        loss, tokens = held_out_loss(model, trainer.train_dataset, trainer.data_collator, args.batch_size)
        texts = [prompt["prompt"] for prompt in prompts]
        raw = not tokenizer.chat_template
        answers = generate(model, tokenizer, texts, raw, max_new_tokens=args.max_new_tokens, do_sample=False)
        folder = Path(path).resolve()
        name = "base" if not models else folder.parent.name if folder.name in ("adapter", "model") else path
        models.append({"name": name, "path": path, "loss": loss, "perplexity": math.exp(loss), "answers": answers})
        note = Path(path).parent / "run.json"
        run = read_json(note) if note.is_file() else {}
        if run.get("quantization"):
            models[-1]["loss_quantized"] = run["metrics"].get("eval_loss")
        print(f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}", flush=True)
        del model  # before the next one is loaded

    count = len(trainer.train_dataset)
    report = {"dataset": args.dataset_name, "rows": count, "tokens": tokens, "prompts": prompts, "models": models}
    output_dir = Path(args.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "evaluation.md", format_report(report))
    write_json(output_dir / "evaluation.json", report)
    print(f"The report is {output_dir / 'evaluation.md'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
