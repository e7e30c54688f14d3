"""Trains three steps, is stopped by a signal, goes on, and so on in one process; prints a JSON line after each cycle.

python soak.py CYCLES FOLDER --reads MODEL DATA -- 02_train_lora.py ..., as run_step.py takes it
"""

import gc
import json
import os
import signal
import sys
from pathlib import Path

from datasets.config import HF_DATASETS_CACHE
from transformers.trainer_callback import CallbackHandler

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts/chain"))
import run_step

begin, steps = CallbackHandler.on_step_begin, 0


def count_bytes(folder: Path, pattern: str = "*") -> int:
    return sum(file.stat().st_size for file in folder.rglob(pattern) if file.is_file())


def count_step(self, *args):
    global steps
    steps += 1
    if steps % 3 == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    return begin(self, *args)


CallbackHandler.on_step_begin = count_step
cycles, command = int(sys.argv[1]), sys.argv[2:]
output, answers = Path(f"{command[0]}.part"), sys.stdout
sys.stdout = sys.stderr
for _ in range(cycles):
    sys.argv = ["run_step.py", *command]
    try:
        run_step.main()
    except SystemExit as stop:
        assert stop.code == 128 + signal.SIGTERM, stop.code
    gc.collect()
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    logs, losses = (count_bytes(output, name) for name in ("events.*", "trainer_state.json"))  # each part adds a line
    figures = {
        "steps": steps,
        "memory (MiB)": int(status["VmRSS"].split()[0]) // 1024,
        "open files": len(os.listdir("/proc/self/fd")),  # noqa: PTH208
        "threads": int(status["Threads"]),
        "output without logs (kB)": (count_bytes(output) - logs - losses) // 1000,
        "losses (kB)": losses // 1000,
        "tensorboard logs (kB)": logs // 1000,
        "cache of datasets (kB)": count_bytes(Path(HF_DATASETS_CACHE)) // 1000,
    }
    print(json.dumps(figures), file=answers, flush=True)
