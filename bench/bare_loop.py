"""Train in a bare PyTorch loop over unpadded batches: what is practical on this machine.

    python timed.py OUT.json bare_loop.py SETTINGS.json

The same model, LoRA layers or none, rows, order of lengths and number of real tokens in a batch as the others, but each
batch is cut from the running tokens of its rows, so that nothing is padded; nothing is done but forward, backward,
clipping and a fused AdamW step. Precision and attention: the settings bf16, dtype and attn_implementation. The second
batch is profiled where there is a file for that: profile.
"""

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

settings = json.loads(Path(sys.argv[1]).read_text())
size = settings["batch_size"]
torch.manual_seed(42)
tokenizer = AutoTokenizer.from_pretrained(settings["model"])
rows = [json.loads(line)["text"] for line in Path(settings["rows"]).read_text().splitlines()]
rows = [tokenizer(row).input_ids[: settings["max_length"]] for row in rows]
order = list(LengthGroupedSampler(size, lengths=[len(row) for row in rows]))  # as train_sampling_strategy orders them
batches = [[rows[number] for number in order[start : start + size]] for start in range(0, len(rows), size)]

precision = {name: settings[name] for name in ("dtype", "attn_implementation")}
model = AutoModelForCausalLM.from_pretrained(settings["model"], **precision)
if not settings["full"]:
    model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, lora_dropout=0.1, task_type="CAUSAL_LM"))
device = "cuda:0" if torch.cuda.is_available() else "cpu"
model = model.to(device).train()
trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
optimizer = torch.optim.AdamW(trainable, lr=4e-5, weight_decay=0.001, fused=True)
profile = None
for number, batch in enumerate(batches):
    if settings["profile"] and number == 1:
        profile = torch.profiler.profile()
        profile.start()
    ids = torch.tensor([token for row in batch for token in row])
    length = len(ids) // size
    ids = ids[: size * length].view(size, length).to(device)
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=settings["bf16"]):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trainable, 0.3)
    optimizer.step()
    optimizer.zero_grad()
    if profile:
        profile.stop()
        key = "self_device_time_total" if device != "cpu" else "self_cpu_time_total"
        Path(settings["profile"]).write_text(profile.key_averages().table(sort_by=key, row_limit=20))
        profile = None
