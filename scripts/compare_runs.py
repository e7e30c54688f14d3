# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Compare training runs: parameters, time, memory, loss and size, beside the figures that the tutorial prints.

    python compare_runs.py out/lora/run.json out/full/run.json --output_dir report

Reads   run.json files as the training scripts write them, and nothing else.
Writes  report/comparison.md and report/comparison.json.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

# What AMD's tutorial prints, of an MI300X: Llama-2-7b-chat, guanaco-llama2-1k, 125 steps of 8 rows. Its "full" training
# went on with the LoRA model: the losses are within 2 % of those above, and the frozen weights stayed frozen.
TUTORIAL = {
    "the tutorial's LoRA log": {
        "trainable parameters": 33_554_432,
        "all parameters": 6_771_970_048,
        "trainable share": 0.49548996469513035,
        "runtime": 197.4947,
        "samples/s": 5.063,
        "mean training loss": 1.6194254455566406,
        "last training loss": 1.417,
    },
    'the tutorial\'s "full" log': {
        "trainable parameters": 6_738_415_616,
        "all parameters": 6_738_415_616,
        "trainable share": 100.0,
        "runtime": 419.5154,
        "samples/s": 2.384,
        "mean training loss": 1.6171623611450194,
        "last training loss": 1.4119,
    },
}
# Each row with its form: counts, seconds, bytes or names.
ROWS = {
    "trainable parameters": "{:,}",
    "all parameters": "{:,}",
    "trainable share": "{:.4f} %",
    "runtime": "{:.1f} s",
    "samples/s": "{:.3f}",
    "real tokens/s": "{:.1f}",
    "memory of the weights": "{:.2f} GiB",
    "peak memory": "{:.2f} GiB",
    "mean training loss": "{:.4f}",
    "last training loss": "{:.4f}",
    "held-out loss": "{:.4f}",
    "size on disk": "{:,.1f} MB",
    "base model": "{}",
    "data": "{}",
    "recipe": "{}",
    "accelerator": "{}",
}


def fail(message: str) -> None:
    """Ends with an error; a token in it is not shown: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    sys.exit("error: " + re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", message.replace(token, "<HF_TOKEN>")))


def read_run(file: Path) -> dict:
    """run.json of a training run."""
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        fail(f"no run at {file}. Train first: make train-lora, make train-full")
    except ValueError:
        fail(f"{file} is not JSON. Train again.")
    if not (isinstance(run, dict) and run.keys() >= {"base_model", "dataset", "arguments", "metrics", "history"}):
        fail(f"{file} is not of a training run. Give the run.json of one.")
    return run


def name_runs(files: list[Path]) -> list[str]:
    """A short name for each run: its folder's, or the whole path where two folders have one name."""
    names = [file.resolve().parent.name for file in files]
    return names if len(set(names)) == len(names) else [str(file) for file in files]


def summarize(run: dict) -> dict:
    """The figures of a run under the names in ROWS; None for what it did not measure."""
    metrics, parameters = run["metrics"], run["parameters"]
    losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
    base, data = run["base_model"], run["dataset"]
    origin = data.get("origin") or data
    return {
        "trainable parameters": parameters["trainable"],
        "all parameters": parameters["total"],
        "trainable share": parameters["trainable_percent"],
        "runtime": metrics["train_runtime"],
        "samples/s": metrics["train_samples_per_second"],
        "real tokens/s": metrics["tokens_per_second"],
        "memory of the weights": metrics["weights_bytes"] / 2**30 if "weights_bytes" in metrics else None,
        "peak memory": metrics["peak_memory_bytes"] / 2**30,
        "mean training loss": metrics["train_loss"],
        "last training loss": losses[-1] if losses else None,  # of the last --logging_steps
        "held-out loss": metrics.get("eval_loss"),
        "size on disk": metrics["size_bytes"] / 1e6 if "size_bytes" in metrics else None,
        "base model": base["name"],
        "data": f"{origin['name']}, {data['rows']} rows",
        "recipe": Path(run["recipe"]).stem if run.get("recipe") else "the script's defaults",
        "accelerator": run["accelerator"],
    }


def check_comparable(runs: dict[str, dict]) -> None:
    """Stops where the runs differ in what must be equal for a comparison to say something."""
    for what, key in {
        "base models": lambda run: [run["base_model"].get(pin) for pin in ("name", "revision", "sha256")],
        "training rows": lambda run: run["dataset"]["sha256"],
        "seeds": lambda run: run["arguments"]["seed"],
    }.items():
        values = {name: key(run) for name, run in runs.items()}
        if len({json.dumps(value, sort_keys=True) for value in values.values()}) > 1:
            stated = "; ".join(f"{name}: {value}" for name, value in values.items())
            fail(
                f"these runs have different {what} ({stated}). Train again, or compare all the same: --allow_different"
            )


def format_table(columns: dict[str, dict]) -> str:
    """The columns side by side as Markdown, without the rows that none of them has."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row, form in ROWS.items():
        values = [column.get(row) for column in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"| {row} | " + " | ".join("" if v is None else form.format(v) for v in values) + " |")
    return "\n".join(lines) + "\n"


def write_text(file: Path, text: str) -> None:
    """Writes the file whole or not at all, and sees that it is on the disk."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def write_json(file: Path, content: dict) -> None:
    write_text(file, json.dumps(content, indent=2, default=str) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.json of a training run")
    parser.add_argument("--output_dir", type=Path, default=Path("report"), help="folder for comparison.{md,json}")
    parser.add_argument("--allow_different", action="store_true", help="compare runs of different model, data or seed")
    args = parser.parse_args()
    if len({file.resolve() for file in args.runs}) < 2:
        fail("one run alone cannot be compared. Give two or more, for example: out/lora/run.json out/full/run.json")
    runs = {name: read_run(file) for name, file in zip(name_runs(args.runs), args.runs, strict=True)}
    if not args.allow_different:
        check_comparable(runs)
    measured = {name: summarize(run) for name, run in runs.items()}

    text = (
        "# Comparison\n\n"
        + format_table(measured | TUTORIAL)
        + "\nMeasured columns first. Memory is what tensors took on the accelerator, or the process on a CPU. The "
        "last two columns are what AMD's tutorial prints, of Llama-2-7b-chat on an MI300X; its second log is not of a "
        "full fine-tuning: the LoRA layers were still in the model, and its weights frozen.\n"
    )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_text(args.output_dir / "comparison.md", text)
    report = {"measured": measured, "tutorial": TUTORIAL}
    write_json(args.output_dir / "comparison.json", report)
    print(f"The comparison is {args.output_dir / 'comparison.md'}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
