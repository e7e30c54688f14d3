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
import os
import re
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws into files, needs no screen
import matplotlib.pyplot as plt


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


def plot(runs: dict[str, dict], output: Path) -> None:
    """One line of training loss a run, over optimizer steps, and a cross for the held-out loss at its end."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, run in runs.items():
        history, held_out = run["history"], run["metrics"].get("eval_loss")
        # A run shorter than --logging_steps has only the mean of the whole.
        points = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run.json of a training run")
    parser.add_argument("--output", type=Path, default=Path("loss.png"), help="picture to write (default: loss.png)")
    args = parser.parse_args()
    plot({name: read_run(run) for name, run in zip(name_runs(args.runs), args.runs, strict=True)}, args.output)
    print(f"The picture is {args.output}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
