"""Fetch a data set as 01_download.py does, and turn the rows that people have into rows that are trained on.

    python read_rows.py --dataset_name DATA --output_dir out

Takes the options of 01_download.py, and reads and writes what it does with --only dataset. Beyond text, messages, and
prompt and completion it reads ShareGPT's conversations and pairs of columns such as question and answer, and says how.
"""

import contextlib
import json
import sys

from datasets import Features, Json, Value
from folders import fail
from records import load_script

# Pairs of columns that are a prompt and its completion; where there is an input, it is added to the prompt.
PAIRS = (("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("prompt", "response"))
# Roles by the names that chat templates know.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"function_call": "assistant", "function": "tool", "observation": "tool"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool", "developer")}
# Rows that are for something else, by their columns.
OTHER = {
    ("chosen", "rejected"): "of preferences, as DPO learns from. To learn what was chosen: name it completion, "
    "or messages where it is whole conversations",
    (
        "prompt",
        "completion",
        "label",
    ): "of answers marked good or bad, as KTO learns from. Keep the good, without label",
    ("images",): "with images, and text alone is trained here. Give rows of text",
    ("image",): "with images, and text alone is trained here. Give rows of text",
}


def refuse_other_rows(name: str, columns: list[str]) -> None:
    """Stops at rows that are for another kind of training."""
    for kind, what in OTHER.items():
        if {*columns} >= {*kind}:
            fail(f"{name!r} has the columns {columns}: rows {what}.")


def join_parts(content):
    """The text of content that is given in parts; what is no text, or has other parts than texts, as it is."""
    parts = content if isinstance(content, list) else [None]
    if not all(isinstance(part, dict) and part.get("type") == "text" for part in parts):
        return content
    return "".join(part.get("text") or "" for part in parts)


def read_arguments(call: dict) -> dict:
    """A tool call whose arguments are an object, also where they are JSON in a text, as OpenAI has them."""
    with contextlib.suppress(KeyError, TypeError, ValueError):  # no such text
        if isinstance(arguments := json.loads(call["function"]["arguments"]), dict):
            return call | {"function": call["function"] | {"arguments": arguments}}
    return call


def to_message(turn):
    """A message with role and content as chat templates know them, also of one with from and value."""
    if not isinstance(turn, dict):
        return turn
    new = {key: value for key, value in turn.items() if key not in ("from", "value")}
    for old, key in (("from", "role"), ("value", "content")):
        if turn.get(old) is not None:
            new[key] = turn[old]
    if new.get("role"):
        new["role"] = ROLES.get(str(new["role"]).lower(), new["role"])
    if new.get("content"):
        new["content"] = join_parts(new["content"])
    if turn.get("tool_calls"):
        new["tool_calls"] = [read_arguments(call) for call in turn["tool_calls"]]
    return new


def convert_rows(name: str, rows):
    """Rows with messages, or prompt and completion, where they have them in another form; else as they are."""
    refuse_other_rows(name, rows.column_names)
    columns = set(rows.column_names)
    pair = next((pair for pair in PAIRS if columns >= set(pair)), None)
    form = next((form for form in (("prompt", "completion"), ("messages",)) if columns >= set(form)), ())

    def join(row: dict, keys: list[str]) -> str:
        for key in keys:
            if isinstance(row[key], bool) or not isinstance(row[key], str | int | None):
                fail(f"{name!r}: {row[key]!r} in {key} is no text. Put it in quotes, or a word beside it.")
        return "\n\n".join(str(row[key]) for key in keys if row[key] not in (None, ""))

    def put_system_first(row: dict, turns: list[dict]) -> list[dict]:
        system, roles = row.get("system"), [turn.get("role") for turn in turns if isinstance(turn, dict)]
        first = [{"role": "system", "content": system}] if system and "system" not in roles else []
        return first + turns

    def to_chat(row: dict) -> dict:
        return {"messages": put_system_first(row, [*map(to_message, row["conversations"])])}

    def to_pair(row: dict) -> dict:
        prompt, answer = join(row, asked), join(row, pair[1:])
        if "system" not in columns:
            return {"prompt": prompt, "completion": answer}
        prompt = put_system_first(row, [{"role": "user", "content": prompt}])
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}

    def to_form(row: dict) -> dict:
        new = {key: [*map(to_message, row[key])] if isinstance(row[key], list) else row[key] for key in form}
        return new | ({form[0]: put_system_first(row, new[form[0]])} if isinstance(new[form[0]], list) else {})

    said, asked = "", [*pair[:1], *(key for key in ("input", "context") if key in columns - {*pair})] if pair else []
    if not form and isinstance(rows[0].get("conversations"), list):
        convert, used, said = to_chat, {"conversations", "system"}, "ShareGPT: conversations become messages"
    elif form == ("prompt", "completion") and "system" in columns and isinstance(rows[0]["prompt"], str):
        pair, asked, convert, used = form, ["prompt"], to_pair, {*form, "system"}
        said = "system, prompt and completion: they become messages"
    elif form:
        convert, used = to_form, {*form, "system"}
        if any(to_form(row) != {key: row[key] for key in form} for row in rows):
            said = f"{', '.join(sorted(columns & used))}, with roles, texts and arguments as chat templates know them"
    elif pair:
        convert, used = to_pair, {*asked, pair[1], "system"}
        said = " and ".join([*({"system"} & columns), *asked]) + f", and {pair[1]}: they become prompt and completion"
    else:
        used = {"text"} if "text" in columns else columns
    left = sorted(columns - used - {"tools"})
    left = [*left[:9], f"and {len(left) - 9} more"] if len(left) > 9 else left
    if said or left:
        print(". ".join([f"read as {said}"] * bool(said) + [f"Left out: {', '.join(left)}"] * bool(left)))
    if not said:
        return rows
    # Types of their own: else all rows would get the keys, null, that the arguments of some tool have
    kinds = {key: Json() if isinstance(value, list) else Value("string") for key, value in convert(rows[0]).items()}
    kinds |= {key: kind for key, kind in rows.features.items() if key == "tools"}
    return rows.map(convert, features=Features(kinds), remove_columns=[*columns - {*kinds}])


def main() -> None:
    download = load_script("01_download.py")
    check_rows = download.check_rows
    download.check_rows = lambda name, rows: check_rows(name, convert_rows(name, rows))
    sys.argv += ["--only", "dataset"]
    try:
        download.main()
    finally:
        download.check_rows = check_rows


if __name__ == "__main__":
    main()
