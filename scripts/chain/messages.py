"""Messages as chat templates know them, out of those that people have; a ValueError says what is wrong with one."""

import contextlib
import json

# Roles by the names that chat templates know.
ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
ROLES |= {"model": "assistant", "chatbot": "assistant", "ai": "assistant", "function_call": "assistant"}
ROLES |= {"function": "tool", "observation": "tool"}
ROLES |= {role: role for role in ("system", "user", "assistant", "tool", "developer")}


def join_parts(content):
    """The text of content that is given in parts; what is no text, or has other parts than texts, as it is."""
    parts = content if isinstance(content, list) else [None]
    kinds = (None, "text", "input_text", "output_text")
    if not all(isinstance(part, dict) and part.get("type") in kinds and "text" in part for part in parts):
        return content
    return "".join(part["text"] or "" for part in parts)


def read_arguments(call: dict) -> dict:
    """A tool call whose arguments are an object, also where they are JSON in a text, as OpenAI has them."""
    with contextlib.suppress(KeyError, TypeError, ValueError):  # no such text
        if isinstance(arguments := json.loads(call["function"]["arguments"]), dict):
            return call | {"function": call["function"] | {"arguments": arguments}}
    return call


def to_message(turn: dict) -> dict:
    """A message with role and content as chat templates know them, also of one with from and value, or with parts."""
    if not isinstance(turn, dict):
        raise ValueError(f"{json.dumps(turn, default=str)[:40]} is no message with role and content")
    new = {key: value for key, value in turn.items() if key not in ("from", "value", "parts")}
    for old, key in (("from", "role"), ("value", "content"), ("parts", "content")):
        if turn.get(old) is not None:
            new[key] = turn[old]
    if not isinstance(new.get("role"), str):
        raise ValueError(f"a message has the keys {', '.join(turn)}, and no role")
    new["role"] = ROLES.get(new["role"].lower(), new["role"])
    if "content" in new:
        new["content"] = content = join_parts(new["content"])
        if isinstance(content, list):
            kinds = {str(part.get("type", "no text")) if isinstance(part, dict) else "no text" for part in content}
            raise ValueError(f"a message holds {', '.join(sorted(kinds - {'text'}))}, and text alone is trained here")
        if not isinstance(content, str | None):
            raise ValueError(f"{content!r} in content is no text. Put it in quotes, or a word beside it")
    if turn.get("weight") == 0 or turn.get("train") is False:
        raise ValueError("a message is not to be learned (weight 0), and all are. Make a prompt of it and those before")
    if turn.get("tool_calls"):
        new["tool_calls"] = [read_arguments(call) for call in turn["tool_calls"]]
    return new


def to_messages(value, system=None, role="user") -> list[dict]:
    """Messages out of a list of them, or out of a mere text."""
    turns = [*map(to_message, [{"role": role, "content": value}] if isinstance(value, str) else value or [])]
    has_system = not system or "system" in {turn["role"] for turn in turns}
    return turns if has_system else [{"role": "system", "content": system}, *turns]


def read_history(value) -> list[dict]:
    """Messages of pairs of texts, or of a list of messages, also where that is JSON in a text."""
    if isinstance(value, str) and value.strip():
        value = json.loads(value)
    if all(isinstance(turn, dict) for turn in value or []):
        return [*(value or [])]
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise ValueError(f"history is no list of pairs of texts, nor of messages: {str(value)[:40]}")
    return [{"role": ("user", "assistant")[place], "content": pair[place]} for pair in value for place in (0, 1)]
