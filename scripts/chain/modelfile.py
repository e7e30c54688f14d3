"""A Modelfile for Ollama: what a run's chat template in Jinja writes, as a template in Go.

The chat template is not translated but rendered: what it puts before, between and after the turns of a conversation is
cut out, and stands in the template as it is. That this says the same is checked on conversations; where it does not,
TEMPLATE is left out, and Ollama takes the template it knows that is most like the one in the GGUF.
"""

import json
import re
from collections.abc import Callable

from jinja2 import TemplateError

# Contents that no template has in itself, nor changes: one with white space inside, quotes and what Go would read.
MARKS = ["mark 1 ends", "mark 2 ends", "mark 3 ends", "mark 4 ends", 'mark "5" {{ends}}']
ROLES = ["user", "assistant"] * 3

# The template in Go: a word in capitals stands for a piece. An answer that was begun is gone on with.
WITH_SYSTEM = "{{ if .System }}{{ SYSTEM }}{{ .System }}{{ FIRST }}{{ else }}{{ OPEN }}{{ end }}"
TURNS = """
{{- $between := "" }}{{ $end := "" }}
{{- range .Messages }}
{{- if eq .Role "user" }}{{ $between }}{{ .Content }}{{ $end = END }}
{{- else if eq .Role "assistant" }}{{ ANSWER }}{{ .Content }}{{ $between = NEXT }}{{ $end = "" }}
{{- end }}
{{- end }}{{ $end }}"""


def make_chat(turns: int, system: str | None = None) -> list[dict]:
    """A conversation of so many turns, which ends with a question."""
    messages = [{"role": role, "content": mark} for role, mark in zip(ROLES, MARKS[: 2 * turns - 1], strict=False)]
    return ([{"role": "system", "content": system}] if system else []) + messages


def cut(text: str, chat: list[dict]) -> list[str]:
    """What stands around the contents of a conversation in its text; ValueError where one is not there once."""
    pieces = []
    for message in chat:
        if text.count(message["content"]) != 1:
            raise ValueError("it leaves out or repeats what is said")
        piece, _, text = text.partition(message["content"])
        pieces.append(piece)
    return [*pieces, text]


def find_pieces(render: Callable[[list[dict]], str]) -> dict:
    """What a chat template writes around the contents of a conversation; ValueError where that depends on more."""
    begin, answer, after, *_, end = cut(render(make_chat(3)), make_chat(3))
    pieces = {"open": begin, "answer": answer, "next": after, "end": end}
    try:
        chat = make_chat(1, "the system's mark")
        pieces["system"], pieces["first"], _ = cut(render(chat), chat)
        systems = [None, "Be brief.\nAlways."]
    except TemplateError:  # raised by the template itself: it takes no system message
        systems = [None]
    for chat in [make_chat(turns, system) for system in systems for turns in (1, 2, 3)]:
        if fill(pieces, chat) != render(chat):
            raise ValueError("what it writes depends on more than the places of the turns")
    return pieces


def fill(pieces: dict, chat: list[dict]) -> str:
    """What the template of write_template says, for a conversation."""
    said = [message["content"] for message in chat if message["role"] == "system"] if "system" in pieces else []
    text = pieces["system"] + said[0] + pieces["first"] if said else pieces["open"]
    between = end = ""
    for message in chat:
        if message["role"] == "user":
            text, end = text + between + message["content"], pieces["end"]
        elif message["role"] == "assistant":
            text, between, end = text + pieces["answer"] + message["content"], pieces["next"], ""
    return text + end


def write_template(pieces: dict, bos: str = "") -> str:
    """The template in Go, without the BOS that Ollama itself puts before it."""
    begins = {name: pieces[name].removeprefix(bos) for name in ("open", "system") if name in pieces}
    go = {name: json.dumps(text, ensure_ascii=False) for name, text in (pieces | begins).items()}
    opening = WITH_SYSTEM if "system" in pieces else "{{ OPEN }}"
    return re.sub(r"\b[A-Z]{3,}\b", lambda word: go[word[0].lower()], opening + TURNS)


def write_modelfile(tokenizer, stops: list[str], context: int, adds_bos: bool, adapter: bool) -> str:
    """The text of a Modelfile that stands beside model.gguf, or beside base.gguf and adapter.gguf."""
    lines = ["FROM ./base.gguf", "ADAPTER ./adapter.gguf"] if adapter else ["FROM ./model.gguf"]
    chat = {"tokenize": False, "add_generation_prompt": True}
    try:
        if not tokenizer.chat_template:
            raise ValueError("there is none: what is asked is continued as it stands")
        pieces = find_pieces(lambda messages: tokenizer.apply_chat_template(messages, **chat))
        if "system" not in pieces:
            lines.append("# The chat template takes no system message: one is left out.")
        if "strftime_now" in tokenizer.chat_template:
            lines.append("# The chat template writes the date: here it stays that of the export.")
        template = write_template(pieces, tokenizer.bos_token if adds_bos else "")
        lines.append(f'TEMPLATE """{template}"""')
    except (ValueError, TemplateError) as error:
        lines.append(f"# TEMPLATE is left out, as the chat template cannot be said in Ollama's form: {error}.")
    lines += [f"PARAMETER stop {json.dumps(stop, ensure_ascii=False)}" for stop in stops]
    # Greedy, as make infer answers
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1", f"PARAMETER num_ctx {min(context, 4096)}"]
    return "\n".join(lines) + "\n"
