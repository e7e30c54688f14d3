"""Run a training and write down how long its steps took.

    python timed.py OUT.json SCRIPT.py|MODULE [ARGUMENT ...]

The training itself is not changed: PyTorch calls back at the first forward pass of the training and after each step of
an optimizer. OUT.json: step_seconds (each optimizer step from the end of the one before it, so with what is done in
between), first_step_at (seconds from the start of the process to the first forward pass), peak_memory_bytes (tensors on
the accelerator, else the whole process), losses (of each backward pass), packages (versions of those that were used).
"""

import atexit
import json
import os
import re
import runpy
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

OUT = Path(sys.argv[1])
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "llamafactory", "litgpt", "torchtune")
times, losses, first_step_at = [], [], None
backward = torch.Tensor.backward


def seconds_since_start() -> float:
    """Since this process began, which the system counts in ticks since the boot."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def note_time() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times.append(time.perf_counter())


def before_forward(module, inputs) -> None:
    global first_step_at
    if module.training and torch.is_grad_enabled():
        first_step_at = seconds_since_start()
        note_time()
        hook.remove()


def keep_loss(loss, *args, **kwargs):
    losses.append(loss.detach().clone())
    return backward(loss, *args, **kwargs)


def write() -> None:
    peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    content = {
        "step_seconds": [end - begin for begin, end in zip(times, times[1:], strict=False)],
        "first_step_at": first_step_at,
        "peak_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak,
        "losses": [loss.mean().item() for loss in losses],
        "packages": {name: version(name) for name in PACKAGES if name in sys.modules},
    }
    OUT.write_text(json.dumps(content))


hook = register_module_forward_pre_hook(before_forward)
register_optimizer_step_post_hook(lambda *args: note_time())
torch.Tensor.backward = keep_loss
atexit.register(write)
target, sys.argv = sys.argv[2], sys.argv[2:]
if target.endswith(".py"):
    sys.path[0] = str(Path(target).parent)
    runpy.run_path(target, run_name="__main__")
else:
    runpy.run_module(target, run_name="__main__", alter_sys=True)
