"""Answer by llama.cpp's runtime with what was exported, and compare with the answers of make infer, token by token.

    python check_export.py --probe out/check/probe-merged.json --exports out/export/merged-f16 out/export/merged-q4_k_m

Reads   the answers and the held-out rows in probe.json (probe.py), and folders of export_gguf.py.
Writes  a table to the terminal and to out/check/export-merged.md, and all figures to export-merged.json.

Of each file: does it make of the messages the same text, and of that the same token ids; are the greedy answers the
same tokens, and where not, by how many nats the other token was behind; what is the loss of the held-out rows.
In f32 and f16 another token is an error where it was behind by more than rounding explains; a quantized model differs.
"""

import argparse
import logging
import os
from pathlib import Path

import llama_cpp
import numpy as np
from folders import fail, make_parser, read_json, read_record, write_json, write_text
from jinja2 import TemplateError
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

# By how many nats rounding may turn a choice, by the type that make infer computed in. Seen in float32: 0.06.
TOLERANCE = {"float32": 0.1, "float16": 0.2, "bfloat16": 1.0}
EXACT = ("f32", "f16")
HEAD = "| export | MiB | prompts | answers | tokens | first other token | held-out loss | change |"


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--probe", type=Path, required=True, help="probe.json of the model that was exported")
    add("--exports", type=Path, nargs="+", required=True, help="folders of export_gguf.py")
    return parser.parse_args()


def load_model(folder: Path, length: int) -> llama_cpp.Llama:
    """The exported model, or the exported base model with the exported adapter on it, for so many tokens."""
    adapter, threads = folder / "adapter.gguf", int(os.environ.get("OMP_NUM_THREADS") or os.cpu_count())
    file = folder / ("base.gguf" if adapter.is_file() else "model.gguf")
    if not file.is_file():
        fail(f"nothing is exported in {folder}. Do that first: make export")
    options = {"lora_path": str(adapter) if adapter.is_file() else None, "n_gpu_layers": 0, "verbose": False}
    options |= {"n_ctx": length, "logits_all": True, "n_threads": threads, "n_threads_batch": threads}
    return llama_cpp.Llama(str(file), **options)


def evaluate(model: llama_cpp.Llama, ids: list[int]) -> np.ndarray:
    """Logits after each of the tokens, which follow those that the model has had."""
    model.eval(ids)
    return model.scores[model.n_tokens - len(ids) : model.n_tokens]


def is_prompt_same(model: llama_cpp.Llama, prompt: dict, chat: bool) -> bool:
    """Whether the file's own template and tokenizer make the same of the messages, or of the text."""
    ids = model.tokenize(prompt["prompt"].encode(), add_bos=not chat, special=True)
    if ids != prompt["prompt_ids"]:
        return False
    if not chat:
        return True
    bos, eos = (model.detokenize([token], special=True).decode() for token in (model.token_bos(), model.token_eos()))
    try:
        write = Jinja2ChatFormatter(model.metadata.get("tokenizer.chat_template", ""), eos, bos)
        return write(messages=prompt["messages"]).prompt == prompt["prompt"]
    except TemplateError:
        return False


def find_other(model: llama_cpp.Llama, prompt: dict) -> dict | None:
    """The first token of the greedy answer that is another one than expected; None where all are the same."""
    model.reset()
    logits = evaluate(model, prompt["prompt_ids"])[-1]
    for place, expected in enumerate(prompt["answer_ids"]):
        if (found := int(logits.argmax())) != expected:
            texts = [model.detokenize([token], special=True).decode(errors="replace") for token in (expected, found)]
            behind = float(logits[found] - logits[expected])
            margin = prompt["margins"][place]
            return {"place": place, "expected": texts[0], "found": texts[1], "behind": behind, "was_ahead": margin}
        logits = evaluate(model, [expected])[-1]
    return None


def measure_loss(model: llama_cpp.Llama, rows: list[dict]) -> float | None:
    """Nats per token of the rows, each token predicted from those before it; as make evaluate counts them."""
    total, count = 0.0, 0
    for row in rows:
        model.reset()
        labels = np.array(row["labels"][1:])
        places = np.flatnonzero(labels != -100)
        logits = evaluate(model, row["input_ids"])[places].astype(np.float64)
        logits -= logits.max(-1, keepdims=True)
        total += (np.log(np.exp(logits).sum(-1)) - logits[np.arange(len(places)), labels[places]]).sum()
        count += len(places)
    return total / count if count else None


def check(folder: Path, probe: dict) -> dict:
    """What came of an export."""
    lengths = [len(prompt["prompt_ids"]) + len(prompt["answer_ids"]) for prompt in probe["prompts"]]
    model = load_model(folder, max(lengths + [len(row["input_ids"]) for row in probe["rows"]]) + 1)
    others = [find_other(model, prompt) for prompt in probe["prompts"]]
    answers = [len(prompt["answer_ids"]) for prompt in probe["prompts"]]
    found = {
        "export": folder.name,
        "quant": read_record(folder)["arguments"]["quant"],
        "bytes": sum(file.stat().st_size for file in folder.glob("*.gguf")),
        "ends": model.token_eos() in probe["stops"],
        "same_prompts": sum(is_prompt_same(model, prompt, probe["chat"]) for prompt in probe["prompts"]),
        "same_answers": others.count(None),
        "answers": len(others),
        "same_tokens": sum(other["place"] if other else tokens for other, tokens in zip(others, answers, strict=True)),
        "tokens": sum(answers),
        "others": others,
        "loss": measure_loss(model, probe["rows"]),
        "expected_loss": probe["loss"],
    }
    model.close()
    return found


def write_row(found: dict) -> str:
    """A row of the table."""
    other = next((other for other in found["others"] if other), None)
    first = "none"
    if other:
        expected, instead = (repr(other[key]).replace("|", "\\|") for key in ("expected", "found"))
        first = f"{expected}, ahead by {other['was_ahead']:.2f}; here {instead}, by {other['behind']:.2f}"
    loss, change = "", ""
    if found["loss"] is not None:
        loss, change = f"{found['loss']:.4f}", f"{found['loss'] - found['expected_loss']:+.4f}"
    same = [f"{found[f'same_{kind}']} of {found[of]}" for kind, of in
            (("prompts", "answers"), ("answers", "answers"), ("tokens", "tokens"))]  # fmt: skip
    cells = [found["export"], f"{found['bytes'] / 2**20:.0f}", *same, first, loss, change]
    return f"| {' | '.join(cells)} |"


def find_errors(found: dict, tolerance: float) -> list[str]:
    """What rounding and quantization do not explain."""
    errors, name = [], found["export"]
    if found["same_prompts"] < found["answers"]:
        errors.append(f"{name}: its template or tokenizer makes something else of the prompts than make infer.")
    if not found["ends"]:
        errors.append(f"{name}: its EOS is none of those at which make infer stops. Type: make export")
    for other in found["others"]:
        if other and found["quant"] in EXACT and max(other["behind"], other["was_ahead"]) > tolerance:
            errors.append(
                f"{name}: {other['found']!r} instead of {other['expected']!r}, which was ahead by "
                f"{other['was_ahead']:.2f} nats: more than the {tolerance:g} that rounding explains."
            )
    return errors


def main() -> None:
    args = read_arguments()
    logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)  # no line for each layer of an adapter
    if not args.probe.is_file():
        fail(f"no answers to compare with in {args.probe}. make export-check writes them, or probe.py.")
    probe = read_json(args.probe)
    results = [check(folder, probe) for folder in args.exports]
    expected = f"make infer: {len(probe['prompts'])} answers in {probe['dtype']}"
    if probe["loss"] is not None:
        expected += f", held-out loss {probe['loss']:.4f} over {probe['tokens']} tokens"
    lines = [expected + ".", "", HEAD, "| --- " * HEAD.count(" | ") + "| --- |", *map(write_row, results)]
    file = args.probe.with_name(args.probe.name.replace("probe", "export"))
    write_text(file.with_suffix(".md"), "\n".join(lines) + "\n")
    write_json(file, {"probe": str(args.probe), "tolerance": TOLERANCE[probe["dtype"]], "exports": results})
    print(*lines, sep="\n")
    if errors := [error for found in results for error in find_errors(found, TOLERANCE[probe["dtype"]])]:
        fail("\n".join(errors))


if __name__ == "__main__":
    main()
