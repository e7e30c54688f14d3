"""Compare trainings: parameters, time, memory, loss and size, beside the figures that the tutorial prints.

    python compare_runs.py out/lora/run.json out/full/run.json --output_dir report

Reads   run.json files of trainings, and the sizes of the files beside them.
Writes  report/comparison.md and report/comparison.json.
"""

import json
from pathlib import Path

from figures import find_base, find_data, list_losses, measure
from folders import fail, make_parser, write_json, write_text
from records import name_runs, read_run

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


def summarize(file: Path, run: dict) -> dict:
    """The figures of a run under the names in ROWS; None for what it did not measure."""
    parameters, measured, losses = run["parameters"], measure(run), list_losses(run)
    results = [*file.parent.glob("adapter/*"), *file.parent.glob("model/*")]
    size = sum(path.stat().st_size for path in results if path.name != "README.md")  # the card may come later
    recipe = run["options"].get("config", "the script's defaults")
    return {
        "trainable parameters": parameters["trainable"],
        "all parameters": parameters["total"],
        "trainable share": 100 * parameters["trainable"] / parameters["total"],
        "runtime": measured["seconds"],
        "samples/s": measured["samples_per_second"],
        "real tokens/s": measured["tokens_per_second"],
        "peak memory": run["metrics"]["peak_memory_bytes"] / 2**30,
        "mean training loss": measured["loss"],
        "last training loss": losses[-1]["loss"] if losses else None,  # of the last --logging_steps
        "held-out loss": run["metrics"].get("eval_loss"),
        "size on disk": size / 1e6 or None,
        "base model": run["base_model"]["name"],
        "data": f"{find_data(run)['name']}, {run['dataset']['rows']} rows",
        "recipe": recipe.partition(".yaml")[0],  # without its sum
        "accelerator": run["accelerator"],
    }


def check_comparable(runs: dict[str, dict]) -> None:
    """Stops where the runs differ in what must be equal for a comparison to say something."""
    for what, key in {
        "base models": lambda run: [find_base(run).get(pin) for pin in ("name", "revision", "sha256")],
        "training rows": lambda run: find_data(run)["train"]["sha256"] or run["dataset"]["name"],
        "seeds": lambda run: run["arguments"]["seed"],
    }.items():
        values = {name: key(run) for name, run in runs.items()}
        if len(set(map(json.dumps, values.values()))) > 1:
            stated = "; ".join(f"{name}: {value}" for name, value in values.items())
            fail(f"different {what} ({stated}). Train again, or compare these runs all the same: --allow_different")


def format_table(columns: dict[str, dict]) -> str:
    """The columns side by side as Markdown, without the rows that none of them has."""
    lines = ["| | " + " | ".join(columns) + " |", "| --- |" + " --- |" * len(columns)]
    for row, form in ROWS.items():
        values = [column.get(row) for column in columns.values()]
        if any(value is not None for value in values):
            lines.append(f"| {row} | " + " | ".join("" if v is None else form.format(v) for v in values) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.json of a training")
    parser.add_argument("--output_dir", type=Path, default=Path("report"), help="folder for comparison.{md,json}")
    parser.add_argument("--allow_different", action="store_true", help="compare runs of different model, data or seed")
    args = parser.parse_args()
    if len({file.resolve() for file in args.runs}) < 2:
        fail("one run alone cannot be compared. Give two or more, for example: out/lora/run.json out/full/run.json")
    runs = {name: read_run(file) for name, file in zip(name_runs(args.runs), args.runs, strict=True)}
    if not args.allow_different:
        check_comparable(runs)
    measured = {name: summarize(file, run) for file, (name, run) in zip(args.runs, runs.items(), strict=True)}
    note = (
        "Measured columns first. Memory is what tensors took on the accelerator, or the process on a CPU. The last two "
        "columns are what AMD's tutorial prints, of Llama-2-7b-chat on an MI300X; its second log is not of a full "
        "fine-tuning: the LoRA layers were still in the model, and its weights frozen."
    )
    table = format_table(measured | TUTORIAL)
    write_text(args.output_dir / "comparison.md", f"# Comparison\n\n{table}\n{note}\n")
    write_json(args.output_dir / "comparison.json", {"measured": measured, "tutorial": TUTORIAL})
    print(f"The comparison is {args.output_dir / 'comparison.md'}")


if __name__ == "__main__":
    main()
