"""Measure how time and memory grow with the rows (x 10) and with their length (x 8), in one run, and plot it.

    make bench-growth

Each point is a run of 02_train_lora.py over rows that are all cut at one length. What comes before the training is
measured over ten times as many rows again: audit_tokens.py, and the training script to its first forward pass (imports,
model, rows, tokens) with an empty cache, with an empty cache and a process for each core, and with the tokens in the
cache. Writes growth.json, growth.md and growth.png to --output_dir.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import check_model, describe_machine, format_machine, name_model

BENCH = Path(__file__).resolve().parent
SCRIPTS = BENCH.parent / "scripts"
TRAINED = ("rows", "length", "tokens", "train, s", "tokens/s", "peak memory, GiB")
PREPARED = ("rows", "length", "tokens", "audit, s", "prepare, s", "in parallel, s", "from the cache, s")


def run(command: list, cache: Path) -> float:
    """Seconds that a command took; it stops everything where it fails. cache: of tokenized rows."""
    begin = time.perf_counter()
    environment = os.environ | {"HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, *map(str, command)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cache.parent)
    if result.returncode:
        sys.exit(f"error: {' '.join(command)} failed: {result.stderr[-1000:]}")
    return time.perf_counter() - begin


def write_rows(texts: list[str], count: int, folder: Path) -> Path:
    """A file of so many rows, the texts in turn, each with a number of its own."""
    rows = folder / "rows.jsonl"
    lines = (json.dumps({"text": f"{number} {text}"}) for number, text in zip(range(count), itertools.cycle(texts)))
    rows.write_text("\n".join(lines) + "\n")
    return rows


def train(data: list, folder: Path, *options: str, cache: str = "cache") -> dict:
    """What timed.py measures of 02_train_lora.py."""
    out, script = folder / "out.json", SCRIPTS / "02_train_lora.py"
    options = ["--optim", "adamw_torch_fused", "--save_strategy", "no", "--restart", "true", *options]
    run([BENCH / "timed.py", out, script, *data, "--output_dir", folder / "run", *options], folder / cache)
    return json.loads(out.read_text())


def measure_training(data: list, folder: Path) -> dict:
    timed = train(data, folder)
    return {"train": sum(timed["step_seconds"]), "peak_memory_bytes": timed["peak_memory_bytes"]}


def measure_preparation(data: list, folder: Path) -> dict:
    """Seconds."""
    once, processes = ("--max_steps", "1"), ("--dataset_num_proc", str(os.cpu_count()))
    return {
        "audit": run([SCRIPTS / "chain/audit_tokens.py", *data, "--output", folder / "audit.json"], folder / "other"),
        "prepare": train(data, folder, *once)["first_step_at"],
        "in parallel": train(data, folder, *once, *processes, cache="third")["first_step_at"],
        "from the cache": train(data, folder, *once)["first_step_at"],
    }


def draw(series: dict[str, list[dict]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for axis, (name, points) in zip(axes, series.items(), strict=True):
        by = "length" if name == "length" else "rows"
        values = [point[by] for point in points]
        for part in ("audit", "prepare", "in parallel", "from the cache", "train"):
            if part in points[0]:
                axis.plot(values, [point[part] for point in points], marker="o", label=f"{part}, s")
        if "peak_memory_bytes" in points[0]:
            memory = [point["peak_memory_bytes"] / 2**30 for point in points]
            axis.plot(values, memory, marker="s", linestyle="--", color="gray", label="peak memory, GiB")
        axis.set(xscale="log", yscale="log", xlabel=by)
        axis.set_xticks(values, labels=values)
        axis.minorticks_off()
        axis.legend()
    figure.savefig(file, dpi=120)


def write_table(points: list[dict], columns: tuple) -> str:
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for point in points:
        cells = {name: str(point[name]) for name in ("rows", "length", "tokens")}
        cells |= {f"{name}, s": f"{value:.2f}" for name, value in point.items() if isinstance(value, float)}
        if "train" in point:
            cells["tokens/s"] = f"{point['tokens'] / point['train']:.0f}"
            cells["peak memory, GiB"] = f"{point['peak_memory_bytes'] / 2**30:.2f}"
        lines.append(f"| {' | '.join(cells[column] for column in columns)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("outputs/base-model"), help="model folder (default: outputs/base-model)")
    add("--data", type=Path, default=Path("data/train.jsonl"), help="rows in chat form (default: data/train.jsonl)")
    add("--rows", type=int, nargs="+", default=[20, 60, 200], help="trained on, of the first of --lengths")
    add("--lengths", type=int, nargs="+", default=[64, 128, 256, 512], help="of each row, of the first of --rows")
    add("--prepared_rows", type=int, nargs="+", default=[200, 2000, 20000], help="of the last of --lengths")
    add("--output_dir", type=Path, default=Path("outputs/bench"), help="folder of the results")
    args = parser.parse_args()
    check_model(args.model, "bench-growth")
    if min(*args.rows, *args.lengths, *args.prepared_rows) < 1:
        sys.exit("error: --rows, --lengths and --prepared_rows are at least 1 each.")
    try:
        rows = map(json.loads, args.data.read_text(encoding="utf-8").splitlines())
        turns = [turn["content"] for row in rows for turn in row["prompt"] + row["completion"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"error: {args.data} has no rows in chat form: {error!r}. Give others: --data data/train.jsonl")
    parts = itertools.cycle(turns)
    # Parts are joined, so that each text is longer than the longest cut: a token has at most 8 characters on average.
    texts = []
    while len(texts) < 200:
        joined = ""
        while len(joined) < 8 * max(args.lengths):
            joined += next(parts) + "\n"
        texts.append(joined)
    series = {
        "rows": [(count, args.lengths[0], measure_training) for count in args.rows],
        "length": [(args.rows[0], length, measure_training) for length in args.lengths],
        "preparation": [(count, args.lengths[-1], measure_preparation) for count in args.prepared_rows],
    }
    for name, points in series.items():
        for index, (count, length, measure) in enumerate(points):
            with tempfile.TemporaryDirectory() as place:
                folder = Path(place)
                data = ["--model_name_or_path", args.model.resolve(), "--max_length", length]
                found = measure([*data, "--dataset_name", write_rows(texts, count, folder)], folder)
            points[index] = {"rows": count, "length": length, "tokens": count * length, **found}
            print(name, points[index], flush=True)
    machine = describe_machine(name_model(args.model))
    text = f"{format_machine(machine)}\n\n{write_table(series['rows'] + series['length'], TRAINED)}\n"
    text += write_table(series["preparation"], PREPARED)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "growth.md").write_text(text)
    (args.output_dir / "growth.json").write_text(json.dumps({"machine": machine} | series, indent=1) + "\n")
    draw(series, args.output_dir / "growth.png")
    print(text, end="")


if __name__ == "__main__":
    main()
