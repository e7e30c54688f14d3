"""Figures of a training and its sources, out of its run.json.

The library's own metrics there are those of the last process; the log is of the whole of an interrupted training.
"""

from pathlib import Path


def find_training(run: dict) -> dict | None:
    """The record of a training itself, or, in that of a merge, the record of the training that was merged."""
    records = [run, *(each["record"] for each in run.get("inputs", {}).values())]
    return next((record for record in records if "parameters" in record), None)


def find_input(run: dict, name: str) -> dict:
    """Sum and record of the folder or file that the script was given by that name."""
    return run.get("inputs", {}).get(Path(name).name, {"sha256": None, "record": {}})


def find_base(run: dict) -> dict:
    """Name of the base model, and its revision or a sum."""
    base = run["base_model"]
    known = base.keys() & {"revision", "sha256"}
    return base if known else base | {"sha256": find_input(run, run["arguments"]["model_name_or_path"])["sha256"]}


def find_data(run: dict) -> dict:
    """Origin of the rows as it was noted when they were fetched, or their place; "train" has their sum."""
    name = run["dataset"]["name"]
    given = find_input(run, name)
    return given["record"].get("dataset") or {"name": name, "train": {"sha256": given["sha256"]}}


def list_losses(run: dict) -> list[dict]:
    """The entries of the log that have a training loss: its mean since the entry before."""
    return [entry for entry in run.get("history", []) if "loss" in entry]


def list_spans(run: dict) -> dict[tuple[int, int], float]:
    """Mean loss from step to step, as logged. An interruption adds a log, so that what follows it is of fewer steps."""
    logged = list_losses(run)
    steps = [0, *(entry["step"] for entry in logged)]
    return {(start, entry["step"]): entry["loss"] for start, entry in zip(steps, logged, strict=False)}


def measure(run: dict) -> dict:
    """Seconds, tokens without padding and rows a second, epochs and mean loss of all steps."""
    metrics = run["metrics"]
    summary = next((entry for entry in reversed(run.get("history", [])) if "train_loss" in entry), metrics)
    seconds = summary.get("seconds", metrics["train_runtime"])
    spans, loss = list_spans(run), metrics["train_loss"]
    if spans and (last := max(end for _, end in spans)) == summary["step"]:
        loss = sum((end - start) * value for (start, end), value in spans.items()) / last
    return {
        "seconds": seconds,
        "tokens_per_second": summary["num_input_tokens_seen"] / seconds,
        "samples_per_second": run["dataset"]["rows"] * summary["epoch"] / seconds,
        "epochs": summary["epoch"],
        "loss": loss,
    }
