"""Show which tokens a training would see and learn from, and stop where its options, rows or tokenizer are wrong.

    python audit_tokens.py --model_name_or_path MODEL --dataset_name DATA --output audit.json

Reads   config and tokenizer of MODEL (hub id or folder) and DATA, and takes the options and --config of the training.
Writes  --output, if given and nothing is wrong.
Exits   with status 1 where a training would fail later, or where more than one row in ten teaches something else than
        it should: the chat template goes around what has a format already, or leaves tool calls out; BOS or EOS stands
        twice, or is missing; an answer is empty or missing. Of fewer rows it warns, and of rows that --max_length cuts.

The rows are those of 02_train_lora.py, tokenized and labelled by SFTTrainer itself.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from folders import fail, write_json
from read_rows import refuse_other_rows
from records import load_script

training = load_script("02_train_lora.py")  # reads .env, before the imports below look at the environment

from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

SAID = {"role", "content"}  # keys of a message; others are tool calls, reasoning
MANY = 0.1  # share of the rows: with more of them a fault stops the training
# What may be wrong with rows, and what to do.
EMPTY = "have an empty question or answer: leave them out"
NO_ANSWER = "do not end with an answer of the assistant: add it, or leave them out"
FORMATTED = (
    "have a format already, and the chat template goes around it: take its marks out of prompt and answer, or join "
)
FORMATTED += "both in one column, text"
NO_TOOLS = "have {}, which the chat template leaves out: give one that writes them, --chat_template_path FILE"
TWICE = "have {} twice: take one out of the rows or of the chat template"
NO_BOS = "lack the BOS that the tokenizer adds: let the chat template begin with it"
NO_EOS = "have no {} in the labels, and the model would not learn to stop: mend them or the chat template{}"
NO_LOSS = "have no token to learn from within --max_length {}: give a larger one"
CUT = "lose their end and its EOS to --max_length {}: --max_length {} keeps 99 % of the rows whole"
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
class Arguments(ScriptArguments):
    output: str | None = field(default=None, metadata={"help": "File for the report, JSON."})


def read_options() -> tuple[Arguments, ModelConfig, SFTConfig]:
    """The options of a training, checked."""
    parser = TrlParser(
        (Arguments, ModelConfig, training.Config), usage="%(prog)s [--OPTION VALUE ...] [--config FILE.yaml]",
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
    if (template := args.chat_template_path) and not Path(template).is_file():
        fail(f"--chat_template_path {template} is no file. Give one, such as the chat_template.jinja of a model.")
    return script_args, model_args, args


def load_tokenizer(name: str, **hub) -> tuple:
    """The tokenizer, the number of tokens that the model knows, and those at which it stops; exits where it cannot be
    trained here."""
    tokenizer, config = AutoTokenizer.from_pretrained(name, **hub), AutoConfig.from_pretrained(name, **hub)
    if not tokenizer.eos_token:
        fail(f"the tokenizer of {name!r} has no EOS token. Name one as eos_token in its tokenizer_config.json.")
    text = config.get_text_config()
    settings = text.to_dict()
    if settings.get("is_causal") is False or settings.get("use_bidirectional_attention") in (True, "all"):
        fail(f"{name!r} looks both ways: its tokens see those that come after. Give a causal language model.")
    ends = text.eos_token_id
    with contextlib.suppress(OSError):  # there may be no such file
        ends = GenerationConfig.from_pretrained(name, revision=hub["revision"]).eos_token_id
    return tokenizer, text.vocab_size, {*ends} if isinstance(ends, list) else {ends}


def list_turns(row: dict) -> list[dict]:
    """The messages of a row; none where it is of texts."""
    turns = row["messages"] if "messages" in row else [*row.get("prompt", ""), *row.get("completion", "")]
    return turns if turns and isinstance(turns[0], dict) else []


def render(number: int, row: dict, tokenizer, without: str = "") -> str:
    """The messages of a row as the chat template writes them, without one of their keys, or without tools."""
    turns = [{key: value for key, value in turn.items() if key != without} for turn in list_turns(row)]
    tools = None if without == "tools" else row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    try:
        return tokenizer.apply_chat_template(turns, tools=tools, tokenize=False) if turns else ""
    except Exception as error:  # a template may raise anything
        calls = ", and its tool calls" if any(turn.get("tool_calls") for turn in turns) else ""
        fail(f"row {number}: the chat template does not take it{calls}: {error}. Mend it or the template.")


def tokenize_rows(rows: Dataset, held_out: Dataset | None, tokenizer, args: SFTConfig) -> SFTTrainer:
    """A trainer that holds the rows as it tokenizes and labels them. A model 8 wide stands in: only tokens matter."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ids))
    try:
        return SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
    except Exception:
        for number, row in enumerate(rows, 1):
            render(number, row, tokenizer)
        raise


def check_kind(data: str, split: str) -> None:
    """Stops at rows that are for another kind of training."""
    file = Path(data).absolute()
    source = {"path": str(file.parent), "data_files": {"train": file.name}} if file.is_file() else {"path": data}
    with contextlib.suppress(Exception):  # load_rows says what is wrong
        refuse_other_rows(data, training.load_dataset(**source, split=split).column_names)


def list_marks(tokenizer) -> set[str]:
    """What has no place in a message: special tokens, and what the chat template writes around messages."""
    marks = set(tokenizer.all_special_tokens)
    with contextlib.suppress(Exception):  # a template may want other messages than these
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False).replace("ANSWER", "QUESTION")
        marks |= {part.strip() for part in text.split("QUESTION")}
    return {mark for mark in marks if len(mark) > 2 and re.search(r"[^\w\s:.,]", mark)}  # no mere words


def look_at_text(rows: Dataset, tokenizer) -> dict[str, list[int]]:
    """What is wrong with rows before they are tokenized, and the numbers of these, from 1."""
    problems, marks = defaultdict(list), list_marks(tokenizer) if tokenizer.chat_template else set()
    for number, row in enumerate(rows, 1):
        turns = list_turns(row)
        if not turns:
            if "completion" in row and not row["completion"].strip():
                problems[EMPTY].append(number)
            continue
        for turn in turns:
            parts = turn["content"] if isinstance(turn.get("content"), list) else []
            if kinds := {str(part.get("type")) for part in parts} - {"text"}:
                fail(f"row {number} holds {', '.join(kinds)}, and text alone is trained here. Leave it out.")
        said = [str(turn.get("content") or "").strip() for turn in turns]
        if turns[-1].get("role") != "assistant":
            problems[NO_ANSWER].append(number)
        if any(
            not text and turn.get("role") in ("user", "assistant") and not any(turn[key] for key in turn.keys() - SAID)
            for text, turn in zip(said, turns, strict=True)
        ):
            problems[EMPTY].append(number)
        if any(mark in text for text in said for mark in marks):
            problems[FORMATTED].append(number)
        for key in (key for key in ("tool_calls", "tools") if any(each.get(key) for each in (row, *turns))):
            if render(number, row, tokenizer) == render(number, row, tokenizer, key):
                problems[NO_TOOLS.format(key)].append(number)
    return problems


def look_at_tokens(rows: Dataset, tokenizer, args: SFTConfig, ends: set[int]) -> tuple[dict, dict[str, list[int]]]:
    """Counts over tokenized rows that are not cut yet; what is wrong with them as they are cut, and their numbers."""
    bos, eos, longest = tokenizer.bos_token_id, tokenizer.eos_token_id, args.max_length
    adds_bos = bos is not None and tokenizer("a").input_ids[0] == bos
    is_blank = functools.cache(lambda token: not tokenizer.decode([token]).strip())
    if args.packing and args.packing_strategy != "bfd":  # parts of long rows are learned too
        longest = None
    part = slice(-longest, None) if longest and args.truncation_mode == "keep_end" else slice(longest)
    lengths = sorted(map(len, rows["input_ids"]))
    enough = lengths[math.ceil(0.99 * len(lengths)) - 1]
    special = {*tokenizer.all_special_ids}
    problems, last_tokens, kept, learned, cut, ended = defaultdict(list), Counter(), 0, 0, 0, 0
    for number, row in enumerate(rows, 1):
        ids, labels = row["input_ids"], row["labels"]
        kept, cut = kept + len(labels[part]), cut + (len(labels[part]) < len(labels))
        learned += (loss := len(labels[part]) - labels[part].count(-100))
        for token in {bos, eos} - {None} if bos != eos else ():  # where they are one, it may end a turn and begin one
            words = [each for each in ids if not is_blank(each)] if ids.count(token) > 1 else ()
            if any(pair == (token, token) for pair in zip(words, words[1:], strict=False)):
                problems[TWICE.format(tokenizer.decode([token]))].append(number)
        if adds_bos and ids[0] != bos:
            problems[NO_BOS].append(number)
        last = next((place for place in reversed(range(len(ids))) if ids[place] in ends), None)
        if last is None or labels[last] == -100:
            problems[NO_EOS].append(number)
            last_tokens.update([label for label in labels if label in special][-1:])
        else:
            ended += last in range(len(ids))[part]
            if last not in range(len(ids))[part]:
                problems[CUT.format(longest, enough)].append(number)
        if not loss:
            problems[NO_LOSS.format(longest)].append(number)
    if NO_EOS in problems:
        other = tokenizer.decode([last_tokens.most_common(1)[0][0]]) if last_tokens else ""
        advice = f", or add --eos_token '{other}', which stands there" if other else ""
        problems[NO_EOS.format(tokenizer.eos_token, advice)] = problems.pop(NO_EOS)
    return {
        "rows": len(lengths),
        "tokens": kept,
        "tokens_with_loss": learned,
        "longest_row": lengths[-1],
        "rows_cut_by_max_length": cut,
        "rows_that_keep_their_end": ended,
        "share_of_tokens_cut": 1 - kept / sum(lengths),
        "max_length_for_99_percent": enough,
        "tokenizer_adds_bos": adds_bos,
    }, problems


def report_problems(problems: dict[str, list[int]], rows: int) -> None:
    """Warns of what is wrong with few rows; stops where it is with many, or where no row keeps its end."""
    wrong = []
    for what, bad in problems.items():
        line = f"{len(bad)} of {rows} rows {what} (first: row {bad[0]})"
        if len(bad) > (rows - 1 if what.startswith("lose their end") else MANY * rows):
            wrong.append(line)
        else:
            print(f"warning: {line}")
    if wrong:
        fail(". ".join(wrong) + ".")


def check_vocabulary(trainer: SFTTrainer, name: str, vocabulary: int, max_length: int | None) -> None:
    """Stops at a token that the model does not know, and where nothing could be measured on held-out rows."""
    for part in (trainer.train_dataset, trainer.eval_dataset):
        if part and max(map(max, part["input_ids"])) >= vocabulary:
            fail(f"the tokenizer of {name!r} has tokens that the model has no embedding of. Give it its own tokenizer.")
    if (tokenizer := trainer.processing_class).pad_token_id >= vocabulary:
        advice = f"Add: --pad_token '{tokenizer.eos_token}'"
        fail(f"the tokenizer of {name!r} pads with a token that the model has no embedding of. {advice}")
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
    tokenizer, vocabulary, ends = load_tokenizer(name, **hub)
    splits = (script_args.dataset_train_split, script_args.dataset_test_split)
    check_kind(data, splits[0])
    rows, held_out = (each and training.load_rows(data, each, tokenizer, args) for each in splits)
    problems = look_at_text(rows, tokenizer)

    # Nothing is cut, packed, evaluated or computed here
    asked = argparse.Namespace(**vars(args))
    vars(args).update(max_length=None, packing=False, eval_packing=False, padding_free=False, use_liger_kernel=False)
    vars(args).update(eval_strategy="no", load_best_model_at_end=False, report_to=[], shuffle_dataset=False)
    with tempfile.TemporaryDirectory() as args.output_dir:
        trainer = tokenize_rows(rows, held_out, tokenizer, args)
        check_vocabulary(trainer, name, vocabulary, max_length)
        report, of_tokens = look_at_tokens(trainer.train_dataset, tokenizer, asked, ends | {tokenizer.eos_token_id})
        padding = measure_padding(trainer, max_length)
    report |= {"max_length": max_length, "batch_size": args.per_device_train_batch_size, "padding_share": padding}
    for key, value in report.items():
        print(f"{key:25} {value:.3f}" if isinstance(value, float) else f"{key:25} {value}")
    number = min(11, len(rows) - 1)
    print(f"\nRow {number} (what is learned is green, or between [[ and ]]):")
    print(show_row(trainer.train_dataset[number], tokenizer))
    if "strftime_now" in str(tokenizer.chat_template):
        print(
            "note: the chat template writes today's date. Tomorrow the same rows have other tokens: for a training that"
        )
        print("goes on then, for make evaluate and make reproduce. Without a date: --chat_template_path FILE")
    report_problems(problems | of_tokens, len(rows))
    if script_args.output:
        write_json(Path(script_args.output), report)


if __name__ == "__main__":
    main()
