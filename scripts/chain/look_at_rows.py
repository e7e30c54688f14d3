"""What is wrong with the rows of a data set as texts and messages, before they are tokenized."""

import contextlib
import json
import re
from collections import defaultdict

from folders import fail
from messages import join_parts

EMPTY = "have an empty question or answer: leave them out"
NO_ANSWER = "have no answer of an assistant: add it, or leave them out"
ENDS_ASKING = "end with a question, which is learned like an answer: leave the last message out"
FORMATTED = "have marks of a chat format in a message, and the chat template goes around it: take them out, or "
FORMATTED += "join prompt and answer in one column, text"
FOREIGN = "hold the end of another model's turns, which is mere text here: take it out, or put this model's there"
LEFT_OUT = "have {}, which the chat template leaves out: leave them out too, or give a template that writes them, "
LEFT_OUT += "--chat_template_path FILE"
PARTS = "have content in parts, which the chat template does not write as text: make one text of them, as "
PARTS += "make download does"
ENCODED = "have tool calls whose arguments are JSON in a text, which the chat template encodes once more: give "
ENCODED += "objects, as make download does"
NO_END = "are written without an end after the last answer, and the model would not learn to stop: mend the "
NO_END += "chat template"
# What other formats begin with, and what their turns end with.
STARTS = ("[INST]", "<s>[INST]", "<s> [INST]", "<<SYS>>", "<|im_start|>", "<|start_header_id|>", "<|begin_of_text|>")
STARTS += ("<start_of_turn>", "<bos><start_of_turn>", "<|user|>", "<|system|>", "<|prompter|>", "<｜User｜>")
STARTS += ("<｜begin▁of▁sentence｜>", "### Instruction:\n", "### Human:")
ENDS = ("</s>", "<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|endoftext|>", "<|end|>", "<|end_of_text|>", "<eos>")
ENDS += ("<｜end▁of▁sentence｜>",)
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of a message


def list_turns(row: dict) -> list[dict]:
    """The messages of a row; none where it is of texts."""
    turns = row["messages"] if "messages" in row else [*(row.get("prompt") or ""), *(row.get("completion") or "")]
    return turns if turns and isinstance(turns[0], dict) else []


def is_empty(turn: dict) -> bool:
    """Whether a message has neither words nor calls nor reasoning."""
    content = join_parts(turn.get("content"))
    said = content.strip() if isinstance(content, str) else content
    return not (said or any(turn[key] for key in turn.keys() - {"role", "content"}))


def read_tools(row: dict) -> list | None:
    tools = row.get("tools")
    return (json.loads(tools) if isinstance(tools, str) else tools) or None


def check_row(name: str, row: dict, tokenizer) -> None:
    """Stops at a row that the chat template does not take."""
    if not (turns := list_turns(row)):
        return
    if not tokenizer.chat_template:
        give = "Give one, --chat_template_path FILE, or rows that need none: text, or prompt and completion as texts"
        fail(f"{name} has messages, and the tokenizer no chat template. {give}. Such a model is asked with --raw.")
    try:
        tokenizer.apply_chat_template(turns, tools=read_tools(row), tokenize=False)
    except Exception as error:  # a template may raise anything
        calls = ", and its tool calls" if any(turn.get("tool_calls") for turn in turns) else ""
        mend = "Mend it or the template"
        if any(turn.get("content") is None for turn in turns):
            mend = 'Give it "content": "" instead of null, or another template'
        elif any(isinstance(turn.get("content"), list) for turn in turns):
            mend = "Make one text of content in parts, as make download does, or give another template"
        roles, reason = ", ".join(str(turn.get("role")) for turn in turns), str(error).rstrip(".")
        fail(f"{name} ({roles}): the chat template does not take it{calls}: {reason}. {mend}.")


def list_marks(tokenizer) -> set[str]:
    """What has no place in a message: tokens and words that a chat template writes around it."""
    text, special = "", {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    with contextlib.suppress(Exception):  # a template may want other messages than these
        turns = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "QUESTION"}]
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    parts = {part.strip() for part in text.split("QUESTION")}
    marks = {mark for mark in parts if len(mark) > 2 and re.search(r"[^\w\s:.,]", mark)}  # no mere words
    return marks | {mark for mark in special if mark in text} | {tokenizer.eos_token} | (set(ENDS) & {*special})


def find_left_out(turns: list[dict], tools: list | None, tokenizer, ends: set[str]) -> set[str]:
    """What a conversation has and the chat template does not write. A word is put in the place of each part."""
    words, answer = {}, ""
    last = max((place for place, turn in enumerate(turns) if turn.get("role") == "assistant"), default=None)

    def put(what: str) -> str:
        words[word := f"Q{len(words)}WORD"] = what
        return word

    def name(each: dict, what: str) -> dict:
        function = each["function"] | {"name": put(what)}
        if isinstance(function.get("arguments"), str):
            function["arguments"] = '{"JSONWORD": 1}'
        return each | {"function": function}

    marked = []
    for place, turn in enumerate(turns):
        new, content = dict(turn), turn.get("content")
        for key in REASONING:  # that of earlier turns is left out on purpose
            if turn.get(key) and place == last:
                new[key] = put(key)
        if isinstance(content, str) and content.strip():
            *thought, _ = content.rpartition("</think>")
            thought = f"<think>\n{put('reasoning')}\n</think>\n\n" if any(thought) and place == last else ""
            new["content"] = thought + (answer := put(f"messages of the {turn.get('role')}"))
        elif isinstance(content, list):
            new["content"] = [part | {"text": (answer := put(PARTS))} for part in content]
        if turn.get("tool_calls"):
            new["tool_calls"] = [name(call, "tool calls") for call in turn["tool_calls"]]
            answer = [*words][-1]
        if place == last:
            answer_word = answer
        marked.append(new)
    try:
        tools = [name(tool, "tools") for tool in tools] if tools else None
        text = tokenizer.apply_chat_template(marked, tools=tools, tokenize=False)
    except Exception:  # check_row says so where the row itself is not taken
        return set()
    found = {what if what == PARTS else LEFT_OUT.format(what) for word, what in words.items() if word not in text}
    found |= {PARTS} if PARTS in words.values() and "'type': 'text'" in text else set()
    found |= {ENCODED} if '\\"JSONWORD' in text else set()
    if last is not None and answer_word in text:
        after = re.split(r"Q\d+WORD", text.partition(answer_word)[2])[0]
        found |= set() if any(end in after for end in ends) else {NO_END}
    return found


def look_at_rows(rows, tokenizer, ends: set[str], assistant_only: bool, kind: str = "") -> dict[str, list[int]]:
    """What is wrong, and the numbers of the rows, from 1. ends: tokens at which the model stops; kind: of the rows."""
    problems, shapes = defaultdict(list), {}
    marks, vocabulary = list_marks(tokenizer) if tokenizer.chat_template else set(), tokenizer.get_vocab()
    marks |= {end for end in ends if end.strip()}
    foreign = tuple(end for end in ENDS if end not in vocabulary)
    for number, row in enumerate(rows, 1):
        turns = list_turns(row)
        texts = [turn.get("content") for turn in turns] or [*row.values()]
        texts = [str(join_parts(text) or "").strip() for text in texts]
        if any(text.endswith(foreign) for text in texts):
            problems[FOREIGN].append(number)
        if not turns:
            if "completion" in row and not (row["completion"] or "").strip():
                problems[EMPTY].append(number)
            continue
        for turn in turns:
            content = turn.get("content")
            if content is not None and not isinstance(content, str | list):  # such as a date, read from words
                advice = "Put it in quotes, or a word beside it"
                fail(f"{kind}row {number} has {content!r} as content, which is no text. {advice}.")
            parts = content if isinstance(content, list) else []
            if kinds := {str(part.get("type")) for part in parts if isinstance(part, dict)} - {"text"}:
                fail(f"{kind}row {number} holds {', '.join(kinds)}, and text alone is trained here. Leave it out.")
        roles = [turn.get("role") for turn in turns]
        if assistant_only and "assistant" not in roles:
            fail(f"{kind}row {number} has no answer of an assistant, which alone is learned. Leave it out.")
        if "assistant" not in roles:
            problems[NO_ANSWER].append(number)
        elif roles[-1] == "user":
            problems[ENDS_ASKING].append(number)
        if any(is_empty(turn) for turn in turns if turn.get("role") in ("user", "assistant")):
            problems[EMPTY].append(number)
        asked = [text for text, role in zip(texts, roles, strict=True) if role != "assistant"]
        if any(text.startswith(STARTS) for text in asked) or any(mark in text for text in texts for mark in marks):
            problems[FORMATTED].append(number)
        # What a template leaves out is a matter of which parts there are
        with contextlib.suppress(ValueError, TypeError, KeyError):  # of tools that are none: the tokenizing says so
            tools = read_tools(row)
            parts = [[(key, type(turn[key])) for key in turn if turn[key]] for turn in turns]
            calls = [
                ([type(call["function"].get("arguments")) for call in turn.get("tool_calls") or ()],
                 "</think>" in str(turn.get("content"))) for turn in turns
            ]  # fmt: skip
            shape = str((roles, parts, calls, bool(tools)))
            if shape not in shapes:
                shapes[shape] = find_left_out(turns, tools, tokenizer, ends)
            for problem in shapes[shape]:
                problems[problem].append(number)
    return problems
