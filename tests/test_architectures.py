"""Twelve architectures through LoRA, full fine-tuning and merge, against plain PyTorch and transformers.

A few of them in the tests; all of them, as a table: ARCHITECTURES=all make test ARGS="tests/test_architectures.py -s"
"""

import os
from types import SimpleNamespace

import pytest
import torch
from conftest import load
from helpers import call, measure, read, read_rows
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = {"num_key_value_heads": 2, "head_dim": 8}
EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
ARCHITECTURES = {
    "Llama, tied": ("llama", SMALL | SHARED | {"tie_word_embeddings": True}),
    "Llama": ("llama", SMALL | SHARED | {"tie_word_embeddings": False}),
    "GPT-2": ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}),
    "Qwen2": ("qwen2", SMALL | SHARED),
    "Qwen3": ("qwen3", SMALL | SHARED),
    "Gemma 2": ("gemma2", SMALL | SHARED | {"sliding_window": 8}),
    "Gemma 3": ("gemma3_text", SMALL | SHARED | {"sliding_window": 8}),
    "Mistral": ("mistral", SMALL | SHARED | {"sliding_window": 8}),
    "Phi-3": ("phi3", SMALL | {"num_key_value_heads": 2, "pad_token_id": 0}),
    "Mixtral": ("mixtral", SMALL | SHARED | {"num_local_experts": 4}),
    "Qwen2-MoE": ("qwen2_moe", SMALL | SHARED | EXPERTS),
    "OLMo 2": ("olmo2", SMALL | SHARED),
}
SHORT = ("Llama, tied", "GPT-2", "Gemma 3", "Mixtral")
TESTED = ARCHITECTURES if os.environ.get("ARCHITECTURES") == "all" else SHORT
ROW = "{:12} {:7} loss {:.6f}, plain PyTorch {:.6f}, apart {:.1e}; {}"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def make_base(kind: str, settings: dict, tokenizer, folder) -> None:
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(kind, vocab_size=32, initializer_range=0.3, **ids, **settings)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.inference_mode()
def answer_plainly(model, tokenizer, questions: list) -> list[str]:
    answers = []
    for question in questions:
        ids = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_tensors="pt", return_dict=False
        )
        answers.append(tokenizer.decode(model.generate(ids, **GREEDY)[0, ids.shape[1] :], skip_special_tokens=True))
    return answers


def evaluate(model, tokenizer, run: dict, data, folder) -> tuple[float, int]:
    """Held-out loss and tokens as evaluate.py measures them."""
    script = load("chain/evaluate.py")
    config = script.read_options(run, SimpleNamespace(max_length=None), str(folder))
    rows = load("02_train_lora.py").load_rows(str(data), "validation", tokenizer, config)
    measured = script.measure(model, tokenizer, rows, config, [], 1)
    return measured["loss"], measured["tokens"]


@pytest.mark.parametrize("name", TESTED)
def test_what_was_trained_is_measured_merged_and_answers_the_same_everywhere(name, tiny_model, question_rows, tmp_path):
    base, held_out = tmp_path / "base", question_rows / "validation.jsonl"
    make_base(*ARCHITECTURES[name], AutoTokenizer.from_pretrained(tiny_model), base)
    saved_as = read(base / "config.json")
    data = ("--model_name_or_path", base, "--dataset_name", question_rows, "--dataset_test_split", "validation")
    options = ("--learning_rate", 0.01, "--num_train_epochs", 8, "--optim", "adamw_torch", "--max_grad_norm", 1)
    options += ("--save_strategy", "no", "--report_to", "none", "--lr_scheduler_type", "linear")
    lora = ("--lora_target_modules", "all-linear", "--lora_r", 8, "--lora_alpha", 16, "--lora_dropout", 0)
    call("02_train_lora.py", *data, *options, *lora, "--output_dir", tmp_path / "lora")
    call("03_train_full.py", *data, *options, "--output_dir", tmp_path / "full")
    adapter = ("--model_name_or_path", tmp_path / "lora/adapter", "--base_model", base, "--max_new_tokens", 6)
    call("04_merge_adapter.py", *adapter, "--output_dir", tmp_path / "merged")

    questions = [row["prompt"] for row in read_rows(question_rows / "train.jsonl")[::9]]  # of four lengths
    generate, answers = load("05_generate.py"), {}
    folders = {"lora": tmp_path / "lora/adapter", "full": tmp_path / "full/model", "merged": tmp_path / "merged/model"}
    for step, folder in folders.items():
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(base if step == "lora" else folder, dtype="float32")
        model = PeftModel.from_pretrained(model, folder).eval() if step == "lora" else model.eval()
        plain, tokens = measure(model, tokenizer, held_out)
        answers[step] = answer_plainly(model, tokenizer, questions)
        ours, ours_tokenizer = generate.load_model(str(folder), str(base), "float32")
        found = {"batch of four": generate.generate(ours, ours_tokenizer, questions, False, **GREEDY)}
        found["one by one"] = [
            generate.generate(ours, ours_tokenizer, [each], False, **GREEDY)[0] for each in questions
        ]
        pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
        found["pipeline"] = [pipe(each, return_full_text=False, **GREEDY)[0]["generated_text"] for each in questions]
        if step == "merged":
            found["adapter"] = answers["lora"]
        run = read(tmp_path / ("full" if step == "full" else "lora") / "run.json")
        loss, count = evaluate(ours, ours_tokenizer, run, question_rows, tmp_path)
        words = ", ".join(f"{way} {'equal' if each == answers[step] else 'NOT equal'}" for way, each in found.items())
        print(ROW.format(name, step, loss, plain, abs(loss - plain), words))
        assert loss == pytest.approx(plain, rel=2e-5, abs=1e-6) and count == tokens and loss < 2.5
        if step != "merged":
            assert (loss, count) == (run["metrics"]["eval_loss"], run["metrics"]["eval_tokens"])  # to the bit
        assert found == dict.fromkeys(found, answers[step])
    for step in ("full", "merged"):
        config = read(folders[step] / "config.json")
        changed = {key for key in saved_as.keys() | config.keys() if saved_as.get(key) != config.get(key)}
        assert changed <= {"pad_token_id", "transformers_version", "dtype", "use_cache"}, changed
