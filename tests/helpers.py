"""What several tests do: run a script in this process, and compute a loss without the scripts."""

import json
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from conftest import load
from safetensors.torch import load_file

# What load_rows takes of the options of a training.
OPTIONS = SimpleNamespace(dataset_text_field="text", chat_template_path=None, eos_token=None)


def call(script: str, *args) -> None:
    """Runs a script in this process, which has imported its libraries."""
    argv, threads = sys.argv, torch.get_num_threads()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    sys.argv = [script, *map(str, args)]
    torch.set_num_threads(1)  # several wait for one another longer than a tiny model takes to compute
    try:
        load(script).main()
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def read_rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def read_losses(folder: Path) -> list[float]:
    """The training losses in the run.json of a folder."""
    return [entry["loss"] for entry in read(folder / "run.json")["history"] if "loss" in entry]


@torch.inference_mode()
def measure(model, tokenizer, file: Path) -> tuple[float, int]:
    """Mean loss of the tokens of all completions or texts, and their number; each row alone, without padding."""
    total, count = 0.0, 0
    for row in read_rows(file):
        if "text" in row:
            whole = [*tokenizer(row["text"]).input_ids, tokenizer.eos_token_id]
            begin = 1  # nothing comes before BOS to be predicted from
        else:
            options = {"tokenize": True, "return_dict": False}
            whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], **options)
            begin = len(tokenizer.apply_chat_template(row["prompt"], **options))
        log_probabilities = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        for place in range(begin, len(whole)):
            total -= log_probabilities[place - 1, whole[place]].item()
            count += 1
    return total / count, count
