"""Models of random weights, their tokenizer and rows, from nothing but data/ and a config: no hub, no account.

    python synthetic.py FOLDER SIZE          # tiny, or llama2-7b-half: Llama-2-7B's width in 16 of its 32 layers

Writes FOLDER/model (weights in bfloat16 on an accelerator, else float32, and tokenizer) and FOLDER/rows/train.jsonl:
160 texts, each of 20 texts eight times, whose lengths are those of the tutorial's data.
"""

import json
import random
import sys
from pathlib import Path

from tokenizers import ByteLevelBPETokenizer

DATA = Path(__file__).resolve().parent.parent / "data"
SIZES = {
    "tiny": dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                 num_key_value_heads=2, vocab_size=2000),
    "llama2-7b": dict(vocab_size=32000),  # the rest is LlamaConfig's default
    "llama2-7b-half": dict(num_hidden_layers=16, vocab_size=32000),
}  # fmt: skip
# Tokens of the rows of mlabonne/guanaco-llama2-1k, cut at 1024, at each twentieth of them: 62 is longer than 5 %.
# Counted with a tokenizer of 32,000 words that was trained on those rows.
LENGTHS = (62, 90, 119, 143, 168, 199, 223, 250, 277, 295, 320, 349, 383, 422, 463, 508, 577, 672, 918, 1024)
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def read_texts() -> list[str]:
    """Questions and answers of the embedded data set."""
    rows = [json.loads(line) for line in (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    return [" ".join(turn["content"] for turn in row["prompt"] + row["completion"]) for row in rows]


def train_tokenizer():
    """A byte-level tokenizer with a chat template, trained on the embedded data set: at most 2,000 tokens."""
    from transformers import PreTrainedTokenizerFast

    words = ByteLevelBPETokenizer()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words.train_from_iterator(read_texts(), vocab_size=2000, special_tokens=special, show_progress=False)
    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "additional_special_tokens": ["<|im_start|>"]}
    return PreTrainedTokenizerFast(tokenizer_object=words._tokenizer, chat_template=TEMPLATE, **ends)


def make_model(size: str, folder: Path) -> None:
    """Saves a Llama of that size, drawn on the accelerator where there is one, with the tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    tokenizer, gpu = train_tokenizer(), torch.cuda.is_available()
    ids = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    dtype = torch.bfloat16 if gpu and size != "tiny" else torch.float32
    with torch.device("cuda:0" if gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES[size], **ids), dtype=dtype)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_rows(folder: Path, most: int = 1024) -> None:
    """Texts of these lengths, or as much shorter as most is below 1024; each of them in eight rows."""
    tokenizer, texts = train_tokenizer(), []
    random.seed(0)
    for length in LENGTHS:
        words = " ".join(random.sample(read_texts(), 302)).split(" ")
        count = 1
        while len(tokenizer(" ".join(words[: count + 1])).input_ids) < length * most // 1024:  # and EOS
            count += 1
        texts.append(" ".join(words[:count]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts * 8))


if __name__ == "__main__":
    out, size = Path(sys.argv[1]), sys.argv[2]
    make_model(size, out / "model")
    make_rows(out / "rows", 128 if size == "tiny" else 1024)
