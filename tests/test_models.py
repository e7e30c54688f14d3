"""Models of other kinds, quantized, sharded and in 16 bits; what a model needs of the options of a training."""

from types import SimpleNamespace

import datasets
import pytest
import torch
from conftest import load
from helpers import call, measure, read, read_weights
from huggingface_hub import constants
from peft import PeftModel
from test_architectures import ARCHITECTURES
from test_hub import Hub
from test_makefile import Project
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl import ModelConfig

TRAINING = ("--dataset_test_split", "validation", "--max_steps", 3, "--learning_rate", 0.01, "--optim", "adamw_torch")
TRAINING += ("--max_grad_norm", 1, "--save_strategy", "no", "--report_to", "none")
LORA = ("--lora_target_modules", "all-linear", "--lora_r", 4, "--lora_alpha", 8, "--lora_dropout", 0)


# Before the weights ---------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub whose models have a config and weights that nobody should ask for."""
    hub = Hub()
    for config in (datasets.config, constants):
        monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.port}")
    template = constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    yield hub
    hub.close()


def fetch(hub, config: str) -> tuple[str, bool]:
    """What is said of a model with this config, and whether its weights were asked for."""
    hub.add("org/model", {"config.json": config.encode(), "model.safetensors": b"large"})
    with pytest.raises(SystemExit) as stop:
        call("01_download.py", "--only", "model", "--model_name_or_path", "org/model", "--output_dir", "out")
    assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
    return stop.value.code, any("model.safetensors" in path for _, path, *_ in hub.asked)


OTHER_KINDS = [
    ("qwen2_vl", "Qwen2VLForConditionalGeneration", '"vision_config": {"depth": 2}', "vision-language"),
    ("llava", "LlavaForConditionalGeneration", '"vision_config": {"hidden_size": 8}', "vision-language"),
    ("gemma3", "Gemma3ForConditionalGeneration", '"vision_config": {"hidden_size": 8}', "vision-language"),
    ("mistral3", "Mistral3ForConditionalGeneration", '"vision_config": {"hidden_size": 8}', "vision-language"),
    ("qwen2_audio", "Qwen2AudioForConditionalGeneration", '"audio_config": {"d_model": 8}', "speech"),
    ("whisper", "WhisperForConditionalGeneration", '"is_encoder_decoder": true', "encoder-decoder"),
    ("t5", "T5ForConditionalGeneration", '"is_encoder_decoder": true', "encoder-decoder"),
    ("bart", "BartForConditionalGeneration", '"is_encoder_decoder": true', "encoder-decoder"),
    ("bert", "BertForMaskedLM", '"is_decoder": false', ""),
    ("llama", "LlamaForSequenceClassification", '"is_decoder": false', ""),
]
LLAMA = '"model_type": "llama", "architectures": ["LlamaForCausalLM"]'
QUANTIZED = {
    method: f'{LLAMA}, "quantization_config": {{"quant_method": "{method}", "bits": 4}}'
    for method in ("gptq", "awq", "fp8", "compressed-tensors", "mxfp4", "bitsandbytes")
} | {"MLX": f'{LLAMA}, "quantization_config": {{"group_size": 64, "bits": 4}}'}


@pytest.mark.parametrize(("kind", "name", "more", "what"), OTHER_KINDS, ids=[kind for kind, *_ in OTHER_KINDS])
def test_a_model_of_another_kind_is_named_before_its_weights_are_fetched(kind, name, more, what, hub):
    said, asked = fetch(hub, f'{{"model_type": "{kind}", "architectures": ["{name}"], {more}}}')
    assert f"is a {name} ({what or 'no causal language model'}). Give one of text alone." in said and not asked


@pytest.mark.parametrize("method", QUANTIZED)
def test_quantized_weights_that_are_not_trained_are_named_before_they_are_fetched(method, hub):
    said, asked = fetch(hub, f"{{{QUANTIZED[method]}}}")
    assert f"is quantized ({method}). Give what it was made of" in said and not asked


@pytest.mark.parametrize(
    "config",
    [
        '"model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"]',
        '"model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "is_encoder_decoder": false',
        '"model_type": "bart", "architectures": ["BartForCausalLM"]',
        '"model_type": "llama"',
        '"model_type": "nobody_knows", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": true',
    ],
)
def test_the_weights_of_text_models_are_fetched(config, hub, monkeypatch):
    module = load("01_download.py")
    check = module.check_model
    monkeypatch.setattr(module, "check_model", lambda *given, weights=True: weights or check(*given, weights=False))
    hub.add("org/model", {"config.json": f"{{{config}}}".encode(), "model.safetensors": b"large"})
    call("01_download.py", "--only", "model", "--model_name_or_path", "org/model", "--output_dir", "out")
    assert any("model.safetensors" in path for _, path, *_ in hub.asked)


# Checkpoints ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 8])
def test_a_checkpoint_that_bitsandbytes_wrote_is_trained_as_it_is(bits, tiny_model, question_rows, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    torch.manual_seed(0)
    size = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4)
    ids = dict(vocab_size=32, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(LlamaConfig(**size, **ids, initializer_range=0.1)).save_pretrained(tmp_path / "whole")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    how = how if bits == 4 else BitsAndBytesConfig(load_in_8bit=True)
    whole, base = tmp_path / "whole", tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(whole, quantization_config=how, dtype="float32").save_pretrained(base)
    for folder in (whole, base):
        tokenizer.save_pretrained(folder)
    data = ("--model_name_or_path", base, "--dataset_name", question_rows)
    call("02_train_lora.py", *data, *TRAINING, *LORA, "--output_dir", tmp_path / "lora")
    adapter = tmp_path / "lora/adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), adapter).eval()
    loss, tokens = measure(model, tokenizer, question_rows / "validation.jsonl")
    metrics = read(tmp_path / "lora/run.json")["metrics"]
    assert metrics["eval_loss"] == pytest.approx(loss, rel=0.02) and metrics["eval_tokens"] == tokens
    answer = ("--model_name_or_path", adapter, "--prompt", "what color is the sky", "--max_new_tokens", 3)
    call("05_generate.py", *answer, "--output", tmp_path / "answers.jsonl")
    assert (tmp_path / "answers.jsonl").stat().st_size
    merge = ("04_merge_adapter.py", "--model_name_or_path", adapter, "--max_new_tokens", 3)
    with pytest.raises(SystemExit, match="is quantized, too coarse for an adapter. Give what it was made of: --base_"):
        call(*merge, "--output_dir", tmp_path / "merged")
    call(*merge, "--base_model", whole, "--output_dir", tmp_path / "merged")
    with pytest.raises(ValueError, match="purely quantized"):
        call("03_train_full.py", *data, *TRAINING, "--output_dir", tmp_path / "full")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_checkpoints_in_16_bits_are_trained_in_float32(dtype, tiny_model, question_rows, tmp_path):
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).save_pretrained(base)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(base)
    data = ("--model_name_or_path", base, "--dataset_name", question_rows)
    call("02_train_lora.py", *data, *TRAINING, *LORA, "--output_dir", tmp_path / "lora")
    call("03_train_full.py", *data, *TRAINING, "--output_dir", tmp_path / "full")
    adapter = ("--model_name_or_path", tmp_path / "lora/adapter", "--max_new_tokens", 3)
    call("04_merge_adapter.py", *adapter, "--output_dir", tmp_path / "merged")
    for folder in ("lora/adapter", "full/model", "merged/model"):
        weights = read_weights(tmp_path / folder)
        assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert read(tmp_path / "full/model/config.json")["dtype"] == "float32"


def test_a_model_in_fifty_files_is_trained_like_one_in_a_single_file(tiny_model, question_rows, tmp_path):
    torch.manual_seed(0)
    settings = AutoConfig.from_pretrained(tiny_model).to_dict() | {"num_hidden_layers": 6}
    model = LlamaForCausalLM(LlamaConfig(**settings))
    for name, size in (("one", "1GB"), ("fifty", 1)):
        model.save_pretrained(tmp_path / name, max_shard_size=size)
        AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / name)
        base = tmp_path / f"{name}-fetched"
        call("01_download.py", "--only", "model", "--model_name_or_path", tmp_path / name, "--output_dir", base)
        data = ("--model_name_or_path", base, "--dataset_name", question_rows)
        call("02_train_lora.py", *data, *TRAINING, *LORA, "--output_dir", tmp_path / f"{name}-lora")
    assert len([*(tmp_path / "fifty-fetched").glob("*.safetensors")]) >= 50
    one, fifty = (read_weights(tmp_path / f"{name}-lora/adapter") for name in ("one", "fifty"))
    assert one.keys() == fifty.keys() and all(torch.equal(one[key], fifty[key]) for key in one)


# What a model needs of the options ------------------------------------------------------------------------------------
def fit(name: str, dropout: float = 0.1, **options) -> list[str]:
    """Options that the audit adds for LoRA on a model of this kind."""
    kind, settings = ARCHITECTURES[name]
    asked = ModelConfig(use_peft=True, lora_dropout=dropout, **options)
    args = SimpleNamespace(max_length=128, router_aux_loss_coef=None)
    return load("chain/fit_options.py").fit_options(name, AutoConfig.for_model(kind, **settings), asked, args)


ATTENTION = ["k_proj", "o_proj", "q_proj", "v_proj"]
NO_ROUTER = ["--router_aux_loss_coef", "0"]
EXPERTS = " --lora_target_parameters experts.gate_up_proj experts.down_proj --lora_dropout 0"


@pytest.mark.parametrize(
    ("name", "targets", "given", "said"),
    [
        ("Llama", None, [], ""),
        ("SmolLM3", None, ["all-linear"], "PEFT has no targets for smollm3. Taken: all linear layers."),
        ("Falcon", "all-linear", [], ""),  # whose linear layers have a product of their own
        ("gpt-oss", None, ["all-linear"], EXPERTS),
        ("OLMoE", None, ATTENTION, EXPERTS),
        (
            "Qwen3-MoE",
            "all-linear",
            ATTENTION,
            "LoRA takes the experts of qwen3_moe with --lora_dropout 0 alone. Taken: k_proj",
        ),
        ("Qwen2-MoE", "all-linear", [], EXPERTS),
        ("Mixtral", None, ATTENTION, "PEFT has no targets for mixtral. Taken: k_proj o_proj"),  # its own fit none
        ("Mamba", None, ["dt_proj", "in_proj", "x_proj"], "Taken: dt_proj in_proj x_proj"),
        ("Mamba 2", "all-linear", [".*in_proj"], "LoRA does not take all linear layers of mamba2. Taken: .*in_proj."),
    ],
)
def test_targets_are_chosen_where_none_are_known_or_not_all_are_taken(name, targets, given, said, capsys):
    assert fit(name, lora_target_modules=targets and [targets]) == ["--lora_target_modules", *given] * bool(given)
    printed = capsys.readouterr().out
    assert said in printed and bool(printed) == bool(said)


def test_a_router_that_is_no_layer_for_lora_and_has_no_loss_is_left_out(capsys):
    options = fit("Llama 4")
    dense = ["down_proj", "gate_proj", *ATTENTION[:3], "up_proj", "v_proj"]
    assert options == [*NO_ROUTER, "--lora_target_modules", *dense]
    assert "TRL cannot compute the loss of a router of llama4_text" in capsys.readouterr().out
    assert fit("Granite-MoE", lora_target_modules=["q_proj", "v_proj"]) == NO_ROUTER


def test_experts_are_among_all_linear_layers_where_peft_adds_them_if_these_are_asked_for(capsys):
    assert fit("OLMoE", dropout=0) == ["--lora_target_modules", *ATTENTION] and EXPERTS in capsys.readouterr().out
    assert fit("Mixtral", dropout=0, lora_target_modules=["all-linear"]) == [] and capsys.readouterr().out == ""


HAVE = "Linear layers of 'Llama': down_proj gate_proj k_proj o_proj q_proj up_proj v_proj."


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("Llama", {"lora_target_modules": ["Wqkv", "c_attn"]}, HAVE),
        ("Llama", {"lora_target_modules": ["q_proj", "v_prj"]}, f"'Llama' has no v_prj for LoRA. {HAVE}"),
        ("Llama", {"lora_target_modules": ["q_proj"]}, "Give --lora_target_modules '.*q_proj'"),
        ("Mixtral", {"lora_target_parameters": ["experts.gate_up_proj"]}, "Experts are trained with --lora_dropout 0"),
        (
            "Mixtral",
            {"lora_target_modules": ["q_proj", "v_proj"], "lora_target_parameters": ["w1"], "dropout": 0},
            "'Mixtral' has no w1 for LoRA. Linear layers of 'Mixtral': k_proj o_proj q_proj v_proj. "
            "Its experts, for --lora_target_parameters: experts.gate_up_proj experts.down_proj.",
        ),
    ],
)
def test_wrong_targets_are_answered_with_those_that_the_model_has(name, options, said, capsys):
    with pytest.raises(SystemExit) as stop:
        fit(name, **options)
    assert said in stop.value.code and len(stop.value.code.splitlines()) == 1


def test_the_options_that_a_model_needs_stand_after_those_that_were_typed(tmp_path):
    project = Project(tmp_path)
    for method in ("lora", "full"):
        project.make("train-" + method)  # makes what it needs
        (tmp_path / f"outputs/check/audit-{method}.options").write_text("--max_length 8\n")
        project.make("train-" + method, "ARGS=--max_length 99")
        audit, predict, train = [line for line in project.commands() if "audit" in line or "_train_" in line]
        assert audit.endswith("--max_length 99") and ("--use_peft false" in audit) == (method == "full")
        assert predict.endswith("--max_length 99 --max_length 8") and train.endswith("--max_length 99 --max_length 8")


def test_no_memory_is_predicted_of_weights_that_are_quantized_already():
    config = AutoConfig.for_model("llama").to_dict()
    quantized = config | {"quantization_config": {"quant_method": "bitsandbytes"}}
    unknown_to = load("chain/memory.py").unknown_to
    assert (unknown_to(config, []), unknown_to(quantized, [])) == ("", "its weights are quantized already")
