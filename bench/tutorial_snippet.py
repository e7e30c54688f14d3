"""The tutorial's own snippets, with no more changed than today's libraries ask for.

    python timed.py OUT.json tutorial_snippet.py SETTINGS.json

warmup_ratio is warmup_steps now, group_by_length is train_sampling_strategy, max_seq_length is max_length in SFTConfig.
What SFTConfig would set otherwise than TrainingArguments did is set back. PEFT wraps the model once, not twice.
No checkpoint is saved, as in none of what is measured.
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

settings = json.loads(Path(sys.argv[1]).read_text())
base_model_name = settings["model"]
device = "cuda:0" if torch.cuda.is_available() else "cpu"
base_model = AutoModelForCausalLM.from_pretrained(base_model_name, dtype=torch.float32).to(device)
tokenizer = AutoTokenizer.from_pretrained(base_model_name)
tokenizer.pad_token = tokenizer.eos_token
tokenizer.padding_side = "right"
training_dataset = load_dataset("json", data_files=settings["rows"], split="train")
training_arguments = SFTConfig(
    output_dir=settings["output_dir"],
    num_train_epochs=1,
    per_device_train_batch_size=settings["batch_size"],
    gradient_accumulation_steps=1,
    optim="paged_adamw_32bit",
    save_strategy="no",
    logging_steps=50,
    learning_rate=4e-5,
    weight_decay=0.001,
    fp16=False,
    bf16=False,
    gradient_checkpointing=False,
    max_grad_norm=0.3,
    max_steps=-1,
    warmup_steps=0.03,
    train_sampling_strategy="group_by_length",
    lr_scheduler_type="constant",
    report_to="tensorboard",
    max_length=settings["max_length"],
)
peft_config = LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, bias="none", task_type="CAUSAL_LM")
trainer = SFTTrainer(
    model=base_model,
    train_dataset=training_dataset,
    peft_config=None if settings["full"] else peft_config,
    processing_class=tokenizer,
    args=training_arguments,
)
trainer.train()
