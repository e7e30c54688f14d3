"""Training on 4-bit weights (QLoRA) on a tiny model: what it learns and records, and how it is merged."""

import json

import pytest
import torch
import yaml
from conftest import ROOT, load, run
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

FAST = ["--learning_rate", "0.01", "--optim", "adamw_torch", "--logging_steps", "1", "--lora_dropout", "0"]
FOUR_BIT = ["--load_in_4bit", "--use_bnb_nested_quant", "--lora_target_modules", "all-linear"]
QUESTIONS = ["what color is the sky", "what color is the sea", "what color is the a"]


def read(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


@pytest.fixture
def train(tiny_model, question_rows, tmp_path, monkeypatch):
    """Trains in this process and returns the record and the adapter's weights."""

    def train(name, *args):
        command = ["--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", tmp_path / name]
        monkeypatch.setattr("sys.argv", ["02_train_lora.py", *map(str, command), *FAST, *map(str, args)])
        load("02_train_lora.py").main()
        return read(tmp_path / name / "run.json"), load_file(tmp_path / name / "adapter/adapter_model.safetensors")

    return train


@pytest.fixture(scope="module")
def trained(tiny_model, question_rows, tmp_path_factory):
    """Output folder of 15 epochs on the color questions, on 4-bit weights."""
    folder = tmp_path_factory.mktemp("qlora")
    common = ("--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", folder / "lora")
    args = ("--dataset_test_split", "validation", "--num_train_epochs", 15)
    result = run("02_train_lora.py", *common, *FAST, *FOUR_BIT, *args, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "4-bit weights, computed with in " in result.stdout
    return folder / "lora"


def losses(record: dict) -> list[float]:
    return [entry["loss"] for entry in record["history"] if "loss" in entry]


def test_it_learns_on_4_bit_weights_and_says_what_they_take(trained, train, tiny_model):
    record = read(trained / "run.json")
    assert losses(record)[-1] < 0.2 * losses(record)[0]
    assert (record["quantization"]["bnb_4bit_quant_type"], record["arguments"]["load_in_4bit"]) == ("nf4", True)
    assert record["quantization"]["bnb_4bit_use_double_quant"]

    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    numbers = {name: parameter.numel() for name, parameter in model.named_parameters()}
    linear = [count for name, count in numbers.items() if "_proj" in name]
    # half a byte a weight, a byte for each 64 of them, four bytes for each 256 of those; 4 bytes for all others
    least = sum(count // 2 + count // 64 + 4 for count in linear) + 4 * (sum(numbers.values()) - sum(linear))
    tables = 16 * 4 + 256 * 4 + 256  # of the values that 4 and 8 bits stand for, and a description
    assert least <= record["metrics"]["weights_bytes"] <= least + tables * len(linear)

    plain, _ = train("plain", "--lora_target_modules", "all-linear", "--max_steps", "1")
    assert plain["quantization"] is None and plain["metrics"]["weights_bytes"] == 4 * sum(numbers.values())
    assert plain["parameters"] == record["parameters"] and plain["base_model"] == record["base_model"]


def test_an_update_that_bfloat16_would_lose_is_kept(train):
    first, third = (train(steps, *FOUR_BIT, "--learning_rate", "1e-6", "--max_steps", steps)[1] for steps in ("1", "3"))
    assert {value.dtype for value in third.values()} == {torch.float32}
    moved = torch.cat([(first[name] != third[name]).flatten() for name in first if "lora_A" in name])
    assert moved.float().mean() > 0.9


def test_an_evaluation_on_the_way_changes_nothing(train, monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)  # as on a CPU that has it
    args = (*FOUR_BIT, "--max_steps", "4", "--dataset_test_split", "validation")
    without, adapter = train("without", *args)
    evaluated, other = train("evaluated", *args, "--eval_strategy", "steps", "--eval_steps", "2")
    assert losses(without) == losses(evaluated) and len(losses(without)) == 4
    assert sum("eval_loss" in entry for entry in evaluated["history"]) == 2
    assert all(torch.equal(value, other[name]) for name, value in adapter.items())  # and twice is the same to the bit


def test_4_bit_weights_are_computed_with_in_bfloat16_where_the_hardware_has_it(monkeypatch):
    module = load("02_train_lora.py")

    def chosen(dtype="float32") -> torch.dtype:
        return module.choose_quantization(module.ModelConfig(dtype=dtype, load_in_4bit=True)).bnb_4bit_compute_dtype

    for name, there in (("avx512_f", False), ("avx512_bf16", True), ("amx_bf16", True), ("bf16", True)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda name=name: {name: True, "avx2": True})
        assert chosen() == (torch.bfloat16 if there else torch.float32)
    assert chosen("float16") == torch.float16
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for native in (True, False):  # by emulation every accelerator has it
        answers = {False: native, True: True}
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, a=answers: a[including_emulation]
        )
        assert chosen() == (torch.bfloat16 if native else torch.float32)
    assert module.choose_quantization(module.ModelConfig()) is None


def test_the_merge_says_where_it_goes_and_measures_the_difference(trained, tiny_model, tmp_path):
    merge = ("--model_name_or_path", trained / "adapter", "--output_dir", tmp_path / "merged", "--prompts", *QUESTIONS)
    result = run("04_merge_adapter.py", *merge, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "trained on quantized weights. It is merged into those of full precision" in result.stdout
    found = read(tmp_path / "merged/run.json")["quantized_base"]
    assert f"{found['same_tokens']} of {found['tokens']} tokens of these answers are chosen again" in result.stdout

    # The same, by the models' own losses on the answers of the merged model.
    quantization = BitsAndBytesConfig(**read(trained / "run.json")["quantization"])
    module = load("04_merge_adapter.py")
    full, tokenizer = module.load_model(str(tmp_path / "merged/model"), None, "float32")
    rows = module.answer_prompts(full, tokenizer, QUESTIONS, 48)
    for layer in (four := AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=quantization)).modules():
        layer.support_avx512bf16_for_cpu = False
    four = PeftModel.from_pretrained(four, trained / "adapter").eval()
    for model, name in ((full, "full_precision"), (four, "quantized")):
        total = 0.0
        for row, start in rows:
            labels = row.clone()
            labels[:start] = -100
            with torch.inference_mode():
                total += model(row[None], labels=labels[None]).loss.item() * (len(row) - start)
        assert total / sum(len(row) - start for row, start in rows) == pytest.approx(found[f"loss_{name}"], rel=1e-3)
    assert found["mean_difference"] > 0 and found["loss_quantized"] != found["loss_full_precision"]

    card = ("write_card.py", tmp_path / "merged/run.json")
    assert run(*card, cwd=tmp_path).returncode == 0
    text = (tmp_path / "merged/model/README.md").read_text()
    assert "quantized: 4 bits, nf4, double quantization" in text and "not into the quantized ones" in text


def test_the_steps_after_it_take_it_as_any_adapter(trained, tiny_model, question_rows, tmp_path):
    command = ("--base_model", tiny_model, "--models", trained / "adapter", "--dataset_name", question_rows)
    result = run("evaluate.py", *command, "--max_new_tokens", 4, "--output_dir", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    base, lora = read(tmp_path / "evaluation.json")["models"]
    assert lora["loss"] < 0.5 * base["loss"]
    on_quantized = read(trained / "run.json")["metrics"]["eval_loss"]
    assert f"quantized weights, where its loss is {on_quantized:.4f}" in (tmp_path / "evaluation.md").read_text()
    assert [answer.strip() for answer in lora["answers"]] == ["blue", "green", "red", "red"]

    # A run on 4-bit weights has a curve of its own.
    curve = tmp_path / "curves/qlora.json"
    curve.parent.mkdir()
    assert run("verify_run.py", trained / "run.json", "--record", curve, cwd=tmp_path).returncode == 0
    plain = read(curve)
    plain["arguments"]["load_in_4bit"] = False
    (tmp_path / "curves/lora.json").write_text(json.dumps(plain))
    result = run("verify_run.py", trained / "run.json", "--curves", "curves", cwd=tmp_path)
    assert result.returncode == 0 and result.stdout.count("pass: all") == 1, result.stderr


def test_the_recipes_are_those_of_lora_in_4_bits(train):
    recipes = {file.stem: yaml.safe_load(file.read_text()) for file in (ROOT / "env/recipes").glob("*.yaml")}
    four_bit = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "use_bnb_nested_quant": True}
    assert recipes["embedded-qlora"] == recipes["embedded"] | four_bit
    assert recipes["qlora"].items() >= (four_bit | {"lora_target_modules": ["all-linear"]}).items()
    args = ("--config", ROOT / "env/recipes/qlora.yaml", "--optim", "paged_adamw_32bit", "--max_steps", "2")
    record, adapter = train("qlora", *args)
    assert record["arguments"]["gradient_checkpointing"] and record["quantization"]["bnb_4bit_quant_type"] == "nf4"
    assert all(value.any() for value in adapter.values())  # each B has left zero
