"""Generate with transformers alone, as its documentation shows: python plain_generate.py MODEL COUNT PROMPT [...]"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name, count, *prompts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(name, dtype="float32").to("cuda:0" if torch.cuda.is_available() else "cpu")
chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
inputs = tokenizer.apply_chat_template(
    chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
).to(model.device)
outputs = model.generate(
    **inputs,
    max_new_tokens=int(count),
    do_sample=False,
    temperature=None,
    top_p=None,
    pad_token_id=tokenizer.eos_token_id,
)
print(tokenizer.batch_decode(outputs[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
