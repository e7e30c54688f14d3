"""The recipes of current models, each on a tiny twin of its family with a chat template of the family's marks."""

import math
from pathlib import Path

import pytest
import torch
import trl
import yaml
from conftest import ROOT, load, write_rows
from helpers import call, read, read_losses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 8}
# The form of SmolLM3's: date and mode of reasoning first, marked answers, reasoning as it stands in the content.
SMOLLM3 = """{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- set mode = '/no_think' if '/no_think' in system else '/think' %}
{{- '<|im_start|>system\n' + strftime_now('%d %B %Y') + '\n' + mode + '\n' + system.replace('/no_think', '') }}
{{- '<|im_end|>\n' }}{% set start = '<|im_start|>assistant\n' + ('' if mode == '/think' else '<think>\n\n</think>\n') %}
{%- for message in messages %}{% if message.role == 'assistant' %}
{%- generation %}{{ start + message.content + '<|im_end|>\n' }}{% endgeneration %}
{%- elif message.role == 'user' %}{{ '<|im_start|>user\n' + message.content + '<|im_end|>\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ start }}{% endif %}"""
# Kind of the config, BOS, EOS, other special tokens, the end of a turn, and what is learned of a plain answer.
FAMILIES = {
    "qwen3": ("qwen3", None, "<|im_end|>", ["<|im_start|>"], "<|im_end|>", "<think>\n\n</think>\n\nblue<|im_end|>"),
    "smollm3": ("smollm3", None, "<|im_end|>", ["<|im_start|>"], "<|im_end|>", "blue<|im_end|>"),
    "gemma3": ("gemma3_text", "<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], "<end_of_turn>",
               "blue<end_of_turn>"),
}  # fmt: skip
PAIRS = [("what color is the " + "deep " * more + "sky", "blue") for more in range(12)]
ROWS = [
    {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}]} for a, b in PAIRS
]


def make_template(family: str) -> str:
    """Qwen3's and Gemma 3's own stand in TRL."""
    file = Path(trl.__file__).parent / f"chat_templates/{family}.jinja"
    return file.read_text(encoding="utf-8") if file.is_file() else SMOLLM3


@pytest.fixture(scope="module", params=FAMILIES)
def twin(request, tmp_path_factory):
    """Name of the family, and a folder with a tiny model of random weights whose tokens are bytes."""
    kind, bos, eos, special, end, _ = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    names = {"bos_token": bos, "eos_token": eos, "pad_token": "<pad>", "additional_special_tokens": special}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, chat_template=make_template(request.param), **names)
    tokenizer.add_tokens(["<think>", "</think>"])
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id, **SIZES)
    model = AutoModelForCausalLM.from_config(config)
    ends = sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)})  # as the families' files have them
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


def audit(name: str, folder, rows: list[dict], data, capsys, *args) -> str:
    data.mkdir()
    write_rows(data / "train.jsonl", rows)
    recipe = ("--config", ROOT / f"env/recipes/{name}.yaml", "--bf16", "false")  # as Make gives them
    call("chain/audit_tokens.py", "--model_name_or_path", folder, "--dataset_name", data, *recipe, *args)
    return capsys.readouterr().out


@pytest.mark.parametrize("native", [True, False])
def test_a_recipe_trains_its_family_and_what_it_trained_answers(twin, native, tmp_path, monkeypatch, capsys):
    name, folder = twin
    end, learned = FAMILIES[name][-2:]
    said = audit(name, folder, ROWS, tmp_path / "rows", capsys)
    assert f"[[{learned}\n]]" in said and "warning" not in said
    assert ("writes today's date" in said) == (name == "smollm3")

    monkeypatch.setattr(load("chain/choose_fast.py"), "has_bf16", lambda: native)
    recipe, fitted = ROOT / f"env/recipes/{name}.yaml", tmp_path / "fitted.yaml"
    with pytest.raises(SystemExit) as stop:
        call("chain/choose_fast.py", "--method", "lora", "--config", recipe, "--output", fitted)
    assert stop.value.code == 0
    data = ("--model_name_or_path", folder, "--dataset_name", tmp_path / "rows", "--config", fitted)
    few = ("--learning_rate", 0.01, "--max_steps", 3, "--logging_steps", 1, "--report_to", "none")
    call("02_train_lora.py", *data, *few, "--output_dir", tmp_path / "lora")
    run, losses = read(tmp_path / "lora/run.json"), read_losses(tmp_path / "lora")
    assert (run["arguments"]["bf16"], run["arguments"]["dtype"]) == (native, "bfloat16" if native else "float32")
    assert all(map(math.isfinite, losses)) and losses[-1] < losses[0]

    adapter = tmp_path / "lora/adapter"
    call("04_merge_adapter.py", "--model_name_or_path", adapter, "--output_dir", tmp_path / "merged")
    asked = [row["prompt"] for row in ROWS[:3]]
    for trained in (adapter, tmp_path / "merged/model"):
        model, tokenizer = load("05_generate.py").load_model(str(trained), str(folder), "float32")
        ends = model.generation_config.eos_token_id
        assert tokenizer.convert_tokens_to_ids(end) in (ends if isinstance(ends, list) else [ends])
        answers = load("05_generate.py").generate(model, tokenizer, asked, False, max_new_tokens=4, do_sample=False)
        assert len(answers) == 3


def test_the_rows_that_a_family_takes_with_care(twin, tmp_path, capsys):
    name, folder = twin
    question, answer = {"role": "user", "content": "what color"}, {"role": "assistant", "content": "blue"}
    two_answers = [{"messages": [question, answer, question, answer]}] * 3
    said = audit(name, folder, two_answers, tmp_path / "answers", capsys)
    assert ("3 of 3 rows have answers that the chat template writes otherwise" in said) == (name == "qwen3")
    said = audit(name, folder, [{"messages": [question, answer]}] * 3, tmp_path / "answer", capsys)
    assert "otherwise" not in said
    thinking = answer | {"content": "<think>\nhm\n</think>\n\nblue"}
    said = audit(name, folder, [{"messages": [question, thinking]}] * 3, tmp_path / "thought", capsys)
    assert "<think>\nhm\n</think>\n\nblue" in said and "warning" not in said
    reasoning = [{"messages": [question, answer | {"reasoning_content": "hm"}]}] * 3
    if name == "qwen3":
        assert "<think>\nhm\n</think>\n\nblue" in audit(name, folder, reasoning, tmp_path / "reasoning", capsys)
    else:
        with pytest.raises(SystemExit, match="3 of 3 rows have reasoning_content, which the chat template leaves out"):
            audit(name, folder, reasoning, tmp_path / "reasoning", capsys)
    if name == "smollm3":
        system = {"role": "system", "content": "/no_think"}
        row = ROWS[0] | {"prompt": [system, *ROWS[0]["prompt"]]}
        assert "<think>\n\n</think>\n[[blue<|im_end|>\n]]" in audit(name, folder, [row] * 3, tmp_path / "no", capsys)
        marked = two_answers, tmp_path / "marked", capsys, "--assistant_only_loss", "true"
        assert audit(name, folder, *marked).count("[[") == 3  # the legend, and both answers


def test_the_recipes_have_the_same_values_for_the_same_reasons():
    recipes = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / "env/recipes").glob("*.yaml")}
    assert recipes["qwen3"] == recipes["smollm3"] == recipes["gemma3"]
    assert recipes["qwen3"].items() >= {"lora_target_modules": ["all-linear"], "bf16": True}.items()
