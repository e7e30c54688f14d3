# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch==2.13.0",
#     "transformers==5.23.0; python_version >= '3.11'",
#     "transformers==5.20.2; python_version < '3.11'",
#     "trl==1.16.0; python_version >= '3.11'",
#     "trl==1.14.2; python_version < '3.11'",
#     "datasets==5.2.0",
#     "accelerate==1.15.0",
#     "python-dotenv==1.2.4",
# ]
# ///
"""Show which tokens a training run would see and learn from, and stop where the data is wrong.

    python audit_tokens.py --model_name_or_path MODEL --dataset_name DATA --output audit.json

Reads   the tokenizer of MODEL (hub id or folder) and DATA, and takes the options and --config of the training scripts.
Writes  --output, if given and nothing is wrong.
Exits   with status 1 if rows begin with two BOS, or lack the BOS that the tokenizer adds; if the last EOS of a row
        carries no loss, so that the model would not learn to stop; or if rows have no token to learn from.

The rows are tokenized and labelled by SFTTrainer itself.
"""

import argparse
import gc
import hashlib
import json
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field, fields
from pathlib import Path

from dotenv import find_dotenv, load_dotenv

load_dotenv(find_dotenv(usecwd=True))  # HF_TOKEN, HF_HOME: read by the imports below

# What the training scripts set and what changes the tokens or the batches.
PARAMETERS = dict(
    model_name_or_path="meta-llama/Llama-2-7b-chat-hf",
    max_length=1024,
    per_device_train_batch_size=4,
    train_sampling_strategy="group_by_length",
    bf16=False,
    gradient_checkpointing=False,
)


@dataclass
class ScriptArguments:
    dataset_name: str = field(
        default="mlabonne/guanaco-llama2-1k",
        metadata={"help": "Hub id, folder, or .jsonl, .json, .csv or .parquet file."},
    )
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    output: str | None = field(default=None, metadata={"help": "File for the report, JSON."})


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
from datasets import Dataset, load_dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

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


def audit(rows: Dataset, tokenizer, max_length: int | None) -> tuple[dict, list[str]]:
    """Counts over tokenized rows, and what is wrong with them. Row numbers start at 1."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[0] == bos
    double_bos, no_bos, no_eos, no_loss, cut, learned = [], [], [], [], 0, 0
    for number, row in enumerate(rows, 1):
        ids, labels = row["input_ids"], row["labels"]
        if bos is not None and ids[:2] == [bos, bos]:
            double_bos.append(number)
        elif adds_bos and ids[0] != bos:
            no_bos.append(number)
        last_eos = max((place for place, token in enumerate(ids) if token == eos), default=None)
        if last_eos is None or labels[last_eos] == -100:
            no_eos.append(number)
        kept = labels[:max_length]
        cut += len(kept) < len(labels)
        learned += sum(label != -100 for label in kept)
        if all(label == -100 for label in kept):
            no_loss.append(number)
    lengths = [len(ids) for ids in rows["input_ids"]]
    counts = {
        "rows": len(lengths),
        "tokens": sum(min(length, max_length or length) for length in lengths),
        "tokens_with_loss": learned,
        "longest_row": max(lengths),
        "rows_cut_by_max_length": cut,
        "tokenizer_adds_bos": adds_bos,
    }
    problems = {
        "begin with two BOS": double_bos,
        "lack the BOS that the tokenizer adds": no_bos,
        f"have no {tokenizer.eos_token} in the labels: the model would not learn to stop (or: --eos_token)": no_eos,
        "have no token to learn from within --max_length": no_loss,
    }
    return counts, [f"{len(bad)} rows {what} (first: row {bad[0]})" for what, bad in problems.items() if bad]


def show_row(row: dict, tokenizer) -> str:
    """The text of a row; what carries loss is green on a terminal, between [[ and ]] elsewhere."""
    start, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("[[", "]]")
    pieces, place, labels = [], 0, row["labels"]
    while place < len(labels):
        learned = labels[place] != -100
        stop = next((i for i in range(place, len(labels)) if (labels[i] != -100) != learned), len(labels))
        text = tokenizer.decode(row["input_ids"][place:stop])
        pieces.append(f"{start}{text}{end}" if learned else text)
        place = stop
    return "".join(pieces)


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
    parser = TrlParser(
        (ScriptArguments, ModelConfig, SFTConfig),
        usage="%(prog)s [--OPTION VALUE ...] [--config FILE.yaml]",
        description=__doc__,
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--help_all", action="help", help="Show all options.")
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.set_defaults(**PARAMETERS)
    try:
        # Tokens need no accelerator; options of the training scripts that are not known here change no token.
        argv = [*sys.argv[1:], "--use_cpu", "true"]
        script_args, model_args, args = parser.parse_args_and_config(argv, return_remaining_strings=True)[:3]
    except IndexError:
        fail("--config has no file after it. Give --config FILE.yaml, or leave it out.")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"cannot read the file of --config: {error}. Give a YAML file, or leave it out.")
    except Exception as error:  # of YAML, of the values
        fail(f"{' '.join(str(error).split())} See --help.")
    check_positive(args, "per_device_train_batch_size", "max_length")
    args.eval_strategy, args.load_best_model_at_end = "no", False  # nothing is evaluated here

    rows = load_rows(script_args.dataset_name, script_args.dataset_train_split, args.dataset_text_field)
    name = model_args.model_name_or_path
    if not (Path(name, "config.json").is_file() or is_hub_id(name)):
        fail(f"no model at {name!r}. Give a hub id (user/name) or a folder with a config.json.")
    check_files(Path(name))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=model_args.model_revision, trust_remote_code=args.trust_remote_code
        )
    except Exception as error:  # each kind of file raises its own
        fail(f"cannot load the tokenizer of {name!r}: {' '.join(str(error).split())[:300]}")
    if not tokenizer.eos_token:
        fail(f"the tokenizer of {name!r} has no EOS token. Name one as eos_token in its tokenizer_config.json.")
    tokenizer.pad_token = tokenizer.eos_token

    max_length, args.max_length, args.packing, args.padding_free, args.report_to = (
        args.max_length,
        None,
        False,
        False,
        [],
    )
    with tempfile.TemporaryDirectory() as args.output_dir:
        try:
            trainer = tokenize_rows(rows, tokenizer, args)
        except Exception as error:  # of a row, of the chat template: each raises its own
            fail(f"{' '.join(str(error).split())[:600]} Mend the data set, or the chat template of the tokenizer.")
        report, problems = audit(trainer.train_dataset, tokenizer, max_length)
        # The batches of the first epoch, cut as the training script cuts them
        trainer.train_dataset = trainer.train_dataset.map(
            lambda row: {key: row[key][:max_length] for key in ("input_ids", "labels")}
        )
        masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    padding = 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)
    report |= {"max_length": max_length, "batch_size": args.per_device_train_batch_size, "padding_share": padding}

    for key, value in report.items():
        print(f"{key:24} {value:.3f}" if isinstance(value, float) else f"{key:24} {value}")
    number = min(11, len(rows) - 1)
    print(f"\nRow {number} (what is learned is green, or between [[ and ]]):")
    print(show_row(trainer.train_dataset[number], tokenizer))
    if problems:
        fail(f"{'; '.join(problems)}. Mend the data set, or the chat template of the tokenizer.")
    if script_args.output:
        write_json(Path(script_args.output), report)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
