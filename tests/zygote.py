"""A process that has imported what the scripts import, and runs each in a fork of its own: seconds less for each.

Reads JSON lines: {"argv", "cwd", "out", "err"}, answered with its number; {"wait": number}, answered with its exit
status, below zero the signal that ended it. An order may have faults: "file_size", the most bytes that a file may take;
"signal": [number, pattern], a signal that the script gets just before each change of a file that the pattern matches:
"open PATH" (for writing), "os.mkdir PATH", "os.rename PATH", "os.remove PATH", "shutil.rmtree PATH".
"""

import gc
import json
import os
import re
import resource
import runpy
import signal
import sys
from pathlib import Path

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer  # noqa: F401
from trl import SFTTrainer, TrlParser  # noqa: F401


def inject(file_size: int | None, at: tuple[int, str] | None) -> None:
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    def hook(event, args):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree") or (event == "open" and args[2] & 3)
        if changes and re.search(at[1], f"{event} {args[0]}"):
            os.kill(os.getpid(), at[0])

    if at:
        sys.addaudithook(hook)


gc.freeze()  # else the first collection in each fork would copy nearly all of the memory
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell lets it be ignored
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        answer = os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1])
    elif answer := os.fork():
        pass
    else:
        for number, file, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, order["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
            (2, order["err"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC),
        ):
            os.dup2(os.open(file, flags, 0o600), number)
        os.chdir(order["cwd"])
        sys.stdout, sys.argv = answers, order["argv"]
        sys.path[0] = str(Path(order["argv"][0]).parent)
        inject(order["file_size"], order["signal"])
        runpy.run_path(order["argv"][0], run_name="__main__")
        sys.exit()
    print(answer, file=answers, flush=True)
