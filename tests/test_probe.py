"""probe.py: what an engine is compared with is what make infer answers and what the training measured."""

import json
from types import SimpleNamespace

import pytest
from conftest import load, write_rows
from helpers import call, read
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def trained(tiny_model, question_rows, tmp_path_factory):
    """Options for an adapter that learned the rows, and its folder."""
    folder = tmp_path_factory.mktemp("probe")
    options = ["--dataset_name", question_rows, "--dataset_test_split", "validation", "--learning_rate", "0.02"]
    learn = ["--num_train_epochs", "20", "--lora_target_modules", "all-linear", "--output_dir", folder / "lora"]
    call("02_train_lora.py", "--model_name_or_path", tiny_model, *options, *learn)
    return ["--model_name_or_path", folder / "lora/adapter", "--base_model", tiny_model], folder


def test_answers_and_loss_are_those_of_infer_and_of_the_training(trained, tiny_model, question_rows, tmp_path):
    model, folder = trained
    call("chain/probe.py", *model, "--dataset_name", question_rows, "--prompt", "what color is the sky", "--load", "5",
         "--at_once", "2", "--max_new_tokens", "4", "--output", tmp_path / "probe.json")  # fmt: skip
    probe, run = read(tmp_path / "probe.json"), read(folder / "lora/run.json")
    assert probe["loss"] == run["metrics"]["eval_loss"] and probe["tokens"] == run["metrics"]["eval_tokens"]
    assert sum(label != -100 for row in probe["rows"] for label in row["labels"][1:]) == probe["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert probe["stops"] == [tokenizer.eos_token_id] and probe["dtype"] == "float32" and probe["chat"]
    assert len(probe["prompts"]) == 1 + len(probe["rows"])
    for each in probe["prompts"]:
        asked = each["messages"][-1]["content"]
        call(
            "05_generate.py", *model, "--prompt", asked, "--max_new_tokens", "4", "--output", tmp_path / "answer.jsonl"
        )
        assert json.loads((tmp_path / "answer.jsonl").read_text())["answer"] == each["answer"]
        assert tokenizer.decode(each["answer_ids"], skip_special_tokens=True) == each["answer"]
        assert each["prompt_ids"] == tokenizer(each["prompt"], add_special_tokens=False).input_ids
        assert each["prompt"].startswith("<s>[INST] ") and asked in each["prompt"]
        assert len(each["margins"]) == len(each["answer_ids"]) and min(each["margins"]) >= 0
    ended = [each["answer_ids"][-1] == tokenizer.eos_token_id for each in probe["prompts"]]
    assert any(ended) and all(
        len(each["answer_ids"]) == 4 or end for each, end in zip(probe["prompts"], ended, strict=True)
    )
    load = probe["load"]
    assert load["requests"] == len(load["prompts"]) == len(load["first_token"]) == 5 and load["at_once"] == 2
    assert load["prompts"][0] == "what color is the sky"
    ends = {json.dumps(each["messages"]): len(each["answer_ids"]) for each in probe["prompts"]}
    chats = [[{"role": "user", "content": each}] if isinstance(each, str) else each for each in load["prompts"]]
    assert load["tokens"] == sum(ends[json.dumps(chat)] for chat in chats)  # what stands behind an EOS is not counted
    assert 0 < max(load["first_token"]) <= load["seconds"]


def test_without_held_out_rows_the_prompt_alone_is_asked(trained, tmp_path):
    model, _ = trained
    rows = write_rows(tmp_path / "train.jsonl", [{"text": "a b"}]).parent
    call("chain/probe.py", *model, "--dataset_name", rows, "--max_new_tokens", "2", "--output", tmp_path / "probe.json")
    probe = read(tmp_path / "probe.json")
    assert [each["messages"][0]["content"] for each in probe["prompts"]] == ["What is a large language model?"]
    assert probe["rows"] == [] and probe["loss"] is None and "load" not in probe


def test_what_stands_behind_an_end_is_not_counted(monkeypatch):
    probe = load("chain/probe.py")
    recorder = SimpleNamespace(times=[0.0], ids=[[5, 2], [2, 7], [9, 8]])  # of each step the token of each answer
    monkeypatch.setattr(probe, "answer", lambda *_: ([], recorder))
    assert probe.answer_many(None, None, ["a", "b"], 2, 3, [2])["tokens"] == 2 + 1
