"""Draw the loss curves of one or several trainings, and say where a loss did not fall.

    python plot_loss.py out/lora/run.json --output loss.png

Reads   run.json files of trainings.
Writes  a picture; the end of --output names the format (.png, .svg, .pdf).
"""

import sys
from pathlib import Path

from figures import list_losses
from folders import make_parser
from matplotlib.figure import Figure
from records import name_runs, read_run


def warn(name: str, losses: list[float]) -> None:
    """Says where the mean of the last quarter of the log is not below that of the first."""
    count = len(losses) // 4 + 1
    first, last = sum(losses[:count]) / count, sum(losses[-count:]) / count
    if len(losses) > 1 and last >= first:
        advice = "Try another --learning_rate, and look at the rows: make audit"
        text = f"the loss did not fall: {first:.4f} first, {last:.4f} last ({name}). {advice}"
        print(f"warning: {text}", file=sys.stderr)


def plot(runs: dict[str, dict], output: Path) -> None:
    """One line of training loss a run, over optimizer steps, and a cross for the held-out loss at its end."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        history, held_out = run["history"], run["metrics"].get("eval_loss")
        # A run shorter than --logging_steps has only the mean of the whole.
        points = [(entry["step"], entry["loss"]) for entry in list_losses(run)]
        points = points or [(entry["step"], entry["train_loss"]) for entry in history if "train_loss" in entry]
        (line,) = axes.plot(*zip(*points, strict=True), marker=".", label=name)
        if held_out:
            axes.plot(history[-1]["step"], held_out, "x", color=line.get_color(), label=f"{name}, held-out rows")
    axes.set(xlabel="optimizer step", ylabel="loss (cross-entropy, nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_suffix(f".tmp{output.suffix}")
    figure.savefig(temporary, dpi=150)
    temporary.replace(output)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.json of a training")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write (default: loss.png)")
    args = parser.parse_args()
    runs = {name: read_run(file) for name, file in zip(name_runs(args.runs), args.runs, strict=True)}
    for name, run in runs.items():
        warn(name, [entry["loss"] for entry in list_losses(run)])
    plot(runs, args.output)
    print(f"The picture is {args.output}")


if __name__ == "__main__":
    main()
