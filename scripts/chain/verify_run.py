"""Compare the loss curve of finished trainings with the curve that is on record for their recipe.

    python verify_run.py out/lora/run.json --curves env/curves
    python verify_run.py out/lora/run.json --record FILE --tolerance 0.002

Reads   run.json files of trainings, and the curves: JSON files, one for each recorded run.
Writes  with --record the curve of the first run.
Exits   with status 1 if a run leaves its curve by more than the tolerance recorded with it, was run with other
        arguments or data, or if there is a curve for none of the runs. A curve that is not binding is only shown.
"""

from pathlib import Path

from figures import find_data, list_losses
from folders import fail, make_parser, read_json, write_json
from records import read_run

# What a loss curve depends on, besides model and rows.
LORA_ARGUMENTS = "lora_r lora_alpha lora_dropout lora_target_modules use_rslora use_dora load_in_4bit".split()
ARGUMENTS = """
    dtype max_length packing completion_only_loss assistant_only_loss eos_token
    num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps train_sampling_strategy
    optim learning_rate lr_scheduler_type warmup_steps weight_decay max_grad_norm bf16 fp16 seed data_seed logging_steps
""".split()


def list_points(run: dict) -> list[list[float]]:
    """[epoch, mean loss since the point before] for each line of the log."""
    return [[entry["epoch"], entry["loss"]] for entry in list_losses(run)]


def record(run: dict, tolerance: float) -> dict:
    """The curve of a run, to compare others with."""
    names = ARGUMENTS + (LORA_ARGUMENTS if run["arguments"]["use_peft"] else [])
    data = find_data(run)
    return {
        "script": run["script"],
        "base_models": [run["base_model"]["name"]],
        "datasets": [data["name"]],
        "binding": True,
        "tolerance": tolerance,
        "dataset_sha256": data["train"]["sha256"],
        "arguments": {name: run["arguments"][name] for name in names},
        "recorded_with": {"accelerator": run["accelerator"], **run["packages"]},
        "points": list_points(run),
    }


def belongs(curve: dict, run: dict) -> bool:
    """Whether a curve is of this script, base model and data set; a binding one of 4-bit weights where the run is."""
    return (
        curve["script"] == run["script"]
        and not (curve["binding"] and curve["arguments"].get("load_in_4bit", False) != run["arguments"]["load_in_4bit"])
        and run["base_model"]["name"] in curve["base_models"]
        and find_data(run)["name"] in curve["datasets"]
    )


def list_differences(curve: dict, run: dict) -> list[str]:
    """What was run otherwise than on record: rows and arguments."""
    found = run["arguments"] | {"dataset_sha256": find_data(run)["train"]["sha256"]}
    recorded = curve["arguments"] | {"dataset_sha256": curve["dataset_sha256"]}
    return [f"{key} {found.get(key)} instead of {value}" for key, value in recorded.items() if found.get(key) != value]


def sum_up(points: list[list[float]]) -> dict[float, float]:
    """Sum of the losses up to each epoch."""
    sums, last = {0: 0.0}, 0
    for epoch, loss in points:
        sums[epoch] = sums[last] + (epoch - last) * loss
        last = epoch
    return sums


def pair_losses(curve: dict, points: list[list[float]]) -> list[tuple[float, float, float, float]]:
    """Epoch and loss on record, epoch and loss of the run: the nearest; for a binding curve the means between epochs
    that both have, as a checkpoint and an interruption add points.
    """
    if not curve["binding"]:
        return [(*point, *min(points, key=lambda own: abs(own[0] - point[0]))) for point in curve["points"]]
    recorded, found = sum_up(curve["points"]), sum_up(points)
    ends, pairs = [epoch for epoch in recorded if epoch in found], []
    for start, end in zip(ends, ends[1:], strict=False):
        loss, own = ((sums[end] - sums[start]) / (end - start) for sums in (recorded, found))
        pairs.append((end, loss, end, own))
    return pairs


def compare(curve: dict, run: dict) -> str | None:
    """Prints both curves; returns why the run does not pass, None if it does."""
    if curve["binding"] and (differences := list_differences(curve, run)):
        return f"this is not the run on record: {'; '.join(differences)}"
    points, tolerance = list_points(run), curve["tolerance"]
    pairs = points and pair_losses(curve, points)
    if not pairs:
        return "its log has no loss of the epochs on record: it was shorter than --logging_steps"
    print(f"{'epoch':>8} {'recorded':>9} {'epoch':>8} {'this run':>9} {'off by':>9}")
    worst, left = 0.0, None
    for epoch, loss, own_epoch, own in pairs:
        off = own / loss - 1
        print(f"{epoch:8.3f} {loss:9.4f} {own_epoch:8.3f} {own:9.4f} {100 * off:+8.4f}%")
        worst = max(worst, abs(off))
        if left is None and not abs(off) <= tolerance:  # a loss of NaN leaves it too
            left = f"it leaves the curve at epoch {epoch:.3f}: loss {own:.4f}, on record {loss:.4f}"
    if not curve["binding"]:
        print(f"Not binding: {curve['note']}")
        return None
    if left:
        return f"{left} (tolerance {100 * tolerance:g} %)"
    print(f"pass: all {len(pairs)} points within {100 * worst:.4f} %, tolerance {100 * tolerance:g} %")
    return None


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("runs", nargs="*", type=Path, metavar="RUN", help="run.json of a training")
    add("--curves", type=Path, default=Path("env/curves"), help="folder of the curves")
    add("--record", type=Path, metavar="FILE", help="write the curve of the run to FILE")
    add("--tolerance", type=float, default=0.002, help="with --record: how far off a loss may be (share)")
    args = parser.parse_args()
    if not args.runs:
        fail("no run. Train first: make train-lora, make train-full")
    if args.record:
        write_json(args.record, record(read_run(args.runs[0]), args.tolerance))
        return
    curves = [read_json(file) for file in sorted(args.curves.glob("*.json"))]
    compared, problems = 0, []
    for file in args.runs:
        run = read_run(file)
        print(f"{file}: {run['base_model']['name']}, {find_data(run)['name']}")
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
    main()
