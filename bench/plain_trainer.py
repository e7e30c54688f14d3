"""Train with transformers' own Trainer and the tutorial's values.

python timed.py OUT.json plain_trainer.py SETTINGS.json
"""

import json
import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments

settings = json.loads(Path(sys.argv[1]).read_text())
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
tokenizer.pad_token = tokenizer.eos_token
rows = load_dataset("json", data_files=settings["rows"], split="train")
rows = rows.map(lambda row: {"input_ids": tokenizer(row["text"]).input_ids[: settings["max_length"]]})
rows = rows.map(lambda row: {"labels": row["input_ids"]}, remove_columns="text")
model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
if not settings["full"]:
    model = get_peft_model(model, LoraConfig(lora_alpha=16, lora_dropout=0.1, r=64, task_type="CAUSAL_LM"))
arguments = TrainingArguments(
    output_dir=settings["output_dir"],
    num_train_epochs=1,
    per_device_train_batch_size=settings["batch_size"],
    optim="paged_adamw_32bit",
    save_strategy="no",
    logging_steps=50,
    learning_rate=4e-5,
    weight_decay=0.001,
    max_grad_norm=0.3,
    warmup_steps=0.03,
    train_sampling_strategy="group_by_length",
    lr_scheduler_type="constant",
    report_to="tensorboard",
)
collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator, processing_class=tokenizer).train()
