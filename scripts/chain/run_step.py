"""Run a script as a step: one at a time, on verified inputs, its result whole or not there, recorded and gone on with.

    python run_step.py out/lora --reads out/base-model out/dataset -- 02_train_lora.py --dataset_name out/dataset ...

The script gets --output_dir out/lora.part. When it has ended well, run.json there says what was run beside what the
script wrote of it, all is sealed (SHA256SUMS), and the folder takes the place of out/lora, which stays until then.
What was interrupted goes on from its newest whole checkpoint, with --resume_from_checkpoint, if script, options, inputs
and packages are the same. Without a folder the inputs are verified, the script runs, and its errors are explained.
Needs the standard library, and folders.py beside it. Where the script trains with transformers' Trainer, a callback of
this file seals the checkpoints, and stops a training whose loss is no number or for which the disk has no room.
"""

import argparse
import gc
import importlib.util
import math
import os
import re
import resource
import runpy
import select
import shutil
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NoReturn

import folders
from folders import fail, list_checkpoints, make_parser, read_json, read_record


# Trainings ------------------------------------------------------------------------------------------------------------
def drop_broken_pipes() -> None:
    """Sends to nowhere what nobody reads any more, as after Ctrl-C in `... | tee log`: writing to it would fail."""
    for number in (1, 2):
        pipe = select.poll()
        pipe.register(number, 0)
        if pipe.poll(0):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def make_guard(callback_class: type, folder: Path, sealer: ThreadPoolExecutor) -> object:
    """A callback for every Trainer of the script."""

    class Guard(callback_class):
        began = time.time()  # where there is no training, only an evaluation

        def on_train_begin(self, args, state, control, model=None, **kwargs):
            self.limit, args.save_total_limit = args.save_total_limit, None  # on_save removes what is over it
            self.saved, self.save_later = None, False
            self.wait = lambda: None  # until what is being sealed is whole; raises what went wrong with that
            self.over = state.global_step >= state.max_steps  # gone on with after its last step
            self.began = time.time() - (state.log_history[-1].get("seconds", 0) if state.log_history else 0)
            args.eval_on_start &= state.global_step == 0
            state.compute_steps(args, state.max_steps)  # how often to save may be another now
            self.check_disk(args, state, model)

        def check_disk(self, args, state, model) -> None:
            weights = [value for value in model.parameters() if value.requires_grad]
            result = sum(value.nbytes for value in weights)
            size = result + sum(8 * value.numel() for value in weights) + 2**25  # Adam keeps 8 bytes for a parameter
            every = {"steps": state.save_steps, "epoch": state.max_steps / (args.num_train_epochs or 1)}
            steps = every.get(args.save_strategy, state.max_steps) or 1
            left = 0 if args.save_strategy == "no" else math.ceil((state.max_steps - state.global_step) / steps)
            count = max(min(left, (self.limit or left) + 1 - len(list_checkpoints(Path(args.output_dir)))), 0)
            if count * size + result > (free := shutil.disk_usage(folder).free):
                needed = f"{count} checkpoints of {size / 1e9:.2f} GB and a result of {result / 1e9:.2f} GB"
                advice = "Make room, take another folder (OUT), or save fewer: --save_total_limit 1, --save_strategy no"
                fail(f"{needed} do not fit into the {free / 1e9:.2f} GB that are free in {args.output_dir}.\n{advice}")

        def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
            self.ended = False
            if self.over:  # Trainer would take one step more
                train_dataloader.batch_sampler.sampler = type("Nothing", (list,), {})()

        def on_step_end(self, args, state, control, **kwargs):
            drop_broken_pipes()
            if state.epoch % 1 == 0:  # what is due at the end of the epoch comes before the checkpoint
                self.save_later, control.should_save = control.should_save, False
            # A checkpoint has all losses before it; an evaluation may be the best.
            control.should_log |= control.should_save or args.save_strategy == "best" and control.should_evaluate

        def on_epoch_end(self, args, state, control, **kwargs):
            drop_broken_pipes()
            self.ended = True
            stopped = control.should_training_stop and state.global_step < state.max_steps
            if self.over or stopped and state.epoch % 1:  # what is due at the end of an epoch was done, or is not yet
                control.should_log = control.should_evaluate = False
                control.should_save = stopped and self.saved != state.global_step  # where save_strategy is best
            else:
                control.should_save |= self.save_later or stopped
            control.should_log |= control.should_save or args.save_strategy == "best"
            if control.should_log or self.saved == state.global_step:  # it may be saved, maybe for the second time
                self.wait()
            self.save_later = False

        def on_log(self, args, state, control, logs=None, **kwargs):
            # A save may follow, of which on_step_end did not know; there is room for one checkpoint over the limit.
            if control.should_save or args.save_strategy == "best" and control.should_evaluate:
                self.wait()
            state.log_history[-1]["seconds"] = round(time.time() - self.began, 3)
            if not math.isfinite(loss := (logs or {}).get("loss", 0.0)):
                raise ArithmeticError(f"the loss is {loss} at step {state.global_step}")

        def check_weights(self, state, model) -> None:
            if not all(value.isfinite().all() for value in model.parameters() if value.requires_grad):
                raise ArithmeticError(f"the weights are not finite at step {state.global_step}")

        def on_save(self, args, state, control, model=None, **kwargs):
            self.check_weights(state, model)
            self.wait()
            self.saved, checkpoint = state.global_step, Path(args.output_dir, f"checkpoint-{state.global_step}")
            kept = {checkpoint.name, Path(state.best_model_checkpoint or checkpoint).name}
            others = [path for path in list_checkpoints(checkpoint.parent) if path.name not in kept]
            # At the end of an epoch it is saved again, and until then the older ones are needed.
            rotate = (state.epoch % 1 or self.ended) and (self.limit or 0) > 0
            over = others[max(self.limit - len(kept), 0) :] if rotate else []
            self.wait = sealer.submit(folders.seal_checkpoint, checkpoint, over).result  # while the training goes on

        def on_train_end(self, args, state, control, model=None, **kwargs):
            args.save_total_limit = self.limit
            self.wait()
            self.check_weights(state, model)

    return Guard()


class GuardTrainings:
    """Puts the guard on the list of default callbacks as soon as the script imports transformers' Trainer."""

    def __init__(self, folder: Path, sealer: ThreadPoolExecutor):
        self.given = folder, sealer

    def find_spec(self, name, path=None, target=None):
        if name != "transformers.trainer":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_add(module):
            execute(module)
            module.DEFAULT_CALLBACKS.append(make_guard(module.TrainerCallback, *self.given))

        spec.loader.exec_module = execute_and_add
        return spec


# Errors ---------------------------------------------------------------------------------------------------------------
GATED = r"""\2 is gated, and this account has no access yet. Three steps:
  1. ask for access at https://huggingface.co/\1
  2. make a token with read access at https://huggingface.co/settings/tokens
  3. put HF_TOKEN=<token> into .env, or run: hf auth login"""
# What is said, and what to do about it; of a hub also where a script has stopped for it with words of its own.
HUB = (
    (r"GatedRepoError.*?((meta-llama/Llama-2[\w-]+))", GATED + "\nWithout a gate: NousResearch/Llama-2-7b-chat-hf."),
    (r"GatedRepoError.*?://[^/ ]+/(?:api/|resolve-cache/|models/)*((?:datasets/)?([\w.-]+/[\w.-]*\w))", GATED),
    (r"(Dataset) '([^']+)' is a gated", GATED.replace(r"\1", r"datasets/\2")),
    (r"Invalid (cred|user token)|HTTPError.*Invalid username|oken\b.{,60} expired",
     "HF_TOKEN of .env, or else the token of hf auth login, is not accepted. Make a new one at "
     "https://huggingface.co/settings/tokens, or take it out: what is public needs none."),
    (r"429 Too", "The hub had too many requests. Wait some minutes, and type the same command again to go on."),
    (r"(sitory|set|ion)NotFound", "Check the name and the revision; if it is private, put HF_TOKEN=<token> into .env."),
    (r"OfflineMode|IncompleteSn", "Not all is in the cache: type the same command online, without HF_HUB_OFFLINE=1."),
    (r"requested files|Connect|connect|RemoteProtocol|Timeout|[Oo]ffline|resolve host|send a request|50\d Server",
     "See to the network, and type the same command again to go on. HF_HUB_OFFLINE=1 takes what was fetched before."),
)  # fmt: skip
ADVICE = (
    (r"Errno (27|28|122)\b|No space left|File too large|Disk quota|iostream error|unexpected pos|PytorchStreamWriter",
     "Make room, and type the same command again to go on."),
    (r"weights.only|Unsupported (global|class|operand)|Unpickling", "A checkpoint holds more than numbers; nothing "
     "of it was executed. Bring back what was written (an adapter: safetensors), or begin anew: --restart (RESTART=1)"),
    (r"the loss is |the weights are not finite", "Try, with --restart (make: RESTART=1): a tenth of the learning rate, "
     "or --max_grad_norm 0.1 --warmup_steps 0.1 --lr_scheduler_type linear, or --bf16 false --fp16 false"),
    (r"size mismatch", "The adapter does not fit: the shapes differ. Give its own base model, --base_model."),
    (r"[Ff]lash.?[Aa]ttention|attn_implementation", "Give another --attn_implementation: sdpa or eager."),
    (r"custom code|trust_remote_code", "Code of a model runs in a training alone, with --trust_remote_code true."),
    *HUB,
    (r"safetensors", "Only weights in safetensors are read. Save or fetch the model again, or give another."),
    (r"support bf16", "Give --bf16 false --dtype float32, or, for a CPU that multiplies in bfloat16, --use_cpu true."),
    (r"[Tt]emplate", "Mend the rows or the chat template, or, where a prompt is answered, add --raw."),
    (r"(?<!install )--\w|argument|option|keys are not used|could not be parsed", "See --help (make: ARGS=--help)."),
)  # fmt: skip


def find_advice(error: BaseException, table: tuple) -> str:
    """What a table says of an error, or of one that it was raised from."""
    said = " ".join("".join(traceback.format_exception(error, limit=0)).split())
    return next((match.expand(advice) for pattern, advice in table if (match := re.search(pattern, said))), "")


def explain(error: BaseException, prediction: dict, options: list[str], folder: Path | None) -> NoReturn:
    """Ends with the cause of what a library raised, and what to type next."""
    if os.environ.get("TRACEBACK") == "1":
        print(folders.mask("".join(traceback.format_exception(error))), file=sys.stderr)
    text, advice = " ".join(str(error).split()) or type(error).__name__, find_advice(error, ADVICE)
    if isinstance(error, MemoryError) or re.search("out of memory|allocate memory|ALLOC_FAILED", text):
        smaller = [f"{each['options']} ({each['bytes'] / 2**30:.2f} GiB)" for each in prediction.get("smaller", [])]
        fewer = "a smaller --per_device_train_batch_size with more --gradient_accumulation_steps"
        smaller = smaller[:4] or [fewer, "--gradient_checkpointing true", "half of --max_length"]
        fail(f"out of memory: {text[:200]}\nTake less, with --restart (make: RESTART=1): {', or '.join(smaller)}")
    given = [word.split("=")[-1] for word in options]
    read = [word for word in given if os.path.exists(word) and not word.startswith(str(folder))]  # noqa: PTH110
    mend = f"Mend that, in an option or in {', '.join(read)}," if read else "Mend that,"
    advice = advice or f"{mend} and type the same command again. For all that Python says of it: TRACEBACK=1"
    if folder and isinstance(error, ArithmeticError):
        last = next((str(path) for path in list_checkpoints(folder) if (path / folders.SUMS).is_file()), "none")
        text += f". The last good checkpoint: {last}"
    if not isinstance(error, OSError | ValueError | ArithmeticError | RuntimeError):
        text = f"{type(error).__name__}: {text}"
    trace = traceback.extract_tb(error.__traceback__)
    lines = [each for each in trace if not re.search(r"/lib/python3|^<|pyx$|run_step\.py$", each.filename)]
    place = f" ({Path(lines[-1].filename).name}, line {lines[-1].lineno})" if lines else ""  # of no package
    fail(advice if "is gated" in advice else f"{text[:600].rstrip('.')}{place}.\n{advice}")


# Running --------------------------------------------------------------------------------------------------------------
def limit_memory() -> None:
    """On the CPU: what takes more memory than is free fails, and is explained, before the system kills the process."""
    if sys.platform != "linux" or Path("/dev/kfd").exists() or Path("/dev/nvidiactl").exists():
        return
    own = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    free = int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024 + own
    limit, hard = resource.getrlimit(resource.RLIMIT_DATA)
    groups = [Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current")]
    if all(file.is_file() for file in groups) and (most := groups[0].read_text().strip()).isdigit():
        cached = re.findall(r"^(?:in)?active_file (\d+)", groups[1].with_name("memory.stat").read_text(), re.MULTILINE)
        used = int(groups[1].read_text()) - sum(map(int, cached))
        free = min(free, int(most) - used + own)
    resource.setrlimit(resource.RLIMIT_DATA, (free if limit < 0 else min(limit, free), hard))


def run_script(script: Path, options: list[str], prediction: dict, folder: Path | None) -> None:
    """Runs a script in this process, as Python would; ends where it ends with an error."""
    sys.argv, sys.path[0] = [str(script), *options], str(script.resolve().parent)
    if not {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_RANK"} & os.environ.keys():
        os.environ["CUDA_VISIBLE_DEVICES"] = "0"  # one accelerator: SFTTrainer refuses several without a launcher
    os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")  # else a Hopper plans 50 ms for each new length
    if Path("/dev/nvidiactl").exists():  # fewer gaps of memory; AMD's may hang: pytorch 192259
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    argparse.ArgumentParser.error = lambda self, message: fail(f"{message}. See --help (make: ARGS=--help).")
    gc.set_threshold(100_000, 50, 50)  # looking for garbage is a quarter of the time of the libraries' import
    limit_memory()
    try:
        with ThreadPoolExecutor(1) as sealer:  # however the script ends, what it saved is sealed then
            if folder:
                sys.meta_path.insert(0, GuardTrainings(folder, sealer))
            runpy.run_path(str(script), run_name="__main__")
    except SystemExit as stop:
        if isinstance(stop.code, str):
            cause = None if stop.__suppress_context__ else stop.__context__  # not the script's own words
            advice = find_advice(cause, HUB) if cause else ""
            fail(advice if "is gated" in advice else f"{stop.code.removeprefix('error: ')}\n{advice}".rstrip())
        if stop.code:
            if folder and stop.code > 128 and list_checkpoints(folder):
                print("Stopped. Type the same command again, without RESTART=1, to go on.", file=sys.stderr)
            raise
    except Exception as error:  # whatever a library raises is explained
        explain(error, prediction, options, folder)


def peak_memory() -> int:
    """Bytes: the most that tensors took on the accelerator; where none were there, the most that this process took."""
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def publish(folder: Path, part: Path, script: Path, step: dict, inputs: dict[Path, str], prediction: dict) -> None:
    """Adds to run.json what was run, seals the work folder, and puts it in the place of the last result."""
    run = read_record(part)
    if {path: folders.verify(path) for path in inputs} != inputs:
        fail("what it read has changed meanwhile. Bring that back, and type the same command again to go on.")
    metrics = run.get("metrics", {}) | {"peak_memory_bytes": peak_memory()}
    if prediction.get("predictions"):
        metrics["predicted_memory_bytes"] = prediction["predictions"][0]["bytes"]["allocated"]
    sums = folders.add_up(part, [name for name in folders.list_files(part) if name.endswith(".safetensors")])
    read = {path.name: {"sha256": digest, "record": read_record(path)} for path, digest in inputs.items()}
    own = {"script": script.name, "started": read_json(part / "step.json")["started"], "options": step["options"]}
    own |= {"inputs": read, "packages": step["packages"], **folders.describe_machine(script)}
    folders.write_json(part / "run.json", own | run | {"metrics": metrics, "sha256": sums})
    folders.seal(part, sums)
    folders.replace(folder, part)
    if "eval_tokens" in metrics:
        print(f"held-out loss {metrics['eval_loss']:.4f} over {metrics['eval_tokens']} tokens")
    print(f"The result is in {folder}, after a peak of {metrics['peak_memory_bytes'] / 2**30:.2f} GiB of memory")


def read_command() -> tuple[argparse.Namespace, Path, list[str]]:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=Path, help="where the result goes; none: the script leaves no folder")
    add("--reads", nargs="+", action="extend", type=Path, default=[], help="folders and files that it reads, to verify")
    add("--restart", action="store_true", help="begin anew, and lose the checkpoints of what was interrupted")
    add("--note", type=Path, help="file for what NOTE in the environment says, when the result is in its place")
    add("--prediction", type=Path, help="report of predict_memory.py, for the record and for when the memory runs out")
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, command = parser.parse_args(sys.argv[1:place]), sys.argv[place + 1 :]
    if not command or not Path(command[0]).is_file():
        fail(f"no script {command[0] if command else 'after --'}. Give one: run_step.py FOLDER -- SCRIPT OPTIONS")
    if any(re.search(r"^--hub[_-]token|\bhf_[A-Za-z0-9]{16,}", word) for word in command):
        fail("--hub_token is refused, as any token: every user could read it. Put HF_TOKEN=<token> into .env instead.")
    if args.folder and (args.folder.is_symlink() or not args.folder.name):
        args.folder = args.folder.resolve()
    return args, Path(command[0]), command[1:]


def main() -> None:
    args, script, options = read_command()
    prediction = read_json(args.prediction) if args.prediction else {}
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        fail("a step is one process on one accelerator. Start it without accelerate launch or torchrun.")
    if len({path.name for path in args.reads}) < len(args.reads):
        fail("two of --reads have the same name. Rename one: the record tells them apart by it.")
    inputs = {path: folders.verify(path) for path in args.reads}
    folders.check_inputs(inputs)
    if not args.folder or {"-h", "--help"} & set(options):  # nothing to publish
        run_script(script, options, prediction, None)
        return
    words = [word for before, word in zip(["", *options], options, strict=False) if before != "--only"]
    given = [Path(word.partition("=")[2] or word) for word in words] + list(inputs)
    given += [file for path in inputs for file in path.rglob("*") if file.is_symlink()]
    if any(args.folder.resolve() in (path, *path.parents) for path in map(Path.resolve, given)):
        fail(f"{args.folder} is where the result goes. Give what it was made from, or take another folder (OUT).")
    held = folders.lock(args.folder)  # noqa: F841  until the end of this process
    part = args.folder.with_name(f"{args.folder.name}.part")
    step = folders.describe_step(script, options, inputs)
    if checkpoint := folders.take_up(part, step, args.restart):
        options += ["--resume_from_checkpoint", str(checkpoint)]
    run_script(script, [*options, "--output_dir", str(part)], prediction, part)
    if args.note:  # not of the last result any more, and not yet of this one
        args.note.unlink(missing_ok=True)
    publish(args.folder, part, script, step, inputs, prediction)
    if args.note:
        folders.write_text(args.note, os.environ.get("NOTE", "") + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
