"""A process that has imported what the scripts import, and runs each in a fork of its own: seconds less for each.

Reads JSON lines: {"argv", "cwd", "out", "err"}, answered with its number; {"wait": number}, answered with its exit
status, below zero the signal that ended it. An order may have faults: "file_size", the most bytes that a file may take;
"signal": [number, pattern], a signal that the script gets just before each change of a file that the pattern matches:
"open PATH" (for writing), "os.mkdir PATH", "os.rename PATH", "os.remove PATH", "shutil.rmtree PATH"; "step": [number,
step], a signal that a training gets in the middle of that step, when the checkpoint before it is sealed; "code", Python
to run before the script.
"""

import atexit
import gc
import json
import os
import re
import resource
import runpy
import signal
import sys
import threading
from pathlib import Path

import bitsandbytes  # noqa: F401
import datasets  # noqa: F401
import matplotlib.pyplot  # noqa: F401
import peft  # noqa: F401
import tensorboard.summary  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, Trainer  # noqa: F401
from transformers.trainer_callback import CallbackHandler
from trl import SFTTrainer, TrlParser  # noqa: F401


class Finders(list):
    """sys.meta_path, where what waits for the import of transformers' Trainer finds it at once."""

    def insert(self, place, finder):
        super().insert(place, finder)
        module = sys.modules["transformers.trainer"]
        del module.DEFAULT_CALLBACKS[1:]  # what was added for a run before
        module.__spec__.loader.exec_module = lambda module: None  # it was executed
        if spec := finder.find_spec(module.__name__):
            spec.loader.exec_module(module)


def signal_at(number: int, step: int) -> None:
    begin = CallbackHandler.on_step_begin

    def on_step_begin(self, args, state, control):
        if state.global_step + 1 == step:
            for callback in self.callbacks:
                getattr(callback, "wait", int)()  # for the seal of the checkpoint before
            os.kill(os.getpid(), number)
        return begin(self, args, state, control)

    CallbackHandler.on_step_begin = on_step_begin


def inject(file_size=None, signal=None, step=None, code=None) -> None:
    if file_size:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))

    def hook(event, args):
        changes = event in ("os.mkdir", "os.rename", "os.remove", "shutil.rmtree") or (event == "open" and args[2] & 3)
        if changes and re.search(signal[1], f"{event} {args[0]}"):
            os.kill(os.getpid(), signal[0])

    if signal:
        sys.addaudithook(hook)
    if step:
        signal_at(*step)
    if code:
        exec(code, {})


def leave(status: int) -> None:
    """Ends a fork as Python does, but for taking the libraries down, which takes as long as a short script."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


gc.freeze()  # else the first collection in each fork would copy nearly all of the memory
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell lets it be ignored
sys.meta_path = Finders(sys.meta_path)
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
        inject(*(order.get(name) for name in ("file_size", "signal", "step", "code")))
        try:
            runpy.run_path(order["argv"][0], run_name="__main__")
            leave(0)
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            leave(stop.code if isinstance(stop.code, int) else int(stop.code is not None))
    print(answer, file=answers, flush=True)
