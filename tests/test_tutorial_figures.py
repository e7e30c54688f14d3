"""Figures that the tutorial prints, from the scripts themselves, without its model and without an accelerator.

The training scripts run from start to end; only the weights are not there: the model of 7 billion parameters is built
on the meta device, which knows shapes and types and holds no values, so nothing can be trained on it or written of it.
"""

import contextlib
import io
from types import SimpleNamespace

import pytest
import torch
from conftest import load, write_rows
from helpers import call, read

SHARDS = [f"model-0000{number}-of-00006.safetensors" for number in range(1, 7)]


@pytest.fixture
def run_on_meta(tiny_model, tmp_path, monkeypatch):
    """Runs a training script on Llama-2-7B without values; returns its run.json, what it says, and the bytes of
    each file of weights.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {}

    def make_model(name, dtype, **options):
        with torch.device("meta"):
            return LlamaForCausalLM._from_config(LlamaConfig(), dtype=getattr(torch, dtype))

    def note_size(tensors, file, **options):
        sizes[str(file).rsplit("/", 1)[-1]] = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def run_script(script):
        module = load(script)
        monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", make_model)
        monkeypatch.setattr("transformers.Trainer._move_model_to_device", lambda self, model, device: None)
        monkeypatch.setattr(
            module.SFTTrainer, "train", lambda self, **options: SimpleNamespace(metrics={"train_runtime": 1})
        )
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", note_size)
        monkeypatch.setattr("peft.peft_model.safe_save_file", note_size)
        rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}] * 4)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            call(script, "--model_name_or_path", tiny_model, "--dataset_name", rows, "--output_dir", tmp_path)
        print(said.getvalue())
        return read(tmp_path / "run.json"), said.getvalue().splitlines(), sizes

    return run_script


def test_lora_trains_33_554_432_of_6_771_970_048_parameters(run_on_meta):
    record, said, sizes = run_on_meta("02_train_lora.py")
    assert record["parameters"] == {"trainable": 33_554_432, "total": 6_771_970_048}
    assert "trainable params: 33,554,432 || all params: 6,771,970,048 || trainable%: 0.4955" in said
    assert sizes == {"adapter_model.safetensors": 4 * 33_554_432}


def test_full_training_trains_6_738_415_616_parameters_and_saves_six_files(run_on_meta, tmp_path):
    record, said, sizes = run_on_meta("03_train_full.py")
    assert record["parameters"] == {"trainable": 6_738_415_616, "total": 6_738_415_616}
    assert "trainable params: 6,738,415,616 || all params: 6,738,415,616 || trainable%: 100.0000" in said
    for name, size in sizes.items():
        print(f"{name}  {size / 1e9:.2f} GB")
    assert sorted(sizes) == SHARDS
    assert sum(sizes.values()) == 4 * 6_738_415_616 and max(sizes.values()) <= 5e9
    others = {"config.json", "generation_config.json", "model.safetensors.index.json"}
    assert others <= {file.name for file in (tmp_path / "model").iterdir()}


@pytest.mark.parametrize("script", ["02_train_lora.py", "03_train_full.py"])
def test_1000_rows_are_250_steps_at_a_flat_learning_rate(script, tiny_model, tmp_path):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "[INST] what color is the sky [/INST] blue </s>"}] * 1000)
    call(script, "--model_name_or_path", tiny_model, "--dataset_name", rows, "--output_dir", tmp_path / "out")
    record = read(tmp_path / "out/run.json")
    log = [(entry["step"], entry["learning_rate"]) for entry in record["history"] if "loss" in entry]
    print(f"{script}: (step, learning rate) {log}")
    assert log == [(step, 4e-5) for step in (50, 100, 150, 200, 250)]
