"""Fetch a data set, and turn the rows that people have into rows that are trained on; say how they were read.

    python read_rows.py --dataset_name DATA [--columns question:prompt,answer:completion] --output_dir out

Reads   DATA: a file, a folder or a hub id; with --rows no more of it than so many rows.
Writes  out/train.jsonl and, where rows are held out, out/validation.jsonl: text, messages, or prompt and completion;
        and out/run.json, which says what they are. Takes the options of 01_download.py too.
"""

import contextlib
import hashlib
import json
import re
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from itertools import islice
from pathlib import Path

from folders import fail
from records import load_script

download = load_script("01_download.py")  # reads .env, before the imports below look at the environment

from find_rows import KINDS, Part, find_kind, find_rows
from messages import join_parts, read_history, to_messages

# Pairs of columns that are a prompt and its completion, the first that is there; INPUTS are added to the prompt.
PAIRS = (("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("question", "answer"))
PAIRS += (("question", "response"), ("prompt", "response"), ("query", "response"), ("problem", "solution"))
PAIRS += (("input", "output"), ("q", "a"), ("prompt", "answer"), ("prompt", "output"), ("context", "response"))
INPUTS, SYSTEMS = ("input", "context"), ("system", "system_prompt", "systeminstruction")
# Columns of conversations, and how their rows are called.
CHATS = {"messages": "messages", "conversations": "ShareGPT", "contents": "Gemini"}
CHATS |= dict.fromkeys(("conversation", "dialog", "dialogue"), "chats")
NEW = ("text", "messages", "prompt", "completion", "system", "tools", "instruction", "input", "output")  # of --columns
# Rows that are for something else, by their columns.
IMAGES = "with images, and text alone is trained here. Give rows of text"
OTHER = {
    ("chosen", "rejected"): "of preferences, as DPO learns from. Take what was chosen: --columns chosen:completion "
    "(make: COLUMNS=), or chosen:messages where it is whole conversations",
    ("prompt", "completion", "label"): "of answers marked good or bad, as KTO learns from. Keep the good ones; where "
    "label is another thing: --columns prompt:prompt,completion:completion (make: COLUMNS=)",
    ("images",): IMAGES,
    ("image",): IMAGES,
    ("question", "choices"): "of multiple choice. Write the right one out as answer, or, where it is a text, name it: "
    "--columns question:prompt,answer:completion (make: COLUMNS=)",
    ("message_id", "parent_id"): "of a tree of messages, each with the one before it. Give whole conversations",
}
MANY = 0.1  # share of the rows: with more of them empty it is another fault


@dataclass
class Arguments(download.Arguments):
    dataset_config: str | None = field(default=None, metadata={"help": "Part of a data set, such as main of gsm8k."})
    dataset_train_split: str | None = field(default=None, metadata={"help": "Split to train on, such as train_sft."})
    dataset_test_split: str | None = field(default=None, metadata={"help": "Split to hold out, such as test_sft."})
    columns: str | None = field(default=None, metadata={"help": f"OLD:NEW,OLD:NEW; NEW is one of {', '.join(NEW)}."})
    rows: int | None = field(default=None, metadata={"help": "So many rows of each split, the first."})


def refuse_other_rows(name: str, columns: list[str]) -> None:
    """Stops at rows that are for another kind of training."""
    for kind, what in OTHER.items():
        if {*columns} >= {*kind}:
            fail(f"{name!r} has the columns {columns}: rows {what}.")


def is_listed(value) -> bool:
    return isinstance(value, list) and isinstance((value or [{}])[0], dict)


def to_text(row: dict, keys: list[str]) -> str:
    for key in keys:
        if isinstance(row.get(key), bool) or not isinstance(row.get(key), str | int | None):
            raise ValueError(f"{row[key]!r} in {key} is no text. Put it in quotes, or a word beside it")
    return "\n\n".join(str(row[key]) for key in keys if row.get(key) not in (None, ""))


def is_empty(new: dict) -> bool:
    """Whether a prompt, an answer, or all of a row has no words."""
    said = []
    for value in (value for key, value in new.items() if key != "tools"):
        turns = value if isinstance(value, list) else [{"content": value}]
        rest = [any(turn[key] for key in turn.keys() - {"role", "content"}) for turn in turns]
        said.append(any((turn.get("content") or "").strip() for turn in turns) or any(rest))
    return not all(said)


# Rows -----------------------------------------------------------------------------------------------------------------
def name_columns(columns: list[str], asked: str | None) -> dict[str, str]:
    """What each column is called here: in small letters where it is known then, or what is asked for."""
    known = {*NEW, *CHATS, *INPUTS, *SYSTEMS, "history", *(key for keys in (*PAIRS, *OTHER) for key in keys)}
    small = {column: column.strip().lower() for column in columns}
    counts, given = Counter(small.values()), {}
    names = {old: new if new in known and counts[new] == 1 else old for old, new in small.items()}
    for pair in filter(None, (asked or "").split(",")):
        old, _, new = (word.strip() for word in pair.rpartition(":"))
        if old not in columns or new not in NEW:
            near = "".join(f", but {word!r}" for word in get_close_matches(old, columns, 1))
            cause = f"no column {old!r}{near}" if old not in columns else f"no {new!r} to make of {old!r}"
            give = f"Give OLD:NEW,OLD:NEW with old ones of {', '.join(columns)}, and new ones of {', '.join(NEW)}"
            fail(f"--columns {asked} (make: COLUMNS=): there is {cause}. {give}.")
        if new in given.values():
            fail(f"--columns {asked} (make: COLUMNS=): {new!r} is made of two columns. Give one of them.")
        given[old] = new
    # What is asked for is of one form: no other comes before it, and no column says that it is of another kind.
    own, pairs = {*given.values()}, {key for pair in PAIRS for key in pair}
    other = {*CHATS, "text", *(key for kind in OTHER for key in kind)}
    gone = own | (other | pairs if own & {"text", "messages"} else other - pairs if own else {*()})
    gone |= {*PAIRS[0]} if own & {*PAIRS[1]} else {*()}
    return {old: new for old, new in names.items() if old not in given and new not in gone} | given


def find_form(name: str, names: dict[str, str], first: dict) -> tuple[str, list[str], Callable[[dict], dict]]:
    """What rows are read as, from which columns, and what makes a row of training of one; exits at other rows.
    names: the columns, by the names of name_columns."""
    columns, given = [*names.values()], {new: old for old, new in names.items()}
    refuse_other_rows(name, columns)
    pair = next((pair for pair in PAIRS if {*columns} >= {*pair}), None)
    chat = next((key for key in CHATS if re.match(r"\[\s*[{\]]", str(first.get(key)).lstrip())), None)
    system, history, tools = ([key for key in keys if key in columns] for keys in (SYSTEMS, ("history",), ("tools",)))

    def find_system(row: dict) -> str | None:
        found = next((row[key] for key in system if row.get(key)), None)
        return join_parts(found.get("parts")) if isinstance(found, dict) else found  # Gemini's

    def read_chat(row: dict) -> dict:
        value = row.get(chat)
        return {"messages": to_messages(json.loads(value) if isinstance(value, str) else value, find_system(row))}

    def read_pair(row: dict) -> dict:
        listed = [is_listed(row.get(key)) for key in pair]
        question, answer = (
            row[key] if each else to_text(row, keys)
            for each, key, keys in zip(listed, pair, (asked, [pair[1]]), strict=True)
        )
        if not chatty and not any(listed):
            return {"prompt": question, "completion": answer}
        if not chatty:
            raise ValueError("it has messages, where the first row has texts")
        if listed[0] and to_text(row, asked[1:]):
            raise ValueError(f"{pair[0]} has messages, and {' and '.join(asked[1:])} a text. Put that into a message")
        prompt = to_messages(read_history(row.get("history")) + to_messages(question), find_system(row))
        if (said := to_messages(answer, role="assistant")) and said[0]["role"] in ("system", "user"):
            raise ValueError("its answer is a whole conversation. Give --columns OLD:messages (make: COLUMNS=)")
        return {"prompt": prompt, "completion": said}

    def add_tools(read: Callable, row: dict) -> dict:
        return read(row) | {key: row[key] for key in tools if row.get(key)}

    if chat and pair != PAIRS[0]:
        said = f"{CHATS[chat]}: {chat} {'become' if chat.endswith('s') else 'becomes'} messages"
        if chat == "messages":
            said = f"{', '.join([chat, *system])}, with roles, texts and arguments as chat templates know them"
        return said, [*system, chat, *tools], partial(add_tools, read_chat)
    if pair:
        asked = [pair[0], *(key for key in INPUTS if key in columns and key not in pair and pair != PAIRS[0])]
        used = [*system, *history, *asked, pair[1]]
        chatty = system or history or any(is_listed(first.get(key)) for key in pair)
        said = f"{'alpaca' if pair == PAIRS[1] else 'pairs'}: {', '.join(used[:-1])} and {pair[1]} become"
        said = "prompt and completion, both texts or both" if pair == PAIRS[0] and not (system or history) else said
        kinds = "messages" if said.endswith("both") else "prompt and completion"
        return f"{said} {kinds}", [*used, *tools], partial(add_tools, read_pair)
    if "text" not in columns:
        what, two = "not text, messages, or prompt and completion;", ["question", "answer"]
        if len(names) == 2 and re.fullmatch(r"[\w.-]+ [\w.-]+", " ".join(names)):  # and no first row
            two = [*names]
        if asked := [pair[0] for pair in PAIRS if pair[0] in columns]:
            what = "questions without answers, as GRPO asks. Add the answers, or"
            others = [column for column in columns if column != asked[0]]
            near = [given[column] for column in others if get_close_matches(column, [pair[1] for pair in PAIRS])]
            two = [given[asked[0]], *near, "ANSWERS"]
        give = f"--columns {two[0]}:prompt,{two[1]}:completion (make: COLUMNS=)"
        fail(f"{name!r} has the columns {', '.join(names)}: {what} name them: {give}")
    return "text", ["text"], lambda row: {"text": to_text(row, ["text"])}


def convert_rows(name: str, part: Part, asked: str | None) -> Iterator[dict]:
    """Rows of training; says how they were read. Those without words are left out, or, where they are many, refused."""
    columns = part.list_columns()
    names = name_columns(columns, asked)
    first = {}  # of each column the first value that there is
    for row in islice(part.read(), 100):
        first |= {new: row[old] for old, new in names.items() if first.get(new) is None and row.get(old) is not None}
    if not first:
        fail(f"{name!r} has no rows in {', '.join(part.files)}. Give files with rows.")
    form, used, convert = find_form(name, names, first)
    changed, empty, number = False, [], 0
    for number, row in enumerate(part.read(), 1):
        row = {new: row.get(old) for old, new in names.items()}
        try:
            new = convert(row)
        except (ValueError, TypeError, AttributeError) as error:  # of values that are no words, turns or calls
            fail(f"{name!r}, row {number}: {error}. Mend that row, or leave it out.")
        changed |= new != {key: row.get(key) for key in new}
        if is_empty(new):
            empty.append(number)
        else:
            yield new
    left = [column for column in columns if names.get(column) not in used]
    left = [*left[:9], f"and {len(left) - 9} more"] if len(left) > 9 else left
    said = [f"read as {form}"] * changed + [f"Left out: {', '.join(left)}"] * bool(left)
    print(". ".join(said), end="\n" * bool(said))
    if empty:
        cause = f"{len(empty)} of {number} rows have an empty question or answer (first: row {empty[0]})"
        if len(empty) > MANY * number:
            fail(f"{name!r}: {cause}. Fill or remove them, or name other columns: --columns (make: COLUMNS=)")
        print(f"{cause}: left out")


def hold_back(rows: Iterable[dict], last: deque, count: int) -> Iterator[dict]:
    """All but the last rows, so many, which are left in last."""
    for row in rows:
        last.append(row)
        if len(last) > count:
            yield last.popleft()


def find_type(value) -> str:
    """What the library's reader may take a value for: a date, JSON, which a text may be too, or a text."""
    if not isinstance(value, str):
        return "json"
    if re.match(r"\d{4}-\d\d-\d\d($|[T ]\d)", value):
        return "date"
    if re.match(r'\s*["\[{\d.+-]|\s*(true|false|null|nan|-?inf)', value, re.IGNORECASE):
        with contextlib.suppress(ValueError, RecursionError):
            json.loads(value)
            return "word"
    return "text"


def write_rows(rows: Iterable[dict], file: Path, kinds: dict[str, set]) -> dict:
    """Their number, and the sum of the file; adds the types of the columns; shows a row, as the tutorial does.

    For the library's reader a text that is a date is none, unless it is said to be JSON, as messages are. Other texts
    must not be said to be: 1.10 would be the number 1.1."""
    digest, count, shown = hashlib.sha256(), 0, None
    with file.open("wb") as stream:
        for count, row in enumerate(rows, 1):
            try:
                line = (json.dumps(row, ensure_ascii=False) + "\n").encode()
            except UnicodeEncodeError as error:
                fail(f"row {count} of {file.name} has half a character, {error.object[error.start]!r}. Mend that text.")
            stream.write(line)
            digest.update(line)
            for key, value in row.items():
                kinds.setdefault(key, set()).add(find_type(value))
            shown = row if count <= 12 else shown
    if count:
        print(f"{file.name}: {count:,} rows. Row {min(count, 12) - 1}, counted from 0:", shown, sep="\n")
    return {"rows": count, "sha256": digest.hexdigest()}


def fetch_dataset(name: str, args: Arguments, folder: Path) -> dict:
    """Writes train.jsonl and, where rows are held out, validation.jsonl, and a card; returns what they are."""
    if args.rows is not None and args.rows < 1:
        fail(f"--rows (make: ROWS) is {args.rows}: give 1 or more, or leave it out for all.")
    if not Path(name).exists() and find_kind(name)[0] in KINDS:
        fail(f"there is no file {Path(name).absolute()}. Give one that there is, a folder, or a hub id.")
    origin, last = download.describe("dataset", name, args.dataset_revision), deque()
    splits = {"train": args.dataset_train_split, "validation": args.dataset_test_split}
    parts = find_rows(name, origin.get("revision"), args.dataset_config, splits, args.rows)
    origin["held_out_rows"] = count = 0 if "validation" in parts else args.validation_rows
    asked = ("dataset_config", "dataset_train_split", "dataset_test_split", "columns", "rows")
    origin |= {key: value for key in asked if (value := vars(args)[key])}
    kinds = {split: {} for split in parts}
    for split, part in parts.items():
        rows = convert_rows(name if split == "train" else f"{name}, held-out rows", part, args.columns)
        rows = hold_back(rows, last, count) if count else rows
        origin[split] = write_rows(rows, folder / f"{split}.jsonl", kinds[split])
    if count:
        if not (0 < count == len(last) and origin["train"]["rows"]):
            most = origin["train"]["rows"] + len(last) - 1
            fail(f"--validation_rows (make: VALIDATION_ROWS) is {count}: give 0 to {most}.")
        origin["validation"] = write_rows(last, folder / "validation.jsonl", kinds["train"])
    train, held_out = kinds["train"], kinds.get("validation", kinds["train"])
    if train.keys() - {"tools"} != held_out.keys() - {"tools"}:
        cause = f"{name!r}: rows to train on are read as {', '.join(train)}, held-out ones as {', '.join(held_out)}"
        fail(f"{cause}. Name the columns of both: --columns (make: COLUMNS=)")
    found = {key: train.get(key, set()) | held_out.get(key, set()) for key in train | held_out}
    if mixed := [key for key, types in found.items() if types >= {"date", "word"}]:
        cause = f"{name!r}: some texts of {mixed[0]} are dates, and some are numbers, true, null or JSON"
        fail(f"{cause}: the library's reader would change one kind. Put a word beside the dates.")
    found = {key: "json" if types & {"json", "date"} else "string" for key, types in found.items()}
    kinds = [{"name": key, "dtype": kind} for key, kind in found.items()]
    card = {"license": origin["license"], "dataset_info": {"features": kinds}}
    card = f"---\n{json.dumps(card, indent=1)}\n---\nRows of {name}, as run.json describes them.\n"
    (folder / "README.md").write_text(card, encoding="utf-8")
    return origin


def main() -> None:
    given = download.Arguments, download.fetch_dataset
    download.Arguments, download.fetch_dataset = Arguments, fetch_dataset
    sys.argv += ["--only", "dataset"]
    try:
        download.main()
    finally:
        download.Arguments, download.fetch_dataset = given


if __name__ == "__main__":
    main()
