"""Answer held-out questions as `make infer` does, token by token, for what else answers them to be compared with.

    python probe.py --model_name_or_path out/lora/adapter --base_model MODEL --dataset_name DATA --output probe.json

Reads   a base model, an adapter or a full model, and the validation rows of DATA.
Writes  probe.json: greedy answers of 05_generate.py with their token ids and margins, and the held-out rows as the
        training took them (token ids, labels), with the loss that evaluate.py reports; with --load also how long it
        takes to answer many, in batches.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

from folders import make_parser, write_json


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", default="outputs/lora/adapter", help="hub id or folder of an adapter or a model")
    add("--base_model", help="base of the adapter, if not the one it names")
    add("--dataset_name", default="outputs/dataset", help="folder with held-out rows")
    add("--prompt", default="What is a large language model?", help="asked first; without held-out rows it alone")
    add("--dtype", help="type of the weights, as make infer has it (default: that of 05_generate.py)")
    add("--max_new_tokens", type=int, default=64, help="the most tokens of an answer (default: 64)")
    add("--load", type=int, default=0, help="how many questions to answer in batches, for the time it takes")
    add("--at_once", type=int, default=16, help="how many of them are in a batch (default: 16)")
    add("--output", type=Path, default=Path("probe.json"), help="file to write")
    return parser.parse_args()


if __name__ == "__main__":
    read_arguments()  # before the imports that take seconds: for --help, and for what is wrong in the options

import datasets
import torch
from evaluate import check_training_rows, choose_prompts, find_run, generation, make_trainer, read_options, training
from transformers import LogitsProcessor, LogitsProcessorList


class Recorder(LogitsProcessor):
    """Keeps what generate() looks at before each token: the likeliest ids and their margins, and the time."""

    def __init__(self):
        self.prompt, self.ids, self.margins, self.times = None, [], [], []

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """input_ids (batch, length), scores (batch, vocabulary), which are given back as they are."""
        self.times.append(time.monotonic())
        self.prompt = input_ids if self.prompt is None else self.prompt
        best = scores.float().log_softmax(-1).topk(2)
        self.ids.append(best.indices[:, 0].tolist())
        self.margins.append((best.values[:, 0] - best.values[:, 1]).tolist())
        return scores


def answer(model, tokenizer, prompts: list, max_new_tokens: int) -> tuple[list[str], Recorder]:
    """Greedy answers of 05_generate.py to a batch of prompts, and what was recorded of them."""
    recorder, raw = Recorder(), not tokenizer.chat_template
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}
    options["logits_processor"] = LogitsProcessorList([recorder])
    return generation.generate(model, tokenizer, prompts, raw, **options), recorder


def answer_alone(model, tokenizer, prompt: str | list, max_new_tokens: int) -> dict:
    """One answer, with the token ids of prompt and answer, and by how many nats each token was ahead of the next."""
    (text,), recorder = answer(model, tokenizer, [prompt], max_new_tokens)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    chat = {"tokenize": False, "add_generation_prompt": True}
    return {
        "messages": messages,
        "prompt": tokenizer.apply_chat_template(messages, **chat) if tokenizer.chat_template else prompt,
        "prompt_ids": recorder.prompt[0].tolist(),
        "answer": text,
        "answer_ids": [ids[0] for ids in recorder.ids],
        "margins": [margins[0] for margins in recorder.margins],
    }


def answer_many(model, tokenizer, prompts: list, at_once: int, max_new_tokens: int, stops: list[int]) -> dict:
    """How long it takes to answer prompts in batches: tokens, seconds, and seconds to the first token of each."""
    began, tokens, first = time.monotonic(), 0, []
    for start in range(0, len(prompts), at_once):
        asked, batch = time.monotonic(), prompts[start : start + at_once]
        _, recorder = answer(model, tokenizer, batch, max_new_tokens)
        first += [recorder.times[0] - asked] * len(batch)
        for ids in zip(*recorder.ids, strict=True):  # of one answer; after its end the batch goes on
            tokens += next((place for place, token in enumerate(ids, 1) if token in stops), len(ids))
    seconds = time.monotonic() - began
    return {"requests": len(prompts), "at_once": at_once, "tokens": tokens, "seconds": seconds, "first_token": first}


def main() -> None:
    args = read_arguments()
    datasets.disable_progress_bars()
    model, tokenizer = generation.load_model(
        args.model_name_or_path, args.base_model, args.dtype or generation.DTYPE, torch.accelerator.is_available()
    )
    stops, held_out, prompts = model.generation_config.eos_token_id, None, [args.prompt]
    run = find_run(args.model_name_or_path)
    folder = tempfile.TemporaryDirectory()
    if any(Path(args.dataset_name).glob("validation.*")):
        check_training_rows([args.model_name_or_path], args.dataset_name, "validation")
        config = read_options(run, argparse.Namespace(max_length=None), folder.name)
        config.disable_tqdm = True
        held_out = training.load_rows(args.dataset_name, "validation", tokenizer, config)
        asked = [each["prompt"] for each in choose_prompts(held_out, max(5, args.load)) if not each["tools"]]
        prompts += [prompt for prompt in asked if isinstance(prompt, str) != bool(tokenizer.chat_template)]
    report = {
        "model": args.model_name_or_path,
        "base_model": args.base_model,
        "dtype": str(model.dtype).removeprefix("torch."),
        "chat": bool(tokenizer.chat_template),
        "max_new_tokens": args.max_new_tokens,
        "stops": stops,
        "prompts": [answer_alone(model, tokenizer, prompt, args.max_new_tokens) for prompt in prompts[:6]],
        "rows": [],
        "loss": None,
        "tokens": 0,
    }
    if args.load:
        many = (prompts * args.load)[: args.load]
        report["load"] = answer_many(model, tokenizer, many, args.at_once, args.max_new_tokens, stops)
        report["load"]["prompts"] = many
    if held_out:
        trainer = make_trainer(model, tokenizer, held_out, config, run.get("arguments", {}).get("attn_implementation"))
        rows = trainer.eval_dataset
        report["rows"] = [{"input_ids": row["input_ids"], "labels": row["labels"]} for row in rows]
        report |= {"loss": trainer.evaluate()["eval_loss"], "tokens": trainer.eval_tokens}
    write_json(args.output, report)
    print(f"{len(report['prompts'])} answers of {args.model_name_or_path} are in {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
