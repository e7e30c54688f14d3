"""The token audit: one BOS and a learned EOS for rows that carry their own, with a tokenizer that adds BOS."""

import json
import shutil

import pytest
from conftest import ROOT, load, run, write_rows

GUANACO = ROOT.parent / "shared/data/guanaco-llama2-1k.parquet"
TUTORIAL_ROWS = [
    {"text": "<s>[INST] what color is the sky [/INST] blue </s>"},
    {"text": "<s>[INST] a [/INST] red </s><s>[INST] b [/INST] red </s>"},
]


@pytest.fixture
def audit(tiny_model, tmp_path):
    """Runs the audit on rows in the given way; returns the finished process and the report, if there is one."""

    def run_audit(rows: list | None = None, *args, model=tiny_model):
        data = write_rows(tmp_path / "rows.jsonl", rows) if rows else args[0]
        command = ("--model_name_or_path", model, "--dataset_name", data, "--output", tmp_path / "audit.json")
        result = run("audit_tokens.py", *command, *(args if rows else args[1:]), cwd=tmp_path)
        file = tmp_path / "audit.json"
        return result, json.loads(file.read_text()) if file.exists() else None

    return run_audit


def test_rows_that_begin_with_bos_keep_one_and_the_last_eos_is_learned(audit):
    result, report = audit(TUTORIAL_ROWS * 4)
    assert result.returncode == 0, result.stderr
    assert report["rows"] == 8 and report["tokenizer_adds_bos"] is True
    # 10 tokens, BOS and EOS among them, and 12: with a doubled BOS it would be one more each
    assert report["tokens"] == 4 * (10 + 12) == report["tokens_with_loss"]
    assert "[[<s> [INST] a [/INST] red </s> <s> [INST] b [/INST] red </s>]]" in result.stdout


def test_only_completions_carry_loss(audit):
    rows = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "red"}]}]
    result, report = audit(rows * 3)
    assert result.returncode == 0, result.stderr
    assert (report["tokens"], report["tokens_with_loss"]) == (3 * 6, 3 * 2)
    assert "[[red </s>]]" in result.stdout


def test_cut_rows_and_padding_are_counted(audit):
    rows = [{"text": "a"}] * 2 + [{"text": "a b c d e f"}] * 2
    result, report = audit(rows, "--max_length", 5, "--train_sampling_strategy", "sequential")
    assert result.returncode == 0, result.stderr
    assert report["rows_cut_by_max_length"] == 2 and report["longest_row"] == 8
    assert report["padding_share"] == pytest.approx(4 / 20)  # 3 + 3 + 5 + 5 tokens in a batch of 4 x 5


def test_two_bos_stop_the_chain(audit, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text("{{ bos_token + ' ' + bos_token + ' ' }}" + template.read_text())
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "red"}]
    result, report = audit([{"messages": messages}], model=model)
    assert result.returncode == 1 and report is None
    assert "1 rows begin with two BOS (first: row 1)" in result.stderr


def test_an_eos_without_loss_stops_the_chain(audit, tiny_model, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    template = model / "chat_template.jinja"
    template.write_text(template.read_text().replace(" + eos_token", ""))
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "red"}]
    result, report = audit([{"messages": messages}], model=model)
    assert result.returncode == 1 and report is None
    assert "no </s> in the labels" in result.stderr and "Traceback" not in result.stderr


def test_options_of_the_training_are_taken_and_need_no_accelerator(audit):
    args = ("--bf16", "true", "--padding_free", "true", "--packing", "true", "--token_metrics", "false", "--lora_r", 8)
    result, report = audit([{"text": "a b c"}] * 4, *args)
    assert result.returncode == 0, result.stderr
    assert report["tokens"] == 4 * 5


def test_prompts_that_fill_max_length_stop_the_chain(audit):
    rows = [{"prompt": [{"role": "user", "content": "a b c"}], "completion": [{"role": "assistant", "content": "red"}]}]
    result, report = audit(rows, "--max_length", 4)
    assert result.returncode == 1 and report is None
    assert "no token to learn from" in result.stderr


def test_the_tutorials_own_rows(tiny_model, tmp_path):
    if not GUANACO.exists():
        pytest.skip(f"the tutorial's data set is not at {GUANACO}")
    from transformers import AutoTokenizer

    script = load("audit_tokens.py")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    rows = script.load_rows(str(GUANACO), "train")
    assert len(rows) == 1000 and rows[0]["text"].startswith("<s>")
    config = script.SFTConfig(str(tmp_path), max_length=None, bf16=False, report_to=[])
    trainer = script.tokenize_rows(rows, tokenizer, config)
    counts, problems = script.audit(trainer.train_dataset, tokenizer, 1024)
    assert problems == [] and counts["rows"] == 1000 and counts["tokenizer_adds_bos"]
