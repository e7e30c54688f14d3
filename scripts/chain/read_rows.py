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
# Roles, and keys of a message, by the names that chat templates know.
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
ROLES |= {"function": "tool", "observation": "tool"}
# Rows that are for something else, by their columns.
OTHER = {
    ("chosen", "rejected"): "of preferences, as DPO learns from. To learn the chosen answers, name them completion",
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
    return rest | {"role": ROLES.get(role, role), "content": content}


def join(*parts) -> str:
    return "\n\n".join(str(part) for part in parts if part not in (None, ""))


def convert_rows(name: str, rows):
    """Rows with messages, or prompt and completion, where they have them in another form; else as they are."""
    refuse_other_rows(name, rows.column_names)
    columns = set(rows.column_names)
    source = next((each for each in ("messages", "conversations") if isinstance(rows[0].get(each), list)), None)
    if source == "conversations" or (source and any("from" in turn for turn in rows[0][source])):
        print(f"read as ShareGPT: {source} become messages")
        kept = columns & {"messages", "tools"}
        return rows.map(lambda row: {"messages": list(map(to_message, row[source]))}, remove_columns=[*columns - kept])
    pair = next((pair for pair in PAIRS if columns >= set(pair)), None)
    if pair is None or source or columns >= {"prompt", "completion"}:
        return rows
    question, answer = pair
    added = "input" if question == "instruction" and "input" in columns else None
    print(f"read as {question}{' and input' if added else ''}, and {answer}: they become prompt and completion")
    return rows.map(
        lambda row: {"prompt": join(row[question], row.get(added)), "completion": join(row[answer])},
        remove_columns=rows.column_names,
    )


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
