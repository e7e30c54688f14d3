# /// script
# requires-python = ">=3.10"
# dependencies = ["matplotlib==3.10.9"]
# ///
"""Draw the loss curves of one or several training runs.

    python plot_loss.py out/run.json --output loss.png

Reads   run.json files as the training scripts write them.
Writes  a picture; the end of --output names the format (.png, .svg, .pdf).
"""

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def read_history(file: Path) -> list[dict]:
    """The log entries of a run; each has a step, and most a loss."""
    try:
        history = json.loads(file.read_text(encoding="utf-8"))["history"]
    except FileNotFoundError:
        fail(f"no run at {file}. Train first, for example: make train-lora")
    except (ValueError, KeyError, TypeError):
        fail(f"{file} is not the run.json of a training run.")
    return history


def plot(histories: dict[str, list[dict]], output: Path) -> None:
    """One line of training loss a run, over optimizer steps."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, history in histories.items():
        # A run shorter than --logging_steps has only the mean of the whole.
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
        points = points or [(entry["step"], entry["train_loss"]) for entry in history if "train_loss" in entry]
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(xlabel="optimizer step", ylabel="loss (cross-entropy, nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.json of a training run")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write (default: loss.png)")
    args = parser.parse_args()
    plot({str(run.parent): read_history(run) for run in args.runs}, args.output)
    print(f"The picture is {args.output}")


if __name__ == "__main__":
    main()
