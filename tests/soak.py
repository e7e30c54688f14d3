"""Trains three steps, is stopped by a signal, goes on, and so on in one process; prints a JSON line after each cycle.

python soak.py CYCLES 02_train_lora.py --model_name_or_path ...
"""

import gc
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path

from datasets.config import HF_DATASETS_CACHE


def count_bytes(folder: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


cycles, path, *args = sys.argv[1:]
spec = importlib.util.spec_from_file_location("training", path)
module = sys.modules["training"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
training_step, steps = module.ResumableTrainer.training_step, 0


def count_step(self, *args, **kwargs):
    global steps
    steps += 1
    if steps % 3 == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return training_step(self, *args, **kwargs)


module.ResumableTrainer.training_step = count_step
sys.argv = [path, *args]
output, answers = Path(args[args.index("--output_dir") + 1]), sys.stdout
sys.stdout = sys.stderr
for _ in range(int(cycles)):
    try:
        module.main()
    except SystemExit as stop:
        assert stop.code == 128 + signal.SIGTERM, stop.code
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    logs = count_bytes(output, "events.*")
    figures = {
        "steps": steps,
        "memory (MiB)": int(status["VmRSS"].split()[0]) // 1024,
        "open files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": int(status["Threads"]),
        "output (kB)": (count_bytes(output) - logs) // 1000,
        "tensorboard logs (kB)": logs // 1000,
        "cache of datasets (kB)": count_bytes(Path(HF_DATASETS_CACHE)) // 1000,
    }
    print(json.dumps(figures), file=answers, flush=True)
