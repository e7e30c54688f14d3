"""The embedded data set: form, sizes, lengths, and no validation question among the training questions."""

import json
import re

import pytest
from conftest import ROOT

SPLITS = {"train": 300, "validation": 60}
PROBES = ["What is LoRA?", "What is PEFT?", "What is ROCm?", "What is gfx942?", "What is bitsandbytes?"]


def rows(split: str) -> list[dict]:
    return [json.loads(line) for line in (ROOT / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def question(row: dict) -> str:
    return " ".join(re.findall(r"\w+", row["prompt"][0]["content"].lower()))


@pytest.mark.parametrize("split", SPLITS)
def test_rows_are_questions_with_answers_of_one_to_four_sentences(split):
    assert len(rows(split)) >= SPLITS[split]
    for row in rows(split):
        assert row.keys() == {"prompt", "completion"}
        (prompt,), (completion,) = row["prompt"], row["completion"]
        assert prompt.keys() == completion.keys() == {"role", "content"}
        assert (prompt["role"], completion["role"]) == ("user", "assistant")
        for text in (prompt["content"], completion["content"]):
            assert text == text.strip() and text.isascii() and "\n" not in text
        assert prompt["content"][-1] in ".?"
        assert completion["content"][-1] == "."
        assert 8 <= len(completion["content"].split()) <= 60
        assert 1 <= len(re.findall(r"[.!?](?= [A-Z]|$)", completion["content"])) <= 4


def test_questions_are_asked_once():
    questions = [question(row) for split in SPLITS for row in rows(split)]
    assert len(set(questions)) == len(questions)


def test_answers_are_given_once():
    for split in SPLITS:
        answers = [row["completion"][0]["content"] for row in rows(split)]
        assert len(set(answers)) >= 0.97 * len(answers)


def test_the_five_probes_come_first():
    assert [row["prompt"][0]["content"] for row in rows("validation")[:5]] == PROBES
