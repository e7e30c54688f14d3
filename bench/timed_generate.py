"""Run a script that generates with transformers, and write down how long that took.

    python timed_generate.py OUT.json SCRIPT.py [ARGUMENT ...]

OUT.json: tokens (new ones, of all rows, each up to its EOS token), seconds (of generate), first_token_at (seconds from
the start of the process to the end of the first forward pass), token_seconds (from each forward pass to the next),
peak_memory_bytes.
"""

import json
import os
import re
import runpy
import sys
import time
from pathlib import Path

import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import GenerationMixin

OUT = Path(sys.argv[1])
found = {"tokens": 0, "seconds": 0.0, "first_token_at": None}
passes = []
generate = GenerationMixin.generate


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def note_pass(*forward) -> None:
    synchronize()
    passes.append(time.perf_counter())


def after_forward(module, inputs, outputs) -> None:
    if type(module).__name__.endswith("ForCausalLM"):
        note_pass()
        module.register_forward_hook(note_pass)
        # The start of a process is counted in ticks since the boot.
        ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        found["first_token_at"] = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
        hook.remove()


def timed(model, *args, **kwargs):
    begin = time.perf_counter()
    outputs = generate(model, *args, **kwargs)
    synchronize()
    found["seconds"] += time.perf_counter() - begin
    new = outputs[:, kwargs["input_ids"].shape[1] :]
    eos = model.generation_config.eos_token_id
    ends = torch.isin(new, torch.tensor(-1 if eos is None else eos, device=new.device))
    found["tokens"] += (ends.cumsum(1) - ends.long() == 0).sum().item()  # what follows the first EOS is padding
    return outputs


hook = register_module_forward_hook(after_forward)
GenerationMixin.generate = timed
sys.argv = sys.argv[2:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")
peak = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
found["peak_memory_bytes"] = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else peak
found["token_seconds"] = [end - begin for begin, end in zip(passes, passes[1:], strict=False)]
OUT.write_text(json.dumps(found))
