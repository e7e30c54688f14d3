"""Measure how time and memory grow with the rows (x 10) and with their length (x 8), in one run, and plot it.

    make bench-growth

Each point is a run of 02_train_lora.py over rows that are all cut at one length, and of audit_tokens.py over the same
rows. prepare: to the first forward pass (imports, model, rows, tokens), again: the same with the tokens in the cache.
Writes growth.json, growth.md and growth.png to --output_dir.
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

BENCH = Path(__file__).resolve().parent
SCRIPTS = BENCH.parent / "scripts"


def measure(model: Path, texts: list[str], length: int, folder: Path) -> dict:
    """Times in seconds and peak memory in bytes; folder is empty."""
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    data = ["--model_name_or_path", model, "--dataset_name", rows, "--max_length", length]
    train = [
        BENCH / "timed.py",
        folder / "out.json",
        SCRIPTS / "02_train_lora.py",
        *data,
        "--output_dir",
        folder / "run",
    ]
    train += ["--optim", "adamw_torch_fused", "--save_strategy", "no", "--restart", "true"]
    audit = [SCRIPTS / "audit_tokens.py", *data, "--output", folder / "audit.json"]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
    found = {"rows": len(texts), "length": length, "tokens": len(texts) * length}
    for name, command in (("audit", audit), ("train", train), ("again", [*train, "--max_steps", "1"])):
        begin = time.perf_counter()
        result = subprocess.run(
            [sys.executable, *map(str, command)], capture_output=True, text=True, env=environment, cwd=folder
        )
        if result.returncode:
            sys.exit(f"error: {' '.join(map(str, command))} failed: {result.stderr[-1000:]}")
        if name == "audit":
            found["audit"] = time.perf_counter() - begin
            continue
        timed = json.loads((folder / "out.json").read_text())
        if name == "again":
            found["again"] = timed["first_step_at"]
        else:
            found |= {"prepare": timed["first_step_at"], "train": sum(timed["step_seconds"])}
            found["peak_memory_bytes"] = timed["peak_memory_bytes"]
    return found


def draw(series: dict[str, list[dict]], file: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, (by, points) in zip(axes, series.items(), strict=True):
        values = [point[by] for point in points]
        for part in ("audit", "prepare", "train"):
            axis.plot(values, [point[part] for point in points], marker="o", label=f"{part}, s")
        memory = [point["peak_memory_bytes"] / 2**30 for point in points]
        axis.plot(values, memory, marker="s", linestyle="--", color="gray", label="peak memory, GiB")
        axis.set(xscale="log", yscale="log", xlabel=by)
        axis.set_xticks(values, labels=values)
        axis.minorticks_off()
    axes[0].legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("outputs/base-model"), help="model folder (default: outputs/base-model)")
    add("--data", type=Path, default=Path("data/train.jsonl"), help="rows in chat form (default: data/train.jsonl)")
    add("--rows", type=int, nargs="+", default=[20, 60, 200], help="rows, of the first of --lengths")
    add(
        "--lengths", type=int, nargs="+", default=[64, 128, 256, 512], help="tokens of each row, of the first of --rows"
    )
    add("--output_dir", type=Path, default=Path("outputs/bench"), help="folder of the results")
    args = parser.parse_args()
    lines = args.data.read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    texts = itertools.cycle([turn["content"] for row in rows for turn in row["prompt"] + row["completion"]])
    # Several texts in a row, so that each is longer than the longest cut; a token is at most 8 characters on average.
    size, parts = 8 * max(args.lengths), []
    while len(parts) < max(args.rows):
        joined = ""
        while len(joined) < size:
            joined += next(texts) + "\n"
        parts.append(joined)
    series = {"rows": [(rows, args.lengths[0]) for rows in args.rows]}
    series |= {"length": [(args.rows[0], length) for length in args.lengths]}
    for by, points in series.items():
        for index, (rows, length) in enumerate(points):
            with tempfile.TemporaryDirectory() as folder:
                points[index] = measure(args.model.resolve(), parts[:rows], length, Path(folder))
            print(by, points[index], flush=True)
    columns = (
        "rows",
        "length",
        "tokens",
        "audit, s",
        "prepare, s",
        "again, s",
        "train, s",
        "tokens/s",
        "peak memory, GiB",
    )
    lines = [f"| {' | '.join(columns)} |", "| --- " * len(columns) + "|"]
    for point in (point for points in series.values() for point in points):
        times = [f"{point[part]:.2f}" for part in ("audit", "prepare", "again", "train")]
        last = [f"{point['tokens'] / point['train']:.0f}", f"{point['peak_memory_bytes'] / 2**30:.2f}"]
        lines.append(f"| {point['rows']} | {point['length']} | {point['tokens']} | {' | '.join(times + last)} |")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    (args.output_dir / "growth.md").write_text("\n".join(lines) + "\n")
    (args.output_dir / "growth.json").write_text(json.dumps(series, indent=1) + "\n")
    draw(series, args.output_dir / "growth.png")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
