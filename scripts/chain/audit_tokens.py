"""Show which tokens a training would see and learn from, and stop where its options, rows or tokenizer are wrong.

    python audit_tokens.py --model_name_or_path MODEL --dataset_name DATA --output audit.json

Reads   config and tokenizer of MODEL (hub id or folder) and DATA, and takes the options and --config of the training.
Writes  --output, if given and nothing is wrong, and beside it a file .options: those that the model needs besides.
Exits   with status 1 where a training would fail later, or where more than one row in ten teaches something else than
        it should: the chat template goes around what has a format already, or leaves parts out; BOS or EOS stands
        twice; EOS, an answer or its end is missing. Of fewer rows it warns, and of rows that --max_length cuts.

The rows are those of 02_train_lora.py, tokenized and labelled by SFTTrainer itself.
"""

import argparse
import contextlib
import functools
import math
import os
import sys
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from folders import fail, write_json, write_text
from look_at_rows import ENDS_ASKING, FOREIGN, NO_END, check_row, list_turns, look_at_rows, read_tools
from read_rows import refuse_other_rows
from records import load_script

training = load_script("02_train_lora.py")  # reads .env, before the imports below look at the environment

from datasets import Dataset
from fit_options import fit_options
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser

MANY = 0.1  # share of the rows: with more of them a fault stops the training
# What may be wrong with tokens, and what to do.
TWICE = "have {} twice, with nothing between: take one out of the rows, the chat template, or what the "
TWICE += "tokenizer adds; a text that ends with it has no blank after it"
NO_BOS = "lack the BOS that the tokenizer adds to texts: let the chat template begin with it, if the model "
NO_BOS += "was trained so"
NO_EOS = "have no {} in the labels, and the model would not learn to stop: mend them or the chat template{}"
NO_LOSS = "have no token to learn from within --max_length {}: give a larger one"
CUT = "lose their end and its EOS to --max_length {}: {}"
CUT_TEXT = CUT + ", and --packing true --packing_strategy bfd_split learns all parts of long ones"
PROMPT = "are asked with other tokens than those before their answer in the training: let the chat template write both "
PROMPT += "alike, and end neither its beginning of an answer nor a prompt with a blank"
EARLIER = "have answers that the chat template writes otherwise once a question follows, such as without reasoning: "
EARLIER += "both forms are learned, unless each answer is a row of its own, prompt and completion"
WARNED = {ENDS_ASKING, FOREIGN, NO_BOS, PROMPT, EARLIER}  # these never stop a training, and CUT_TEXT
POSITIVE = ("learning_rate", "num_train_epochs", "max_length", "save_steps", "gradient_accumulation_steps")
POSITIVE += ("per_device_train_batch_size", "per_device_eval_batch_size")
REFUSED = {
    "resume_from_checkpoint": "an interrupted run goes on by itself",
    "save_only_model": "nothing could go on from such a checkpoint. To save room: --save_strategy no",
    "dataloader_persistent_workers": "a run that is gone on with would draw other dropout masks",
    "ignore_data_skip": "an interrupted run would see other rows than one that was not",
    "dataloader_drop_last": "held-out rows would be left out of their loss",
    "dataset_config": "other rows would be learned. Name a folder or a file of these",
    "dataset_streaming": "rows are counted and held out here",
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
        if (vars(script_args) | vars(args))[name]:
            fail(f"--{name} is refused: {reason}. Leave it out.")
    if (file := args.chat_template_path) and not (Path(file).is_file() and file.endswith((".jinja", ".j2"))):
        fail(f"--chat_template_path {file} is no .jinja file. Give one, such as the chat_template.jinja of a model.")
    return script_args, model_args, args


def load_tokenizer(name: str, **hub) -> tuple:
    """The tokenizer, the config of the text model, and the tokens at which it stops; exits where it cannot be trained
    here."""
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
    return tokenizer, text, {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}


def tokenize_rows(rows: Dataset, held_out: Dataset | None, tokenizer, args: SFTConfig) -> SFTTrainer:
    """A trainer that holds the rows as it tokenizes and labels them. A model 8 wide stands in: only tokens matter."""
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **ids))
    try:
        return SFTTrainer(model=model, args=args, train_dataset=rows, eval_dataset=held_out, processing_class=tokenizer)
    except Exception:
        for name, part in (("row", rows), ("held-out row", held_out or [])):
            for number, row in enumerate(part, 1):
                check_row(f"{name} {number}", row, tokenizer)
        if args.assistant_only_loss and "{% generation" not in str(tokenizer.chat_template):
            reason = "--assistant_only_loss, and the chat template does not mark the answers with {% generation %}"
            fail(f"{reason}. Give one that does, --chat_template_path FILE (docs/tutorial.md has one for ChatML).")
        raise


def check_kind(data: str, split: str) -> None:
    """Stops at rows that are for another kind of training."""
    file = Path(data).absolute()
    source = {"path": str(file.parent), "data_files": {"train": file.name}} if file.is_file() else {"path": data}
    with contextlib.suppress(Exception):  # load_rows says what is wrong
        refuse_other_rows(data, training.load_dataset(**source, split=split).column_names)


def find_part(args: SFTConfig) -> slice:
    """The part of a row that is left of it; where rows are packed in parts, all."""
    longest = None if args.packing and args.packing_strategy != "bfd" else args.max_length
    keep_end = longest and not args.packing and args.truncation_mode == "keep_end"
    return slice(-longest, None) if keep_end else slice(longest)


def look_at_tokens(
    rows: Dataset, tokenizer, args: SFTConfig, ends: set[int], places: int | None = None
) -> tuple[dict, dict[str, list[int]]]:
    """Counts over tokenized rows that are not cut yet; what is wrong with them as they are cut, and their numbers.
    places: the most tokens that the model takes."""
    bos, eos, part, longest = tokenizer.bos_token_id, tokenizer.eos_token_id, find_part(args), args.max_length
    adds_bos = bos is not None and tokenizer("a").input_ids[0] == bos
    is_blank = functools.cache(lambda token: not tokenizer.decode([token]).strip())
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - {bos}
    lengths = sorted(map(len, rows["input_ids"]))
    enough = lengths[math.ceil(0.99 * len(lengths)) - 1]
    whole = f"--max_length {enough} keeps 99 % of the rows whole"
    whole = whole if enough <= (places or enough) else f"the model has places for {places}: make them shorter"
    cut_end = (CUT_TEXT if args.dataset_text_field in rows.column_names else CUT).format(longest, whole)
    problems, last_tokens, kept, learned, cut, ended = defaultdict(list), Counter(), 0, 0, 0, 0
    for number, row in enumerate(rows, 1):
        ids, labels = row["input_ids"], row["labels"]
        kept, cut = kept + len(labels[part]), cut + (len(labels[part]) < len(labels))
        learned += (loss := len(labels[part]) - labels[part].count(-100))
        for token in {bos, eos} - {None}:
            words = [each for each in ids if not is_blank(each)] if ids.count(token) > 1 else []
            words = words[-2:] if bos == eos else words  # it may end a turn and begin one
            if any(pair == (token, token) for pair in zip(words, words[1:], strict=False)):
                problems[TWICE.format(tokenizer.decode([token]))].append(number)
        if adds_bos and ids[:1] != [bos]:
            problems[NO_BOS].append(number)
        last = next(
            (place for place in reversed(range(len(ids))) if ids[place] in ends and labels[place] != -100), None
        )
        if last is None:
            problems[NO_EOS].append(number)
            last_tokens.update([label for label in labels if label in special][-1:])
        elif last in range(len(ids))[part]:
            ended += 1
        else:
            problems[cut_end].append(number)
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
        "lengths_by_tenths": [lengths[tenth * (len(lengths) - 1) // 10] for tenth in range(11)],
        "rows_cut_by_max_length": cut,
        "rows_that_keep_their_end": ended,
        "share_of_tokens_cut": 1 - kept / max(sum(lengths), 1),
        "max_length_for_99_percent": enough,
        "tokenizer_adds_bos": adds_bos,
    }, problems


def look_at_prompts(rows: Dataset, tokenized: Dataset, tokenizer, most: int = 1000) -> list[int]:
    """Numbers of the first rows whose last answer is asked for with other tokens than stand before it in the row."""
    numbers = []
    for number, row in enumerate(rows.select(range(min(most, len(rows)))), 1):
        asked, rest, words = [], "", ""
        if turns := list_turns(row):
            last = max((place for place, turn in enumerate(turns) if turn["role"] == "assistant"), default=0)
            write = functools.partial(tokenizer.apply_chat_template, tools=read_tools(row), return_dict=False)
            with contextlib.suppress(Exception):  # a template may not take a conversation that is cut
                before, prompt = (write(turns[:last], tokenize=False, add_generation_prompt=ask) for ask in (0, 1))
                if before == prompt and isinstance(turns[last]["content"], str):  # the answer begins with no name
                    words = turns[last]["content"].strip()[:9]
                    rest = write(turns[: last + 1], tokenize=False)[len(before) :].lstrip()
                asked = write(turns[:last], add_generation_prompt=True)
        elif "prompt" in row:
            asked = tokenizer(row["prompt"]).input_ids
        if tokenized[number - 1]["input_ids"][: len(asked)] != asked or not rest.startswith(words):
            numbers.append(number)
    return numbers


def look_at_earlier_answers(rows: Dataset, tokenizer, most: int = 1000) -> list[int]:
    """Numbers of the first rows of messages whose first answer is written otherwise where the conversation goes on."""
    numbers = []
    for number, row in enumerate(rows.select(range(min(most, len(rows)))), 1):
        turns = list_turns(row) if "messages" in row else []
        places = [place for place, turn in enumerate(turns, 1) if turn["role"] == "assistant"]
        with contextlib.suppress(Exception):  # a template may not take a conversation that is cut
            write = functools.partial(tokenizer.apply_chat_template, tools=read_tools(row), tokenize=False)
            if len(places) > 1 and not write(turns).startswith(write(turns[: places[0]])):
                numbers.append(number)
    return numbers


def report_problems(problems: dict[str, list[int]], rows: int, kind: str = "") -> None:
    """Warns of what is wrong with few rows, or with held-out ones; stops where it is with many, or where no row keeps
    its end."""
    wrong = []
    for what, bad in problems.items():
        line = f"{len(bad)} of {rows} {kind}rows {what} (first: {kind}row {bad[0]})"
        most = rows if what in WARNED or "bfd_split" in what else rows - 1 if "--max_length" in what else MANY * rows
        most = rows if kind else most
        if len(bad) > most:
            wrong.append(line)
        else:
            print(f"warning: {line}")
    if wrong:
        fail(". ".join(wrong) + ".")


def check_model(trainer: SFTTrainer, name: str, text, args: SFTConfig) -> None:
    """Stops at a token or a place that the model does not know, and where nothing could be measured."""
    vocabulary, places, part = text.vocab_size, getattr(text, "max_position_embeddings", None), find_part(args)
    longest = max(len(ids[part]) for ids in trainer.train_dataset["input_ids"])
    if places and min(longest, args.max_length or longest) > places > 0:
        fail(f"a row has {longest} tokens, and {name!r} places for {places}. Give --max_length {places}")
    for rows in (trainer.train_dataset, trainer.eval_dataset):
        if rows and max(max(ids, default=0) for ids in rows["input_ids"]) >= vocabulary:
            fail(f"the tokenizer of {name!r} has tokens that the model has no embedding of. Give it its own tokenizer.")
    if (tokenizer := trainer.processing_class).pad_token_id >= vocabulary:
        advice = f"Add: --pad_token '{tokenizer.eos_token}'"
        fail(f"the tokenizer of {name!r} pads with a token that the model has no embedding of. {advice}")
    held_out = trainer.eval_dataset
    if held_out and all(label == -100 for labels in held_out["labels"] for label in labels[1:][part]):
        fail(f"no held-out row has a token with loss within --max_length {args.max_length}. Give a larger one.")


def measure_padding(trainer: SFTTrainer, part: slice) -> float:
    """Share of padding in the batches of the first epoch, whose rows are cut as the training cuts them."""
    lengths = [len(range(len(ids))[part]) for ids in trainer.train_dataset["input_ids"]]
    batches = [[lengths[row] for row in batch] for batch in trainer.get_train_dataloader().batch_sampler]
    multiple = trainer.args.pad_to_multiple_of or 1
    return 1 - sum(lengths) / max(sum(-(-max(batch) // multiple) * multiple * len(batch) for batch in batches), 1)


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
    name, data = model_args.model_name_or_path, script_args.dataset_name
    hub = {"revision": model_args.model_revision, "trust_remote_code": args.trust_remote_code}
    if Path(name).exists() and hub["revision"] != "main":
        fail(f"--model_revision is of a hub model, and {name!r} is a folder. Give it to make download, in ARGS.")
    tokenizer, config, ends = load_tokenizer(name, **hub)
    options, max_length = fit_options(name, config, model_args, args), args.max_length
    splits = (script_args.dataset_train_split, script_args.dataset_test_split)
    check_kind(data, splits[0])
    rows, held_out = (each and training.load_rows(data, each, tokenizer, args) for each in splits)
    if args.eos_token in tokenizer.get_vocab():
        ends.add(tokenizer.convert_tokens_to_ids(args.eos_token))
    if args.completion_only_loss and "prompt" not in rows.column_names:
        fail("--completion_only_loss, and the rows have no prompt. Leave it out; messages: --assistant_only_loss true")
    words = set(map(tokenizer.decode, ends))
    problems, held_out_problems = (
        look_at_rows(part or [], tokenizer, words, args.assistant_only_loss, kind)
        for part, kind in ((rows, ""), (held_out, "held-out "))
    )

    # Nothing is cut, packed, evaluated or computed here
    asked = argparse.Namespace(**vars(args))
    vars(args).update(max_length=None, packing=False, eval_packing=False, padding_free=False, use_liger_kernel=False)
    vars(args).update(eval_strategy="no", load_best_model_at_end=False, report_to=[], shuffle_dataset=False)
    with tempfile.TemporaryDirectory() as args.output_dir:
        trainer = tokenize_rows(rows, held_out, tokenizer, args)
        check_model(trainer, name, config, asked)
        places = getattr(config, "max_position_embeddings", None)
        report, of_tokens = look_at_tokens(trainer.train_dataset, tokenizer, asked, ends, places)
        if held_out:
            held_out_problems |= look_at_tokens(trainer.eval_dataset, tokenizer, asked, ends, places)[1]
        padding = measure_padding(trainer, find_part(asked))
    report |= {"max_length": max_length, "batch_size": args.per_device_train_batch_size, "padding_share": padding}
    for key, value in report.items():
        print(f"{key:25} {value:.3f}" if isinstance(value, float) else f"{key:25} {value}")
    number = min(11, len(rows) - 1)
    print(f"\nRow {number}, counted from 0 (what is learned is green, or between [[ and ]]):")
    print(show_row(trainer.train_dataset[number], tokenizer))
    if "strftime_now" in str(tokenizer.chat_template):
        print("note: the chat template writes today's date. Tomorrow the same rows have other tokens, for a training")
        print("that goes on then, make evaluate and make reproduce. Without a date: --chat_template_path FILE")
    if differ := look_at_prompts(rows, trainer.train_dataset, tokenizer):
        problems[PROMPT] = differ
    if differ := look_at_earlier_answers(rows, tokenizer):
        problems[EARLIER] = differ
    problems |= of_tokens
    for each in (problems, held_out_problems):
        if any("in the labels" in what for what in each):  # which says what to do
            each.pop(NO_END, None)
    report_problems(held_out_problems, len(held_out or []), "held-out ")
    report_problems(problems, len(rows))
    if script_args.output:
        write_json(Path(script_args.output), report)
        write_text(Path(script_args.output).with_suffix(".options"), " ".join(options) + "\n")


if __name__ == "__main__":
    main()
