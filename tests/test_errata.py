"""What docs/tutorial.md says of the tutorial's code and today's libraries, where no other test shows it already."""

import pytest
import torch
from conftest import load
from helpers import OPTIONS, call, read
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from trl import SFTConfig, SFTTrainer

LORA = LoraConfig(r=4, task_type="CAUSAL_LM")


def make_trainer(model, question_rows, tiny_model, folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = load("02_train_lora.py").load_rows(str(question_rows), "train", tokenizer, OPTIONS)
    config = SFTConfig(str(folder), bf16=False, max_steps=1, learning_rate=0.1, report_to=[], save_strategy="no")
    return SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)


def test_counting_with_get_peft_model_changes_the_base_model_itself(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LORA)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_the_tutorials_training_without_lora_is_with_lora(tiny_model, question_rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LORA)
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = make_trainer(model, question_rows, tiny_model, tmp_path / "out")
    trainer.peft_config = None  # the tutorial's way to train without LoRA
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved and all("lora_" in name for name in moved)
    # What it saves is not the model: a reload finds no weights for the layers that have an adapter.
    trainer.model.save_pretrained(tmp_path / "saved")
    assert any("q_proj.base_layer.weight" in name for name in load_file(tmp_path / "saved/model.safetensors"))
    _, found = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert any("q_proj.weight" in name for name in found["missing_keys"])


@pytest.mark.parametrize(
    ("call", "argument"),
    [
        (lambda: SFTTrainer("model", tokenizer=None), "tokenizer"),
        (lambda: SFTTrainer("model", dataset_text_field="text"), "dataset_text_field"),
        (lambda: TrainingArguments("out", group_by_length=True), "group_by_length"),
        (lambda: TrainingArguments("out", warmup_ratio=0.03), "warmup_ratio"),
    ],
)
def test_arguments_of_the_tutorial_that_are_gone(call, argument):
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        call()


def test_a_float16_checkpoint_is_trained_and_saved_in_float32(tiny_model, question_rows, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype="float16")
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "half")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "half").dtype == torch.float16  # where no dtype is given

    command = ("--model_name_or_path", tmp_path / "half", "--dataset_name", question_rows)
    steps = ("--output_dir", tmp_path / "full", "--max_steps", 4, "--save_steps", 2, "--optim", "adamw_torch")
    call("03_train_full.py", *command, *steps)
    weights = load_file(tmp_path / "full/model/model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}

    # Values of the tutorial that differ from SFTConfig's own, and the limit on checkpoints
    arguments = read(tmp_path / "full/run.json")["arguments"]
    expected = {"bf16": False, "gradient_checkpointing": False, "trust_remote_code": False, "logging_steps": 50}
    assert {key: arguments[key] for key in expected} == expected
    assert [folder.name for folder in (tmp_path / "full/checkpoints").glob("checkpoint-*")] == ["checkpoint-4"]
