# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Compare the loss curve of finished runs with the curve that is on record for their recipe.

    python verify_run.py out/run.json --curves env/curves

Reads   run.json files as the training scripts write them, and the curves: JSON files, one for each recorded run.
Exits   with status 1 if a run leaves its curve by more than the tolerance recorded with it, was run with other
        arguments or data, or if there is a curve for none of the runs. A curve that is not binding is only shown.

    python verify_run.py out/run.json --record FILE --tolerance 0.002

writes the curve of a run to a file.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

# What a loss curve depends on, besides model and rows.
LORA_ARGUMENTS = "lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora load_in_4bit".split()
ARGUMENTS = """
    dtype max_length packing completion_only_loss assistant_only_loss eos_token
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps train_sampling_strategy
    optim learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm bf16 fp16 seed data_seed logging_steps
""".split()


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


def list_points(run: dict) -> list[list[float]]:
    """[epoch, mean loss since the point before] for each line of the log."""
    return [[entry["epoch"], entry["loss"]] for entry in run["history"] if "loss" in entry]


def choose_arguments(run: dict) -> dict:
    names = ARGUMENTS + (LORA_ARGUMENTS if run["arguments"]["use_peft"] else [])
    return {name: run["arguments"][name] for name in names}


def name_data(run: dict) -> str:
    return (run["dataset"].get("origin") or run["dataset"])["name"]


def record(run: dict, tolerance: float) -> dict:
    """The curve of a run, to compare others with."""
    return {
        "script": run["script"],
        "base_models": [run["base_model"]["name"]],
        "datasets": [name_data(run)],
        "binding": True,
        "tolerance": tolerance,
        "dataset_sha256": run["dataset"]["sha256"],
        "arguments": choose_arguments(run),
        "recorded_with": {"accelerator": run["accelerator"], **run["packages"]},
        "points": list_points(run),
    }


def belongs(curve: dict, run: dict) -> bool:
    """Whether a curve is of this script, base model and data set; a binding one of 4-bit weights where the run is."""
    return (
        curve["script"] == run["script"]
        and not (curve["binding"] and curve["arguments"].get("load_in_4bit", False) != run["arguments"]["load_in_4bit"])
        and run["base_model"]["name"] in curve["base_models"]
        and name_data(run) in curve["datasets"]
    )


def list_differences(curve: dict, run: dict) -> list[str]:
    """What was run otherwise than on record: rows and arguments."""
    found = {"dataset_sha256": run["dataset"]["sha256"], **run["arguments"]}
    recorded = {"dataset_sha256": curve["dataset_sha256"], **curve["arguments"]}
    return [f"{key} {found.get(key)} instead of {value}" for key, value in recorded.items() if found.get(key) != value]


def compare(curve: dict, run: dict) -> str | None:
    """Prints both curves; returns why the run does not pass, None if it does. A binding curve has the same epochs."""
    points, tolerance = list_points(run), curve["tolerance"]
    differences = list_differences(curve, run) if curve["binding"] else []
    if differences:
        return f"this is not the run on record: {'; '.join(differences)}"
    if not points:
        return "its log has no loss: it was shorter than --logging_steps"
    print(f"{'epoch':>8} {'recorded':>9} {'epoch':>8} {'this run':>9} {'off by':>9}")
    worst, left = 0.0, None
    for epoch, loss in curve["points"]:
        own_epoch, own_loss = min(points, key=lambda point: abs(point[0] - epoch))
        off = own_loss / loss - 1
        print(f"{epoch:8.3f} {loss:9.4f} {own_epoch:8.3f} {own_loss:9.4f} {100 * off:+8.4f}%")
        worst = max(worst, abs(off))
        if left is None and not abs(off) <= tolerance:  # a loss of NaN leaves it too
            left = f"it leaves the curve at epoch {epoch:.3f}: loss {own_loss:.4f}, on record {loss:.4f}"
    if not curve["binding"]:
        print(f"Not binding: {curve['note']}")
        return None
    if left:
        return f"{left} (tolerance {100 * tolerance:g} %)"
    print(f"pass: all {len(curve['points'])} points within {100 * worst:.4f} %, tolerance {100 * tolerance:g} %")
    return None


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
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN", help="run.json of a training run")
    parser.add_argument("--curves", type=Path, default=Path("env/curves"), help="folder of the curves")
    parser.add_argument("--record", type=Path, metavar="FILE", help="write the curve of the run to FILE")
    parser.add_argument(
        "--tolerance", type=float, default=0.002, help="with --record: how far off a loss may be (share)"
    )
    args = parser.parse_args()
    if not args.runs:
        fail("no run. Train first: make train-lora, make train-full")
    if args.record:
        write_json(args.record, record(read_run(args.runs[0]), args.tolerance))
        return
    curves = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(args.curves.glob("*.json"))]
    compared, problems = 0, []
    for file in args.runs:
        run = read_run(file)
        print(f"{file}: {run['base_model']['name']}, {name_data(run)}")
        mine = [curve for curve in curves if belongs(curve, run)]
        if not mine:
            print(f"no curve in {args.curves} is of this script, model and data")
        for curve in mine:
            compared += 1
            if problem := compare(curve, run):
                problems.append(f"{file}: {problem}")
    if problems:
        fail("\n".join(problems))
    if not compared:
        fail(f"nothing was compared. Curves are in {args.curves}; --record writes one.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
