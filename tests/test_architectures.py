"""Dense models, mixtures of experts and state-space models through LoRA, full fine-tuning and merge, against plain
PyTorch and transformers, with the options that the audit adds for them.

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
from trl import ModelConfig

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SHARED = {"num_key_value_heads": 2, "head_dim": 8}
GROUPED = {"num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 4}
CHOSEN = {"num_experts_per_tok": 2}
LOCAL = CHOSEN | {"num_local_experts": 4}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = (
    LATENT | CHOSEN | {"num_key_value_heads": 4, "moe_intermediate_size": 32, "n_routed_experts": 4, "n_group": 1}
)
DEEPSEEK |= {"topk_group": 1, "first_k_dense_replace": 1}
STATES = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
DELTA = {f"linear_{part}": size for part, size in dict(num_value_heads=4, num_key_heads=2, key_head_dim=8).items()}
DELTA |= {"linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]}
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
    "SmolLM3": ("smollm3", SMALL | GROUPED | {"pad_token_id": 0}),
    "Granite": ("granite", SMALL | GROUPED),
    "GLM-4": ("glm4", SMALL | SHARED | {"pad_token_id": 0}),
    "Cohere": ("cohere", SMALL | GROUPED | {"pad_token_id": 0, "logit_scale": 1.0}),
    "StarCoder2": ("starcoder2", SMALL | GROUPED),
    "Phi": ("phi", SMALL),
    "StableLM": ("stablelm", SMALL | {"num_key_value_heads": 4}),
    "GPT-NeoX": ("gpt_neox", SMALL),
    "Falcon": ("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "BLOOM": ("bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "OPT": ("opt", SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32, "pad_token_id": 0}),
    "Qwen3-MoE": ("qwen3_moe", SMALL | SHARED | EXPERTS | CHOSEN),
    "OLMoE": ("olmoe", SMALL | GROUPED | CHOSEN | {"num_experts": 4}),
    "gpt-oss": ("gpt_oss", SMALL | SHARED | LOCAL | {"sliding_window": 8}),
    "DeepSeek-V3": ("deepseek_v3", SMALL | DEEPSEEK),
    "Granite-MoE": ("granitemoe", SMALL | GROUPED | LOCAL),
    "Llama 4": ("llama4_text", SMALL | SHARED | LOCAL | {"intermediate_size_mlp": 64}),
    "Qwen3-Next": ("qwen3_next", SMALL | SHARED | EXPERTS | CHOSEN | DELTA),
    "Mamba": ("mamba", STATES),
    "Mamba 2": ("mamba2", STATES | {"num_heads": 8, "head_dim": 8, "n_groups": 1}),
    "Falcon-Mamba": ("falcon_mamba", STATES),
    "Falcon-H1": ("falcon_h1", SMALL | SHARED | MAMBA | {"mamba_d_ssm": 64}),
    "Jamba": ("jamba", SMALL | GROUPED | {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "Bamba": ("bamba", SMALL | GROUPED | MAMBA | {"attn_layer_indices": [1]}),
    "LFM2": ("lfm2", SMALL | GROUPED | {"layer_types": ["conv", "full_attention"], "block_multiple_of": 16}),
    "RecurrentGemma": ("recurrent_gemma", SMALL | GROUPED | {"num_hidden_layers": 3, "lru_width": 32}),
    "RWKV": ("rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64}),
}
SHORT = ("Llama, tied", "GPT-2", "Gemma 3", "Mixtral")
TESTED = ARCHITECTURES if os.environ.get("ARCHITECTURES") == "all" else SHORT
NEARLY = ("Mamba", "Falcon-Mamba", "Jamba")  # which round otherwise in a batch of another size
ROW = "{:14} {:7} loss {:.6f}, plain PyTorch {:.6f}, apart {:.1e}; {}"
GREEDY = {"max_new_tokens": 6, "do_sample": False}


def make_base(kind: str, settings: dict, tokenizer, folder) -> None:
    torch.manual_seed(0)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(kind, vocab_size=32, initializer_range=0.3, **ids, **settings)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fit(base, targets: str | None) -> list[str]:
    """What the audit adds to the options of a training of this model: with LoRA on targets, or of all weights."""
    asked = ModelConfig(use_peft=bool(targets), lora_target_modules=targets and [targets], lora_dropout=0)
    args = SimpleNamespace(max_length=1024, router_aux_loss_coef=None)
    return load("chain/fit_options.py").fit_options(base.name, AutoConfig.from_pretrained(base), asked, args)


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
    call("02_train_lora.py", *data, *options, *lora, *fit(base, "all-linear"), "--output_dir", tmp_path / "lora")
    call("03_train_full.py", *data, *options, *fit(base, None), "--output_dir", tmp_path / "full")
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
            same = pytest.approx(run["metrics"]["eval_loss"], rel=0 if name not in NEARLY else 1e-6)  # to the bit
            assert loss == same and count == run["metrics"]["eval_tokens"]
        assert found == dict.fromkeys(found, answers[step])
    for step in ("full", "merged"):
        config = read(folders[step] / "config.json")
        changed = {key for key in saved_as.keys() | config.keys() if saved_as.get(key) != config.get(key)}
        assert changed <= {"pad_token_id", "transformers_version", "dtype", "use_cache"}, changed
