"""Training on 4-bit weights (QLoRA) on a tiny model: what it learns and records, and how it is merged."""

import pytest
import torch
import yaml
from conftest import ROOT, load
from helpers import call, measure, read, read_weights
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

FAST = ["--learning_rate", "0.01", "--optim", "adamw_torch", "--logging_steps", "1", "--lora_dropout", "0"]
FOUR_BIT = ["--load_in_4bit", "--use_bnb_nested_quant", "--lora_target_modules", "all-linear"]
QUESTIONS = ["what color is the sky", "what color is the sea", "what color is the a"]


@pytest.fixture
def train(tiny_model, question_rows, tmp_path):
    """Trains in this process; returns the record and the adapter's weights."""

    def train(name, *args):
        command = ("--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", tmp_path / name)
        call("02_train_lora.py", *command, *FAST, *args)
        return read(tmp_path / name / "run.json"), read_weights(tmp_path / name / "adapter")

    return train


@pytest.fixture(scope="module")
def trained(tiny_model, question_rows, tmp_path_factory):
    """Output folder of 15 epochs on the color questions, on 4-bit weights."""
    folder = tmp_path_factory.mktemp("qlora") / "lora"
    command = ("--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", folder)
    args = ("--dataset_test_split", "validation", "--num_train_epochs", 15)
    call("02_train_lora.py", *command, *FAST, *FOUR_BIT, *args)
    return folder


def load_quantized(tiny_model, folder):
    """The adapter on the weights that it was trained on."""
    quantization = BitsAndBytesConfig(**read(folder / "run.json")["quantization"])
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization)
    for layer in model.modules():
        layer.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, folder / "adapter").eval()


def losses(record: dict) -> list[float]:
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


def test_it_learns_on_4_bit_weights_and_says_how_they_were_made(trained, train, tiny_model, question_rows):
    record = read(trained / "run.json")
    assert losses(record)[-1] < 0.2 * losses(record)[0]
    assert (record["quantization"]["bnb_4bit_quant_type"], record["arguments"]["load_in_4bit"]) == ("nf4", True)
    assert record["quantization"]["bnb_4bit_use_double_quant"]
    plain, _ = train("plain", "--lora_target_modules", "all-linear", "--max_steps", 1)
    assert plain["quantization"] is None
    assert plain["parameters"] == record["parameters"]  # two of them in a byte are counted as two

    model, tokenizer = load("05_generate.py").load_model(str(trained / "adapter"), None, "float32")
    held_out = question_rows / "validation.jsonl"
    on_quantized, _ = measure(load_quantized(tiny_model, trained), tokenizer, held_out)
    assert record["metrics"]["eval_loss"] == pytest.approx(on_quantized, rel=1e-4)
    # On the weights in full precision it is an adapter as any other.
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert measure(model, tokenizer, held_out)[0] < 0.5 * measure(base, tokenizer, held_out)[0]


def test_an_update_that_bfloat16_would_lose_is_kept(train):
    first, third = (train(steps, *FOUR_BIT, "--learning_rate", "1e-6", "--max_steps", steps)[1] for steps in ("1", "3"))
    assert {value.dtype for value in third.values()} == {torch.float32}
    moved = torch.cat([(first[name] != third[name]).flatten() for name in first if "lora_A" in name])
    assert moved.float().mean() > 0.9


def test_an_evaluation_on_the_way_changes_nothing(train, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as on a CPU that has it
    args = (*FOUR_BIT, "--max_steps", 4, "--dataset_test_split", "validation")
    without, adapter = train("without", *args)
    evaluated, other = train("evaluated", *args, "--eval_strategy", "steps", "--eval_steps", 2)
    assert losses(without) == losses(evaluated) and len(losses(without)) == 4
    assert sum("eval_loss" in entry for entry in evaluated["history"]) == 3
    assert all(torch.equal(value, other[name]) for name, value in adapter.items())  # and twice is the same to the bit


@pytest.mark.parametrize("native", [True, False])
def test_the_recipe_computes_in_bfloat16_where_the_hardware_has_it(native, train, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(load("chain/choose_fast.py"), "has_bf16", lambda: native)
    recipe = ROOT / "env/recipes/qlora.yaml"
    with pytest.raises(SystemExit) as stop:
        call("chain/choose_fast.py", "--method", "lora", "--config", recipe, "--output", "fitted.yaml")
    assert stop.value.code == 0
    fitted, written = (yaml.safe_load(file.read_text()) for file in (tmp_path / "fitted.yaml", recipe))
    changed = {name: value for name, value in fitted.items() if value != written.get(name)}
    assert changed == ({"use_cpu": True} if native else {"bf16": False, "dtype": "float32"})  # the optimizer stays
    record, adapter = train("qlora", "--config", "fitted.yaml", "--optim", "paged_adamw_32bit", "--max_steps", 2)
    arguments, quantization = record["arguments"], record["quantization"]
    assert arguments["gradient_checkpointing"] and quantization["bnb_4bit_quant_type"] == "nf4"
    dtype = "bfloat16" if native else "float32"
    assert (arguments["bf16"], arguments["dtype"], quantization["bnb_4bit_compute_dtype"]) == (native, dtype, dtype)
    assert all(value.any() and value.dtype == torch.float32 for value in adapter.values())  # each B has left zero


def test_the_merge_says_where_it_goes_and_measures_the_difference(trained, tiny_model, tmp_path, capsys):
    merge = ("--model_name_or_path", trained / "adapter", "--output_dir", tmp_path / "merged", "--prompts", *QUESTIONS)
    call("04_merge_adapter.py", *merge)
    found = read(tmp_path / "merged/run.json")["quantized_base"]
    assert f"Trained on quantized weights, merged into those of full precision: {found}" in capsys.readouterr().out

    # The same, by the models' own losses on the answers of the merged model.
    full, tokenizer = load("05_generate.py").load_model(str(tmp_path / "merged/model"), None, "float32")
    rows = load("04_merge_adapter.py").answer_prompts(full, tokenizer, QUESTIONS, 48)
    four = load_quantized(tiny_model, trained)
    for model, name in ((full, "full_precision"), (four, "quantized")):
        total = 0.0
        for row, start in rows:
            labels = row.clone()
            labels[:start] = -100
            with torch.inference_mode():
                total += model(row[None], labels=labels[None]).loss.item() * (len(row) - start)
        assert total / sum(len(row) - start for row, start in rows) == pytest.approx(found[f"loss_{name}"], rel=1e-3)
    assert found["mean_difference"] > 0 and found["loss_quantized"] != found["loss_full_precision"]


def test_a_merge_does_without_the_quantized_weights_where_they_cannot_be_loaded(trained, tmp_path, monkeypatch, capsys):
    module = load("04_merge_adapter.py")
    load_model = module.load_model

    def load_without_bitsandbytes(*args, quantization=None):
        if quantization:
            raise ImportError("no bitsandbytes for this machine")
        return load_model(*args)

    monkeypatch.setattr(module, "load_model", load_without_bitsandbytes)
    merge = ("--model_name_or_path", trained / "adapter", "--output_dir", tmp_path, "--prompts", *QUESTIONS)
    call("04_merge_adapter.py", *merge)
    assert "is not measured: no bitsandbytes for this machine" in capsys.readouterr().out
    assert read(tmp_path / "run.json")["quantized_base"] is None and (tmp_path / "model/model.safetensors").exists()


def test_the_recipes_are_those_of_lora_in_4_bits():
    recipes = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / "env/recipes").glob("*.yaml")}
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    assert recipes["embedded-qlora"] == recipes["embedded"] | four_bit
    assert recipes["qlora"].items() >= (four_bit | {"lora_target_modules": ["all-linear"]}).items()
