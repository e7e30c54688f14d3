"""Run a training and write down how long its steps took.

    python timed.py OUT.json [--stop_at STEP] SCRIPT.py|MODULE [ARGUMENT ...]

The training itself is not changed: PyTorch calls back at the first forward pass of the training and after each step of
an optimizer. OUT.json: step_seconds (each optimizer step from the end of the one before it, so with what is done in
between), first_step_at (seconds from the start of the process to the first forward pass), peak_memory_bytes (tensors on
the accelerator, else the whole process), reserved_memory_bytes (what PyTorch's allocator took for them), shapes (rows
and tokens, padding too, of each forward pass of the training), losses (of each backward pass), packages (versions of
those that were used). --stop_at: the process gets a SIGTERM in that step of the optimizer.
"""

import atexit
import json
import os
import re
import runpy
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

OUT, stop_at = Path(sys.argv[1]), None
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "bitsandbytes", "llamafactory", "litgpt", "torchtune")
times, losses, shapes, first_step_at = [], [], [], None
backward = torch.Tensor.backward


def seconds_since_start() -> float:
    """Since this process began, which the system counts in ticks since the boot."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def note_time(*optimizer) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    times.append(time.perf_counter())
    if optimizer and len(times) - 1 == stop_at:
        os.kill(os.getpid(), signal.SIGTERM)


def note_shape(module, args, inputs) -> None:
    ids = inputs.get("input_ids", args[0] if args else None)
    if module.training and torch.is_grad_enabled() and torch.is_tensor(ids):
        shapes.append(list(ids.shape))


def before_forward(module, inputs) -> None:
    global first_step_at
    if not (module.training and torch.is_grad_enabled()):
        return
    if first_step_at is None:
        first_step_at = seconds_since_start()
        note_time()
        module.register_forward_pre_hook(note_shape, with_kwargs=True)  # from the next one on
    elif isinstance(module, torch.nn.Embedding):
        shapes.append(list(inputs[0].shape))
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
        "reserved_memory_bytes": torch.cuda.max_memory_reserved() if torch.cuda.is_available() else peak,
        "shapes": shapes,
        "losses": [loss.mean().item() for loss in losses],
        "packages": {name: version(name) for name in PACKAGES if name in sys.modules},
    }
    OUT.write_text(json.dumps(content))


hook = register_module_forward_pre_hook(before_forward)
register_optimizer_step_post_hook(note_time)
torch.Tensor.backward = keep_loss
atexit.register(write)
sys.argv = sys.argv[2:]
if sys.argv[0] == "--stop_at":
    stop_at, sys.argv = int(sys.argv[1]), sys.argv[2:]
target = sys.argv[0]
if target.endswith(".py"):
    sys.path[0] = str(Path(target).parent)
    runpy.run_path(target, run_name="__main__")
else:
    runpy.run_module(target, run_name="__main__", alter_sys=True)
