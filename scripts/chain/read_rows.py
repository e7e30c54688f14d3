"""Fetch a data set as 01_download.py does, and turn the rows that people have into rows that are trained on.

    python read_rows.py --dataset_name DATA --output_dir out

Takes the options of 01_download.py, and reads and writes what it does with --only dataset. Beyond text, messages, and
prompt and completion it reads ShareGPT's conversations and pairs of columns such as question and answer, and says how.
"""

import sys

from folders import fail
from records import load_script

# Pairs of columns that are a prompt and its completion; where there is an input, it is added to the prompt.
PAIRS = (("instruction", "output"), ("instruction", "response"), ("question", "answer"), ("prompt", "response"))
# Roles by the names that chat templates know.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"function_call": "assistant", "function": "tool", "observation": "tool"}
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


def to_message(turn: dict) -> dict:
    """A message with role and content, of one with from and value."""
    role, content = turn.get("role") or turn.get("from"), turn.get("content") or turn.get("value")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role = str(role).lower()
    return rest | {"role": ROLES.get(role, role), "content": content}


def join(*parts) -> str:
    return "\n\n".join(str(part) for part in parts if part not in (None, ""))


def convert_rows(name: str, rows):
    """Rows with messages, or prompt and completion, where they have them in another form; else as they are."""
    refuse_other_rows(name, rows.column_names)
    columns = set(rows.column_names)
    source = next((each for each in ("messages", "conversations") if isinstance(rows[0].get(each), list)), None)
    pair = next((pair for pair in PAIRS if columns >= set(pair)), None)

    def put_system_first(row: dict, *turns: dict) -> list[dict]:
        return [*([{"role": "system", "content": row["system"]}] if row.get("system") else []), *turns]

    def to_chat(row: dict) -> dict:
        return {"messages": put_system_first(row, *map(to_message, row[source]))}

    def to_pair(row: dict) -> dict:
        prompt, answer = join(*(row[key] for key in asked)), join(row[pair[1]])
        if "system" not in columns:
            return {"prompt": prompt, "completion": answer}
        prompt = put_system_first(row, {"role": "user", "content": prompt})
        return {"prompt": prompt, "completion": [{"role": "assistant", "content": answer}]}

    if source == "conversations" or (source and any("from" in turn for turn in rows[0][source])):
        convert, used, said = to_chat, {source, "system"}, f"ShareGPT: {source} become messages"
    elif source or pair is None or columns >= {"prompt", "completion"}:
        return rows
    else:
        asked = [pair[0], *(key for key in ("input", "context") if key in columns - set(pair))]
        convert, used = to_pair, {*asked, pair[1], "system"}
        said = f"{' and '.join(asked)}, and {pair[1]}: they become prompt and completion"
    left = sorted(columns - used - {"tools"})
    print(f"read as {said}" + (f". Left out: {', '.join(left)}" if left else ""))
    return rows.map(convert, remove_columns=[*columns - {"tools", "messages"}])


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
