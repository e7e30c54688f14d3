"""Measure base and trained models on held-out rows, and let each answer the same prompts.

    python evaluate.py --base_model MODEL --models out/lora/adapter --dataset_name DATA --output_dir report

Reads   MODEL (hub id or folder), adapters or full models, and the validation rows of DATA.
Writes  report/evaluation.md and report/evaluation.json: loss (nats per token), perplexity, greedy answers.

Each model is measured as it was when it was trained, by the trainer of 02_train_lora.py with the options in run.json
(template, EOS, masks, max_length, precision, batches), and the base model on the same tokens.
"""

import argparse
import hashlib
import json
import math
import tempfile
from itertools import groupby
from pathlib import Path

from figures import find_data, find_training
from folders import fail, make_parser, read_json, read_record, sha256, verify, write_json, write_text
from look_at_rows import read_tools
from records import load_script

# What gives tokens, labels, batches and precision.
OPTIONS = ("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "dataset_text_field")
OPTIONS += ("per_device_eval_batch_size", "train_sampling_strategy", "shuffle_dataset", "seed", "data_seed", "tf32")
OPTIONS += ("pad_to_multiple_of", "token_metrics", "loss_type", "label_smoothing_factor")
OPTIONS += ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")


def count(text: str) -> int:
    """A number above 0."""
    if (number := int(text)) < 1:
        raise ValueError(text)
    return number


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--base_model", default="meta-llama/Llama-2-7b-chat-hf", help="hub id or folder of the model before training")
    add("--models", nargs="+", default=[], help="folders of adapters or trained models to set beside it")
    add("--dataset_name", default="outputs/dataset", help="hub id, folder, or .jsonl, .json, .csv or .parquet file")
    add("--dataset_test_split", default="validation", help="split to measure on")
    add("--prompts", nargs="+", default=[], help="prompts to answer (default: the first five of the split)")
    add("--max_length", type=count, help="rows are cut to that many tokens (default: as in the training, else 1024)")
    add("--max_new_tokens", type=count, default=96, help="the most tokens of an answer (default: 96)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="type of the weights (default: as in the training)")
    add("--output_dir", type=Path, default=Path("report"), help="folder for evaluation.md and evaluation.json")
    return parser.parse_args()


if __name__ == "__main__":
    read_arguments()  # before the imports that take seconds: for --help, and for what is wrong in the options

training, generation = load_script("02_train_lora.py"), load_script("05_generate.py")

import torch
from datasets import Dataset


def list_sums(data: Path, split: str) -> dict[str, str]:
    """Sums of the rows of each split as they were noted when they were fetched; else of the file, or the folder."""
    if data.is_file():
        return {split: sha256(data)}
    if not (file := data / "run.json").is_file():
        return {"train": verify(data)} if data.is_dir() else {}
    return {name: part["sha256"] for name, part in read_json(file)["dataset"].items() if isinstance(part, dict)}


def find_run(model: str) -> dict:
    """The record of the training of a model, also of one that was merged by hand; nothing where there is none."""
    record = read_record(Path(model).parent)
    adapter = record.get("adapter")
    return find_training(record) or (read_record(Path(adapter["name"]).parent) if adapter else {})


def check_training_rows(models: list[str], data: str, split: str) -> None:
    """Refuses a model trained on the held-out rows, or on others than those beside them: they may be among these."""
    sums = list_sums(Path(data), split)
    for model in models:
        run = find_run(model)
        trained_on = run and find_data(run)["train"]["sha256"]
        part = run["arguments"]["dataset_train_split"] if run and run["dataset"]["name"] == data else ""
        overlap = part in (split, split.split("[")[0]) or part.split("[")[0] == split  # one of them may be all
        if overlap or (trained_on and trained_on == sums.get(split)):
            fail(f"{model} was trained on these rows of {data}. Give rows that it has not seen.")
        if trained_on and Path(data).is_dir() and trained_on != sums.get("train", trained_on):
            fail(f"{model} was trained on other rows than those of {data}. Train again: make train-lora")


def choose_prompts(rows: Dataset, count: int = 5) -> list[dict]:
    """Conversations of the first rows up to their last answer, that answer, and the tools; of texts the tutorial's
    query."""
    chosen = []
    for row in rows.select(range(min(count, len(rows)))):
        if isinstance(row.get("prompt"), str):
            prompt, reference = row["prompt"], row["completion"]
        elif messages := row.get("messages") or row.get("prompt", []) + row.get("completion", []):
            answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
            prompt = messages[: answers[-1]] if answers else messages
            reference = messages[answers[-1]]["content"] if answers else None
        else:
            return [{"prompt": "What is a large language model?", "reference": None, "tools": None}]
        if prompt:
            chosen.append({"prompt": prompt, "reference": reference, "tools": read_tools(row)})
    return chosen


def read_options(run: dict, args: argparse.Namespace, folder: str) -> training.Config:
    """The options of a training as far as they concern what is measured; without a record those of the script."""
    options = training.PARAMETERS | run.get("arguments", {})
    options = {"per_device_eval_batch_size": 8} | {name: options[name] for name in OPTIONS if name in options}
    if args.max_length:
        options["max_length"] = args.max_length
    cpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    return training.Config(folder, report_to=[], eval_packing=False, use_cpu=cpu, **options)


def make_trainer(model, tokenizer, rows: Dataset, config: training.Config, attention: str | None):
    """The trainer of 02_train_lora.py, with the rows as it takes them: token ids, and labels where there is loss."""
    if attention:  # the answers are those of 05_generate.py, the loss is that of the training
        try:
            model.set_attn_implementation(attention)
        except ImportError:
            print(f"{attention}, of the training, is not installed here: the loss is measured without it")
    trainer = training.TokenLossTrainer(
        model=model, args=config, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )
    trainer.eval_tokens = sum(label != -100 for labels in trainer.eval_dataset["labels"] for label in labels[1:])
    if not trainer.eval_tokens:
        fail(f"no row has a token with loss within --max_length {config.max_length}. Give a larger one.")
    return trainer


def measure(
    model,
    tokenizer,
    rows: Dataset,
    config: training.Config,
    prompts: list[dict],
    max_new_tokens: int,
    attention: str | None = None,
) -> dict:
    """Held-out loss, what it was measured on, and greedy answers, each alone as of 05_generate.py: in a batch rounding
    is another."""
    greedy, raw, answers = {"max_new_tokens": max_new_tokens, "do_sample": False}, not tokenizer.chat_template, []
    for each in prompts:
        answers += generation.generate(model, tokenizer, [each["prompt"]], raw, each["tools"], **greedy)
    trainer = make_trainer(model, tokenizer, rows, config, attention)
    columns, rows = rows.column_names, trainer.eval_dataset
    loss = trainer.evaluate()["eval_loss"]
    kind = "completions" if trainer.completion_only_loss and "prompt" in columns else "all tokens"
    return {
        "loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "rows": len(rows),
        "tokens": trainer.eval_tokens,
        "measured": "assistant turns" if config.assistant_only_loss else kind,
        "tokens_sha256": hashlib.sha256(json.dumps([*rows["input_ids"], *rows["labels"]]).encode()).hexdigest(),
        "answers": answers,
    }


def join_words(text) -> str:
    """A text in one line."""
    return " ".join(str(text).split())


def format_report(report: dict) -> str:
    """The report as Markdown: a table of losses for each set of tokens, then each prompt with the answers."""
    lines = ["# Evaluation"]
    for _, group in groupby(report["models"], lambda model: (model["tokens_sha256"], model["precision"])):
        base, *others = group
        lines += ["", "{rows} held-out rows of {0}, {tokens} tokens: {measured}.".format(report["dataset"], **base)]
        lines += ["", "| model | loss | against base | perplexity |", "| --- | --- | --- | --- |"]
        for model in (base, *others):
            change = f"{100 * (model['loss'] / base['loss'] - 1):+.1f} %"
            lines.append(f"| {model['name']} | {model['loss']:.4f} | {change} | {model['perplexity']:.2f} |")
    for model in report["models"]:
        if on_quantized := model.get("loss_quantized"):
            lines += ["", f"{model['name']} was trained on quantized weights, where its loss is {on_quantized:.4f}."]
            lines += ["Here it is measured on those of full precision."]
    lines += [f"\n{note}" for note in report["notes"]]
    for number, each in enumerate(report["prompts"]):
        *before, last = each["prompt"] if isinstance(each["prompt"], list) else [{"content": each["prompt"]}]
        lines += [
            "",
            f"## {join_words(last['content'])}",
            "",
            *(f"- {message['role']}: {join_words(message['content'])}" for message in before),
        ]
        if each["reference"]:
            lines.append(f"- **the data set**: {join_words(each['reference'])}")
        lines += [f"- **{model['name']}**: {join_words(model['answers'][number])}" for model in report["models"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = read_arguments()
    data = Path(args.dataset_name)
    if args.dataset_test_split == "validation" and any(data.glob("train.*")) and not any(data.glob("validation.*")):
        fail(f"{data} has no validation rows. Type the command of the training again, with VALIDATION_ROWS=10")
    default = data.is_file() and args.dataset_test_split == "validation"
    split = "train" if default else args.dataset_test_split  # all that a file has is called train
    check_training_rows(args.models, args.dataset_name, split)
    prompts = [{"prompt": prompt, "reference": None, "tools": None} for prompt in args.prompts]
    groups, notes = {}, []
    for path in args.models or [args.base_model]:
        run = find_run(path)
        attention = run.get("arguments", {}).get("attn_implementation")
        if not run.get("arguments") and path != args.base_model:
            print(f"{path} has no record of its training: it is measured with the options of 02_train_lora.py")
        dtype = args.dtype or run.get("arguments", {}).get("dtype", "float32")
        model, tokenizer = generation.load_model(path, args.base_model, dtype)
        with tempfile.TemporaryDirectory() as folder:
            config = read_options(run, args, folder)
            rows = training.load_rows(args.dataset_name, split, tokenizer, config)
            prompts = prompts or choose_prompts(rows)
            result = measure(model, tokenizer, rows, config, prompts, args.max_new_tokens, attention)
            flags = [flag for flag in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval") if getattr(config, flag)]
            precision = " ".join([dtype, *flags, *filter(None, [attention])])
            new, group = [], groups.setdefault((result["tokens_sha256"], precision), [])
            if not group and path != args.base_model:
                del model  # before the next one is loaded
                model, _ = generation.load_model(args.base_model, None, dtype)
                base = measure(model, tokenizer, rows, config, prompts, args.max_new_tokens, attention)
                new.append({"name": "base", "path": args.base_model, "precision": precision} | base)
        del model
        folder = Path(path).resolve()
        name = folder.parent.name if folder.name in ("adapter", "model") else path
        name = name if path != args.base_model else "base"
        new.append({"name": name, "path": path, "precision": precision} | result)
        if (record := read_record(Path(path).parent)).get("quantization"):
            new[-1]["loss_quantized"] = record["metrics"].get("eval_loss")
        group += new
        if "strftime_now" in str(tokenizer.chat_template):
            notes += [f"The chat template of {name} writes the date: it was trained with that of {run.get('started')}."]
        for each in new:
            print(f"{each['name']}: loss {each['loss']:.4f}, perplexity {each['perplexity']:.2f}", flush=True)

    models = [each for group in groups.values() for each in group]
    report = {"dataset": args.dataset_name, "prompts": prompts, "notes": notes, "models": models}
    write_text(args.output_dir / "evaluation.md", format_report(report))
    write_json(args.output_dir / "evaluation.json", report)
    print(f"The report is {args.output_dir / 'evaluation.md'}")


if __name__ == "__main__":
    main()
