"""Show which tokens a training would see and learn from, and stop where its options, rows or tokenizer are wrong.

    python audit_tokens.py --model_name_or_path MODEL --dataset_name DATA --output audit.json

Reads   config and tokenizer of MODEL (hub id or folder) and DATA, and takes the options and --config of the training.
Writes  --output, if given and nothing is wrong.
Exits   with status 1 where a training would fail later, or learn something else than it should: rows begin with two
        BOS, or lack the BOS that the tokenizer adds; the last EOS of a row carries no loss, so that the model would not
        learn to stop; rows have no token to learn from, or tokens that the model does not know.

The rows are those of 02_train_lora.py, tokenized and labelled by SFTTrainer itself.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from folders import fail, write_json
from records import load_script

training = load_script("02_train_lora.py")  # reads .env, before the imports below look at the environment

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, SFTConfig, SFTTrainer, TrlParser

POSITIVE = ("learning_rate", "num_train_epochs", "max_length", "save_steps", "gradient_accumulation_steps")
POSITIVE += ("per_device_train_batch_size", "per_device_eval_batch_size")
REFUSED = {
    "resume_from_checkpoint": "an interrupted run goes on by itself",
    "save_only_model": "nothing could go on from such a checkpoint. To save room: --save_strategy no",
    "dataloader_persistent_workers": "a run that is gone on with would draw other dropout masks",
    "ignore_data_skip": "an interrupted run would see other rows than one that was not",
    "push_to_hub": "the training uploads nothing. Afterwards: push_model.py --help (make push)",
    "hub_token": "every user of this machine could read it there. Put HF_TOKEN=<token> into .env instead",
}


@dataclass
class Arguments(training.Arguments):
    output: str | None = field(default=None, metadata={"help": "File for the report, JSON."})


def read_options() -> tuple[Arguments, ModelConfig, SFTConfig]:
    """The options of a training, checked."""
    parser = TrlParser(
        (Arguments, ModelConfig, SFTConfig), usage="%(prog)s [--OPTION VALUE ...] [--config FILE.yaml]",
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.set_defaults(**training.PARAMETERS)
    try:
        script_args, model_args, args = parser.parse_args_and_config(["--use_cpu", "true", *sys.argv[1:]])
    except IndexError:
        fail("--config has no file after it. Give --config FILE.yaml, or leave it out.")
    except Exception as error:  # of the file, of YAML, of a value
        fail(f"cannot read the options, or --config: {' '.join(str(error).split()).rstrip('.')}. See --help.")
    for name in POSITIVE:
        value = getattr(args, name)
        if (name, value) != ("max_length", None) and not (isinstance(value, int | float) and value > 0):
            fail(f"--{name} is {value!r}. Give a number above 0.")
    if args.weight_decay < 0:
        fail(f"--weight_decay is {args.weight_decay}: weights would grow. Give 0 or more.")
    for name, reason in REFUSED.items():
        if getattr(args, name):
            fail(f"--{name} is refused: {reason}. Leave it out.")
    return script_args, model_args, args


def load_tokenizer(name: str, **hub) -> tuple:
    """The tokenizer, and the number of tokens that the model knows; stops at what cannot be trained here."""
    tokenizer, config = AutoTokenizer.from_pretrained(name, **hub), AutoConfig.from_pretrained(name, **hub)
    if not tokenizer.eos_token:
        fail(f"the tokenizer of {name!r} has no EOS token. Name one as eos_token in its tokenizer_config.json.")
    text = config.get_text_config()
    settings = text.to_dict()
    if settings.get("is_causal") is False or settings.get("use_bidirectional_attention") in (True, "all"):
        fail(f"{name!r} looks both ways: its tokens see those that come after. Give a causal language model.")
    return tokenizer, text.vocab_size


def tokenize_rows(rows: Dataset, held_out: Dataset | None, tokenizer, args: SFTConfig) -> SFTTrainer:
    """A trainer that holds the rows as it tokenizes and labels them. A model 8 wide stands in: only tokens matter."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ids))
    return SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)


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


def check_parts(trainer: SFTTrainer, name: str, vocabulary: int, max_length: int | None) -> None:
    """Stops at a token that the model does not know, and where nothing could be measured on held-out rows."""
    for part in (trainer.train_dataset, trainer.eval_dataset):
        if part and max(max(ids) for ids in part["input_ids"]) >= vocabulary:
            fail(f"the tokenizer of {name!r} has tokens that the model has no embedding of. Give it its own tokenizer.")
    held_out = trainer.eval_dataset
    if held_out and all(label == -100 for labels in held_out["labels"] for label in labels[1:max_length]):
        fail(f"no held-out row has a token with loss within --max_length {max_length}. Give a larger one.")


def measure_padding(trainer: SFTTrainer, max_length: int | None) -> float:
    """Share of padding in the batches of the first epoch, whose rows are cut as the training cuts them."""
    rows = trainer.train_dataset
    trainer.train_dataset = rows.map(lambda row: {key: row[key][:max_length] for key in ("input_ids", "labels")})
    masks = [batch["attention_mask"] for batch in trainer.get_train_dataloader()]
    return 1 - sum(mask.sum().item() for mask in masks) / sum(mask.numel() for mask in masks)


def show_row(row: dict, tokenizer) -> str:
    """The text of a row; what carries loss is green on a terminal, between [[ and ]] elsewhere."""
    start, end = ("\033[32m", "\033[0m") if sys.stdout.isatty() and "NO_COLOR" not in os.environ else ("[[", "]]")
    pieces = []
    for learned, part in groupby(zip(row["input_ids"], row["labels"], strict=True), lambda pair: pair[1] != -100):
        text = tokenizer.decode([token for token, _ in part])
        pieces.append(f"{start}{text}{end}" if learned else text)
    return "".join(pieces)


def main() -> None:
    script_args, model_args, args = read_options()
    name, data, max_length = model_args.model_name_or_path, script_args.dataset_name, args.max_length
    hub = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    tokenizer, vocabulary = load_tokenizer(name, **hub)
    splits = (script_args.dataset_train_split, script_args.dataset_test_split)
    rows, held_out = (each and training.load_rows(data, each, tokenizer, args.dataset_text_field) for each in splits)

    # Nothing is cut, packed, evaluated or computed here
    vars(args).update(max_length=None, packing=False, eval_packing=False, padding_free=False, use_liger_kernel=False)
    vars(args).update(eval_strategy="no", load_best_model_at_end=False, report_to=[])
    with tempfile.TemporaryDirectory() as args.output_dir:
        trainer = tokenize_rows(rows, held_out, tokenizer, args)
        check_parts(trainer, name, vocabulary, max_length)
        report, problems = audit(trainer.train_dataset, tokenizer, max_length)
        padding = measure_padding(trainer, max_length)
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
    main()
