"""Measure base and trained models on held-out rows, and let each answer the same prompts.

    python evaluate.py --base_model MODEL --models out/lora/adapter --dataset_name DATA --output_dir report

Reads   MODEL (hub id or folder), adapters or full models, and the validation rows of DATA. With rows of prompt and
        completion the loss is on the completions alone, as in training.
Writes  report/evaluation.md and report/evaluation.json: loss (nats per token), perplexity, greedy answers.
"""

import argparse
import math
import tempfile
from pathlib import Path

from figures import find_data, find_training
from folders import fail, make_parser, read_json, read_record, sha256, verify, write_json, write_text
from records import load_script


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
    add("--max_length", type=count, default=1024, help="rows are cut to that many tokens (default: 1024)")
    add("--max_new_tokens", type=count, default=96, help="the most tokens of an answer (default: 96)")
    add("--batch_size", type=count, default=8, help="rows in a batch (default: 8)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="type of the weights")
    add("--output_dir", type=Path, default=Path("report"), help="folder for evaluation.md and evaluation.json")
    return parser.parse_args()


if __name__ == "__main__":
    read_arguments()  # before the imports that take seconds: for --help, and for what is wrong in the options

training, generation = load_script("02_train_lora.py"), load_script("05_generate.py")

import torch
from audit_tokens import tokenize_rows
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl import SFTConfig


def list_sums(data: Path, split: str) -> dict[str, str]:
    """Sums of the rows of each split as they were noted when they were fetched; else of the file, or the folder."""
    if data.is_file():
        return {split: sha256(data)}
    if not (file := data / "run.json").is_file():
        return {"train": verify(data)} if data.is_dir() else {}
    return {name: part["sha256"] for name, part in read_json(file)["dataset"].items() if isinstance(part, dict)}


def check_training_rows(models: list[str], data: str, split: str) -> None:
    """Refuses a model trained on the held-out rows, or on others than those beside them: they may be among these."""
    sums = list_sums(Path(data), split)
    for model in models:
        run = find_training(read_record(Path(model).parent))
        trained_on = run and find_data(run)["train"]["sha256"]
        named = run and (run["dataset"]["name"], run["arguments"]["dataset_train_split"])
        if named == (data, split) or (trained_on and trained_on == sums.get(split)):
            fail(f"{model} was trained on these rows of {data}. Give rows that it has not seen.")
        if trained_on and Path(data).is_dir() and trained_on != sums.get("train", trained_on):
            fail(f"{model} was trained on other rows than those of {data}. Train again: make train-lora")


def choose_prompts(rows: Dataset, count: int = 5) -> list[dict]:
    """Questions of the first rows with the answers that stand there, or the tutorial's query for rows of text."""
    if not {"prompt", "messages"} & set(rows.column_names):
        return [{"prompt": "What is a large language model?", "reference": None}]
    chosen = []
    for row in rows.select(range(min(count, len(rows)))):
        if "messages" in row:
            number = next(i for i, message in enumerate(row["messages"]) if message["role"] == "user")
            question, *answer = (message["content"] for message in row["messages"][number : number + 2])
        elif isinstance(row["prompt"], str):
            question, answer = row["prompt"], [row["completion"]]
        else:
            question, answer = row["prompt"][-1]["content"], [row["completion"][-1]["content"]]
        chosen.append({"prompt": question, "reference": answer[0] if answer else None})
    return chosen


@torch.inference_mode()
def held_out_loss(model, rows: Dataset, collator, batch_size: int) -> tuple[float, int]:
    """Mean cross-entropy in nats over all labelled tokens of tokenized rows, and their number."""
    rows = rows.select_columns(["input_ids", "labels"])
    rows = rows.select(sorted(range(len(rows)), key=lambda number: len(rows[number]["input_ids"])))
    total, labelled = 0.0, 0
    for batch in DataLoader(rows, batch_size=batch_size, collate_fn=collator):
        number = (batch["labels"][:, 1:] != -100).sum().item()
        inputs = {key: value.to(model.device) if torch.is_tensor(value) else value for key, value in batch.items()}
        total, labelled = total + model(**inputs).loss.item() * number, labelled + number
    return total / labelled, labelled


def format_report(report: dict) -> str:
    """The report as Markdown: a table of losses, then each prompt with the answers."""
    base = report["models"][0]["loss"]
    lines = ["# Evaluation", "", f"{report['rows']} held-out rows of {report['dataset']}, "]
    lines[-1] += f"{report['tokens']} tokens with loss."
    lines += ["", "| model | loss | against base | perplexity |", "| --- | --- | --- | --- |"]
    for model in report["models"]:
        change = f"{100 * (model['loss'] / base - 1):+.1f} %"
        lines.append(f"| {model['name']} | {model['loss']:.4f} | {change} | {model['perplexity']:.2f} |")
    for model in report["models"]:
        if on_quantized := model.get("loss_quantized"):
            lines += ["", f"{model['name']} was trained on quantized weights, where its loss is {on_quantized:.4f}."]
            lines += ["Here it is measured on those of full precision."]
    for number, prompt in enumerate(report["prompts"]):
        lines += ["", f"## {prompt['prompt']}", ""]
        if prompt["reference"]:
            lines.append(f"- **the data set**: {prompt['reference']}")
        lines += [f"- **{model['name']}**: {' '.join(model['answers'][number].split())}" for model in report["models"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = read_arguments()
    data = Path(args.dataset_name)
    if args.dataset_test_split == "validation" and any(data.glob("train.*")) and not any(data.glob("validation.*")):
        fail(f"{data} has no validation rows. Hold some out: make train-lora VALIDATION_ROWS=50 DATASET=...")
    check_training_rows(args.models, args.dataset_name, args.dataset_test_split)
    tokenizer = AutoTokenizer.from_pretrained(args.base_model, trust_remote_code=False)
    split = "train" if data.is_file() else args.dataset_test_split  # a file is that alone
    rows = training.load_rows(args.dataset_name, split, tokenizer, "text")
    prompts = [{"prompt": prompt, "reference": None} for prompt in args.prompts] or choose_prompts(rows)
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(folder, max_length=args.max_length, use_cpu=True, bf16=False, report_to=[])
        trainer = tokenize_rows(rows, None, tokenizer, config)
    if len(trainer.train_dataset) == 0:
        fail(f"no row has a token with loss within --max_length {args.max_length}. Give a larger one.")

    models, model = [], None
    for path in [args.base_model, *args.models]:
        del model  # before the next one is loaded
        model, tokenizer = generation.load_model(path, args.base_model, args.dtype)
        loss, tokens = held_out_loss(model, trainer.train_dataset, trainer.data_collator, args.batch_size)
        texts, raw = [prompt["prompt"] for prompt in prompts], not tokenizer.chat_template
        greedy = {"max_new_tokens": args.max_new_tokens, "do_sample": False}
        answers = generation.generate(model, tokenizer, texts, raw, **greedy)
        folder = Path(path).resolve()
        name = "base" if not models else folder.parent.name if folder.name in ("adapter", "model") else path
        models.append({"name": name, "path": path, "loss": loss, "perplexity": math.exp(loss), "answers": answers})
        run = read_record(Path(path).parent)
        if run.get("quantization"):
            models[-1]["loss_quantized"] = run["metrics"].get("eval_loss")
        print(f"{name}: loss {loss:.4f}, perplexity {math.exp(loss):.2f}", flush=True)

    number = len(trainer.train_dataset)
    report = {"dataset": args.dataset_name, "rows": number, "tokens": tokens, "prompts": prompts, "models": models}
    write_text(args.output_dir / "evaluation.md", format_report(report))
    write_json(args.output_dir / "evaluation.json", report)
    print(f"The report is {args.output_dir / 'evaluation.md'}")


if __name__ == "__main__":
    main()
