"""Prove each path of this project on the accelerator that is here, and measure it: at most 8 minutes on a large one.

    make gpu-check                                     # or, with any Python that has torch: python3 bench/gpu_check.py
    make gpu-check ARGS="--size tiny --device cpu"     # the same steps without an accelerator
    make gpu-check ARGS=--variants                     # instead: what each setting of the recipe fast gains

Needs no hub, no network and no environment of make: its models, tokenizer and rows come from data/ and a config
(synthetic.py). --wheels FOLDER: wheels of the packages that this Python lacks; they are put into a temporary folder.

doctor    00_check_gpu.py
kernels   peaks of products, a copy; attention at new lengths and known ones, decoding at growing lengths (kernels.py)
tiny      a tiny model by run_step.py, in each recipe and with each optimizer: SIGTERM and going on, against the same
          training in one piece; then merge, generate, pipeline, evaluate
wide      Llama-2-7B's width, 16 of its 32 layers, on rows as long as the tutorial's: the recipe fast, the default,
          QLoRA and training without LoRA; speed, losses, memory beside its prediction
answers   64 tokens by 05_generate.py with the adapter and with a whole model, in float32 and in bfloat16
variants  with --variants, after kernels alone: the recipe fast on the wide model with one setting changed

Each command has its own time limit, and one that fails ends nothing but what needs it. What is judged has a limit, with
its reason; speed and memory are judged on an accelerator alone.
Writes  OUTPUT/gpu.json and OUTPUT/gpu.md, and what each command said to OUTPUT/gpu/; of single steps gpu-STEP.json, ...
Exits   with status 0 if all is within its limit, else with 1.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
SCRIPTS, RECIPES = ROOT / "scripts", ROOT / "env/recipes"
sys.path.insert(0, str(SCRIPTS / "chain"))
from memory import SETTINGS, count_weights, predict_memory  # noqa: E402

TIMED = BENCH / "timed.py"
LORA, FULL = SCRIPTS / "02_train_lora.py", SCRIPTS / "03_train_full.py"
# Trainings of the tiny model: script, and options; {fast}: the recipe that choose_fast.py wrote.
TRAININGS = {
    "LoRA": (LORA, ""),
    "LoRA, fast": (LORA, "--config {fast-lora}"),
    "LoRA, adamw_torch": (LORA, "--optim adamw_torch"),
    "LoRA, adamw_8bit": (LORA, "--optim adamw_8bit"),
    "QLoRA": (LORA, "--config {qlora}"),
    "full": (FULL, ""),  # whose embedding is large enough to be paged, as an adapter's matrices are not
    "full, paged_adamw_8bit": (FULL, "--optim paged_adamw_8bit"),
    "full, fast": (FULL, "--config {fast-full}"),
}
# What is changed of the recipe fast for the step variants: options, and environment.
VARIANTS = {
    "cuDNN's attention first": ("", {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}),
    "blocks of memory that do not grow": ("", {"PYTORCH_ALLOC_CONF": "expandable_segments:False"}),
    "without Liger kernels": ("--use_liger_kernel false", {}),
    "paged_adamw_32bit": ("--optim paged_adamw_32bit", {}),
    "the loss in chunks": ("--token_metrics true", {}),
    "gradient checkpointing": ("--gradient_checkpointing true", {}),
    "packing": ("--packing true", {}),
    "layers compiled": ("", "compiled"),
    "PEFT's casts kept": ("", "casts"),
    "batches of 16": ("--per_device_train_batch_size 16", {}),
}
# What runs before the script, for what it has no option for.
PATCHES = {
    "casts": """
from peft.tuners.tuners_utils import BaseTunerLayer
BaseTunerLayer.cast_input_dtype_enabled = property(lambda layer: True, lambda layer, value: None)
""",
    "compiled": """
from transformers import Trainer
from transformers.modeling_layers import GradientCheckpointingLayer
train = Trainer.train
def compile_and_train(trainer, *given, **how):
    for layer in trainer.model.modules():
        if isinstance(layer, GradientCheckpointingLayer):
            layer.compile(dynamic=True)
    return train(trainer, *given, **how)
Trainer.train = compile_and_train
""",
}
RUN = "\nimport runpy, sys\nsys.argv.pop(0)\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
# As run_step.py has them, for what runs without it.
OURS = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "1", "HF_HUB_OFFLINE": "1"}
if Path("/dev/nvidiactl").exists():
    OURS["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
if not {"CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"} & os.environ.keys():
    OURS["CUDA_VISIBLE_DEVICES"] = "0"
MAIN = ("doctor", "kernels", "tiny", "wide", "answers")


def parse_arguments() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=formatter)
    add = parser.add_argument
    add("--size", choices=["tiny", "llama2-7b-half"], default="llama2-7b-half", help="of the steps wide and answers")
    add("--device", choices=["gpu", "cpu"], default="gpu", help="cpu: though there is an accelerator, or none")
    add("--only", nargs="+", choices=list(STEPS), default=list(MAIN), help="these steps")
    add("--variants", action="store_const", dest="only", const=["kernels", "variants"], help="--only kernels variants")
    add("--wheels", type=Path, metavar="FOLDER", help="wheels of packages that this Python lacks")
    add("--minutes", type=float, default=8, help="what would begin later is left out (default: 8)")
    add("--output_dir", type=Path, default=ROOT / "outputs/check", help="folder of gpu.json, gpu.md and gpu/")
    return parser.parse_args()


def end(process: subprocess.Popen) -> None:
    """Kills a process, and those that it began."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


class Check:
    """Runs commands, each within its time, and keeps what was found."""

    def __init__(self, args: argparse.Namespace, work: Path):
        self.args, self.work, self.rows, self.step = args, work, [], ""
        self.began, self.gpu, self.tiny = time.monotonic(), args.device == "gpu", args.size == "tiny"
        self.stem = "-".join(["gpu", *(args.only if args.only != list(MAIN) else [])])  # each has a report of its own
        self.logs = args.output_dir.resolve() / self.stem
        # On a CPU models as small as these compute no faster with more threads.
        on_cpu = {} if self.gpu else {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        self.environment = OURS | os.environ | on_cpu
        self.machine, self.report, self.peaks, self.at_once = "", {}, {}, min(8, os.cpu_count())
        self.running, self.stopped = set(), False

    def run(self, name: str, *command, limit: float, statuses: tuple = (0,), **environment) -> None:
        """Runs a Python command; a RuntimeError where it does not end as it should within its limit in seconds."""
        limit = min(limit, 60 * self.args.minutes - (time.monotonic() - self.began))
        if limit < 5 or self.stopped:
            raise RuntimeError(
                "stopped" if self.stopped else f"left out: the {self.args.minutes:g} minutes are over (--minutes)"
            )
        command, begin = [sys.executable, *map(str, command)], time.monotonic()
        options = {"env": self.environment | environment, "cwd": ROOT, "text": True, "start_new_session": True}
        log = self.logs / f"{self.step} {name}.log".replace(",", "").replace(" ", "-")
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options)
        self.running.add(process)
        try:
            parts, status = process.communicate(timeout=limit), process.returncode
        except subprocess.TimeoutExpired:
            end(process)
            parts, status = process.communicate(), "no end"
        self.running.discard(process)
        said, seconds = "\n".join(parts), time.monotonic() - begin
        log.write_text(f"$ {' '.join(command)}\n{said}\nstatus {status} after {seconds:.1f} s\n", encoding="utf-8")
        if status == "no end":
            raise RuntimeError(f"it did not end within {limit:.0f} s ({log.name})")
        if status not in statuses:
            lines = [line.strip() for line in said.splitlines() if line.strip()] or ["it said nothing"]
            errors = [line for line in lines if "rror" in line] or lines
            raise RuntimeError(f"exit status {status}, {errors[-1][:200]} ({log.name})")

    def stop(self, number: int, frame) -> None:
        """After a signal: ends what runs, and with it this process, by way of the report."""
        self.stopped = True
        for process in list(self.running):
            end(process)
        sys.exit(128 + number)

    def say(self, what: str, found: str, value=None) -> None:
        """What was found, without a limit."""
        self.rows.append({"step": self.step, "what": what, "found": found, "value": value, "limit": "", "good": None})
        print(f"{self.step:8} {what}: {found}", flush=True)

    def judge(self, what: str, found: str, value, good: bool, limit: str, speed: bool = False) -> None:
        """What was found, and whether it is within its limit; speed and memory are not judged on a CPU."""
        self.say(what, found, value)
        self.rows[-1] |= {"limit": limit, "good": None if speed and not self.gpu else bool(good)}
        if self.rows[-1]["good"] is False:
            print(f"{'':8} NOT as it should be: {limit}", flush=True)

    def attempt(self, what: str, function, *given, **how):
        """What a function returns; where it fails, that is what was found."""
        try:
            return function(*given, **how)
        except Exception as error:  # of a command, or of what it wrote
            said = str(error) if isinstance(error, RuntimeError) else repr(error)
            self.judge(what, said, None, False, "ends well")
        return None


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


# Doctor and kernels ---------------------------------------------------------------------------------------------------
def check_doctor(check: Check) -> None:
    file = check.work / "doctor.json"
    check.run("doctor", SCRIPTS / "00_check_gpu.py", "--output", file, limit=180, statuses=(0, 1, 2))
    check.report = report = read(file)
    found = report["torch"] or {"version": "none", "gpus": []}
    names = [gpu["name"] for gpu in found["gpus"]] or ["the CPU"]
    check.machine = f"{names[0]}, PyTorch {found['version']}"
    check.say("machine", f"{check.machine}, Python {report['python']}")
    check.say("verdict", "; ".join([report["verdict"], *(each["cause"] for each in report["findings"])])[:500])
    if report["system"]["nvidia"].get("exclusive"):
        check.at_once = 1
    broken = [f"{name}: {probe['error']}" for name, probe in report["probes"].items() if probe["status"] != "passed"]
    said = "; ".join(broken)[:500] or f"all {len(report['probes'])} passed"
    check.judge("probes", said, len(broken), not broken, "each computes what it should")


def judge_attention(check: Check, ours: bool, kinds: dict) -> None:
    """What a new length costs, in the order of kernels that run_step.py sets or in PyTorch's own."""
    most, finite, said = 0.0, True, []
    for kind, times in kinds.items():
        turns = [[sum(each) if isinstance(each, list) else each for each in times[t]] for t in ("new", "again")]
        new, again = map(statistics.median, turns)
        most, finite = max(most, new - again), finite and times.get("finite", True)
        said.append(f"{kind} {new:.2f} and {again:.2f}")
    what = f"attention, {'as run_step.py sets it' if ours else 'in the order of PyTorch'}: ms at a new length and again"
    if ours:  # a plan takes 40 ms and more, and there is one for each layer's forward and backward
        check.judge(what, ", ".join(said), most, most < 5, "a new length costs less than 5 ms", speed=True)
        check.judge("gradients of attention", f"finite: {finite}", finite, finite, "finite at each length")
    else:
        check.say(what, ", ".join(said), most)


def check_kernels(check: Check) -> None:
    file, quick = check.work / "kernels.json", [] if check.gpu else ["--quick"]
    check.run("kernels", BENCH / "kernels.py", file, *quick, limit=120)
    found = read(file)
    check.machine, check.peaks, sheet = found["machine"], found["tflops"], found["data_sheet"]
    said = ", ".join(
        f"{name} {peak:.3g}{f' ({peak / sheet[name]:.2f} of the data sheet)' if name in sheet else ''}"
        for name, peak in check.peaks.items()
    )
    check.say("peak of a product, TFLOP/s", said, check.peaks)
    check.say("copy on the device, GB/s", f"{found['copy_gb_per_second']:.0f}", found["copy_gb_per_second"])
    judge_attention(check, True, found["attention"])
    its_own = {"TORCH_CUDNN_SDPA_DEPRIORITIZED": "0"}
    check.run("kernels of PyTorch", BENCH / "kernels.py", file, "--attention", *quick, limit=120, **its_own)
    judge_attention(check, False, read(file)["attention"])


# A tiny model, end to end ---------------------------------------------------------------------------------------------
def choose_recipes(check: Check) -> dict[str, Path]:
    """The recipes as Make would give them here, by what stands for them in TRAININGS."""
    recipes = {f"fast-{method}": check.work / f"fast-{method}.yaml" for method in ("lora", "full")}
    recipes["qlora"] = check.work / "qlora.yaml"
    for name, file in recipes.items():
        given = ["--config", RECIPES / "qlora.yaml"] if name == "qlora" else []
        if not file.is_file():
            method = "full" if name == "fast-full" else "lora"
            check.run(name, SCRIPTS / "chain/choose_fast.py", "--method", method, *given, "--output", file, limit=60)
    return recipes


def make_model(check: Check, size: str) -> Path:
    folder = check.work / size
    if not (folder / "rows").is_dir():
        check.run(f"model {size}", BENCH / "synthetic.py", folder, size, limit=90)
    return folder


def train_twice(check: Check, name: str, recipes: dict) -> None:
    """A training in one piece, and the same with a SIGTERM in its 6th step of 12 and gone on with."""
    script, options = TRAININGS[name]
    model, data, folder = check.work / "tiny/model", ROOT / "data", name.replace(",", "").replace(" ", "-")
    given = [script, "--model_name_or_path", model, "--dataset_name", data, "--dataset_test_split", "validation"]
    given += "--max_steps 12 --save_steps 4 --logging_steps 2 --learning_rate 1e-3 --report_to none".split()
    given += options.format(**recipes).split()
    begin, runs = time.monotonic(), []
    for turn, stop, status in (("whole", [], 0), ("stopped", ["--stop_at", 6], 143), ("stopped", [], 0)):
        step = [SCRIPTS / "chain/run_step.py", check.work / f"runs/{folder}-{turn}", "--reads", model, data, "--"]
        timed = [TIMED, check.work / f"{folder}.json", *stop]
        check.run(f"{name} {turn}{status or ''}", *timed, *step, *given, limit=150, statuses=(status,))
    for turn in ("whole", "stopped"):
        runs.append(read(check.work / f"runs/{folder}-{turn}/run.json"))
    losses = [{entry["step"]: entry["loss"] for entry in run["history"] if "loss" in entry} for run in runs]
    ends = [run["metrics"]["eval_loss"] for run in runs]
    apart = max([abs(loss / losses[1][step] - 1) for step, loss in losses[0].items() if step in losses[1]])
    apart, same = max(apart, abs(ends[0] / ends[1] - 1)), runs[0]["sha256"] == runs[1]["sha256"]
    first, *_, last = losses[0].values()
    said = f"loss {first:.5f} to {last:.5f}, held-out {ends[0]:.5f}, {time.monotonic() - begin:.0f} s for all"
    check.judge(name, said, ends[0], last < first, "the loss falls")
    # Sums of kernels may have another order in another process; what is lost in a checkpoint is off by far more.
    said = f"{apart:.1e} apart, weights {'the same to the bit' if same else 'others'}"
    check.judge(f"{name}, stopped and gone on with", said, apart, apart <= 1e-3, "losses within 1e-3")


def check_tiny(check: Check) -> None:
    runs, model = check.work / "runs", check.work / "tiny/model"
    with ThreadPoolExecutor(check.at_once) as pool:
        tasks = [pool.submit(make_model, check, "tiny"), pool.submit(choose_recipes, check)]
        _, recipes = [task.result() for task in tasks]
        list(pool.map(lambda name: check.attempt(name, train_twice, check, name, recipes), TRAININGS))

    adapter, merged, step = runs / "LoRA-whole", runs / "merged", SCRIPTS / "chain/run_step.py"
    given = ["--model_name_or_path", adapter / "adapter", "--base_model", model]
    check.run("merge", step, merged, "--reads", model, adapter, "--", SCRIPTS / "04_merge_adapter.py", *given, limit=90)
    report = check.work / "evaluation"
    models = [adapter / "adapter", merged / "model", runs / "full-whole/model"]
    evaluate = [step, "--reads", *(path.parent for path in models), model, "--", SCRIPTS / "chain/evaluate.py"]
    evaluate += ["--base_model", model, "--models", *models, "--dataset_name", ROOT / "data", "--output_dir", report]
    commands = {"evaluate": evaluate}
    for dtype in ("float32", "bfloat16"):
        for name, model_options in (("adapter", given), ("merged", ["--model_name_or_path", merged / "model"])):
            for script in ("05_generate.py", "06_pipeline_infer.py"):
                kind = f"{name} {script[:2]} {dtype}"
                options = ["--prompt", "What is LoRA?", "--dtype", dtype, "--max_new_tokens", 32]
                options += ["--output", check.work / f"{kind}.jsonl"]
                commands[kind] = [SCRIPTS / script, *model_options, *options]
    with ThreadPoolExecutor(check.at_once) as pool:
        tries = {name: pool.submit(check.run, name, *command, limit=90) for name, command in commands.items()}
    for name, attempt in tries.items():
        check.attempt(name, attempt.result)
    for dtype in ("float32", "bfloat16"):
        files = [check.work / f"{kind}.jsonl" for kind in commands if kind.endswith(dtype)]
        answers = [json.loads(file.read_text())["answer"].strip() for file in files if file.is_file()]
        said = f"{len(set(answers))} of {len(answers)}, by adapter, merged, 05 and 06"
        if dtype == "float32":
            good = len(answers) == 4 and len(set(answers)) == 1
            check.judge("different answers in float32", said, len(set(answers)), good, "one: it is the same model")
        else:  # rounding may choose another token
            check.judge("different answers in bfloat16", said, len(answers), len(answers) == 4, "four answers")
    losses = {row["name"]: row["loss"] for row in read(report / "evaluation.json")["models"]}
    trained = {name: read(runs / name / "run.json")["metrics"]["eval_loss"] for name in ("LoRA-whole", "full-whole")}
    apart = max(abs(losses[name] / loss - 1) for name, loss in trained.items())
    said = f"{', '.join(f'{name} {loss:.4f}' for name, loss in losses.items())}: {apart:.1e} apart"
    check.judge("evaluate", said, apart, apart < 1e-5, "the held-out losses of the trainings, within 1e-5")


# A wide model ---------------------------------------------------------------------------------------------------------
def count_operations(config: dict, shape: list[int], full: bool, targets: list[str]) -> float:
    """Floating-point operations of forward and backward of a batch [rows, tokens], as train_speed.py counts them."""
    counts, (rows, tokens) = count_weights(config, targets, 64), shape
    base = counts["quantizable"] + config["vocab_size"] * config["hidden_size"]
    adapter = 0 if full else counts["adapter"]
    attention = 2 * config["num_hidden_layers"] * counts["attention"][0] * tokens * tokens
    return rows * tokens * (4 * (base + adapter) + 2 * (base if full else adapter)) + 3 * rows * attention


def train_wide(check: Check, name: str, script: Path, options: str, steps: int, *before, **environment) -> dict:
    """What some steps of a training of the wide model took; before: Python's arguments ahead of timed.py."""
    if not check.peaks and "kernels" not in check.args.only:
        check_kernels(check)
    folder, full, out = (
        make_model(check, check.args.size),
        script == FULL,
        check.work / f"wide-{name.replace(' ', '-')}",
    )
    file = check.work / "timed.json"
    command = [script, "--model_name_or_path", folder / "model", "--dataset_name", folder / "rows"]
    command += [*options.format(**choose_recipes(check)).split(), "--max_length", 128 if check.tiny else 1024]
    command += ["--output_dir", out, "--max_steps", steps, "--logging_steps", 1]
    command += ["--save_strategy", "no", "--report_to", "none", "--learning_rate", 1e-4 if full else 1e-3]
    check.run(name, *before, TIMED, file, *command, limit=120, **environment)
    found, run, config = read(file), read(out / "run.json"), read(folder / "model/config.json")
    times, arguments = found["step_seconds"], run["arguments"]
    entries = [entry for entry in run["history"] if "loss" in entry]
    real = [entry["num_input_tokens_seen"] for entry in entries]  # so far, padding not counted
    shutil.rmtree(out / "model", ignore_errors=True)  # of all parameters: 14 GB
    each = len(found["shapes"]) // len(times)  # forward passes of a step
    shapes = [found["shapes"][each * number : each * (number + 1)] for number in range(len(times))]
    tokens = [sum(rows * length for rows, length in step) for step in shapes]
    late = range(3, len(times))  # the first steps load kernels
    longest = max(late, key=lambda number: tokens[number])
    targets = arguments.get("lora_target_modules") or ["q_proj", "v_proj"]  # PEFT's choice for Llama
    operations = sum(count_operations(config, shape, full, targets) for shape in shapes[longest])
    tflops, peak = operations / times[longest] / 1e12, check.peaks.get("bfloat16" if arguments["bf16"] else "float32")
    seen = {}
    for number, shape in enumerate(map(str, shapes)):
        seen.setdefault(shape, []).append((number, times[number]))
    new = [
        seconds / statistics.mean(time for _, time in again)
        for (number, seconds), *again in seen.values()
        if number in late and again
    ]
    settings = {key: arguments.get(key, value) for key, value in SETTINGS.items()} | {"lora_target_modules": targets}
    method, where = "full" if full else "lora", "gpu" if check.gpu else "cpu"
    return {
        "tokens_per_second": (real[-1] - real[2]) / sum(times[3:]), "step_seconds": times,
        "longest": {"tokens": tokens[longest], "seconds": times[longest]},
        "tflops": tflops, "share": peak and tflops / peak,
        "losses": [entry["loss"] for entry in entries],
        "new_over_known": statistics.median(new) if new else 1.0,
        "allocated": found["peak_memory_bytes"], "reserved": found["reserved_memory_bytes"],
        "predicted": predict_memory(config, method, settings, arguments["max_length"], where)["allocated"],
    }  # fmt: skip


def judge_wide(check: Check, name: str, found: dict, share: float | None) -> None:
    """Speed, losses, and memory beside what predict_memory.py says."""
    longest, losses = found["longest"], found["losses"]
    said = (
        f"{found['tokens_per_second']:,.0f} real tokens/s; {longest['tokens'] / longest['seconds']:,.0f} in the step "
    )
    said += f"of most, {longest['tokens']}: {found['tflops']:.4g} TFLOP/s"
    if share and found["share"]:  # in float32 nearly all is products; in bfloat16 norms, MLP and attention take half
        good, limit = found["share"] >= share, f"{share} of the measured peak"
        check.judge(name, f"{said}, {found['share']:.2f} of the peak", found, good, limit, speed=True)
    else:
        check.say(name, said, found)
    ends = [statistics.mean(part) for part in (losses[:10], losses[-10:])]
    if len(losses) >= 40:  # of fewer, whose rows are others, it does not tell
        check.judge(f"{name}, loss", f"{ends[0]:.4f} to {ends[1]:.4f}", ends, ends[1] < ends[0], "falls")
    allocated, reserved, predicted = (found[key] / 2**30 for key in ("allocated", "reserved", "predicted"))
    said = f"{allocated:.2f} GiB allocated, {predicted:.2f} predicted: {100 * (allocated / predicted - 1):+.1f} %"
    good = abs(allocated / predicted - 1) <= 0.08
    check.judge(f"{name}, memory", said, allocated, good, "allocated within 8 % of predicted", speed=True)
    good = reserved <= 1.05 * predicted + 1  # what predict_memory.py leaves where it says that a training fits
    check.judge(f"{name}, reserved", f"{reserved:.2f} GiB", reserved, good, "5 % and 1 GiB above at most", speed=True)


def check_wide(check: Check) -> None:
    kinds = {
        "fast": (LORA, "--config {fast-lora}", 40, 0.4),
        "default": (LORA, "", 11, 0.6),  # the first and the eleventh are the longest
        "QLoRA": (LORA, "--config {qlora}", 10, None),
        "full fast": (FULL, "--config {fast-full}", 11, None),
    }
    runs = {}
    for name, (script, options, steps, share) in kinds.items():
        if found := check.attempt(name, train_wide, check, name, script, options, steps):
            runs[name] = found
            judge_wide(check, name, found, share)
    if fast := runs.get("fast"):  # a plan for each length, or a compilation, is many times a step
        ratio = fast["new_over_known"]
        check.judge("fast, a new length over a known one", f"{ratio:.2f}", ratio, ratio < 1.3, "below 1.3", speed=True)
    if fast and (default := runs.get("default")):
        means = [statistics.mean(run["losses"][:11]) for run in (fast, default)]
        apart = abs(means[0] / means[1] - 1)
        said = f"{means[0]:.4f} and {means[1]:.4f}: {100 * apart:.2f} % apart"
        check.judge("fast beside the default, loss of 11 steps", said, apart, apart <= 0.005, "within 0.5 %")
        times = sum(default["step_seconds"][3:11]) / sum(fast["step_seconds"][3:11])
        check.say("fast beside the default, the same 8 steps", f"{times:.2f} times as fast", times)


def answer(check: Check, what: str, *options) -> None:
    """The time of each token of an answer."""
    file = check.work / "answers.json"
    command = [BENCH / "timed_generate.py", file, SCRIPTS / "05_generate.py", "--max_new_tokens", 64]
    check.run(what, *command, "--prompt", "What is a large language model?", *options, limit=90)
    found = read(file)
    times = found["token_seconds"][2:]  # the first passes load kernels
    median, most = statistics.median(times), max(times)
    said = f"{1e3 * median:.2f} ms a token in the median, the slowest {most / median:.1f} times as long, "
    said += f"the first {found['first_token_at']:.1f} s after the start"
    good = most <= 5 * median  # what is planned or compiled for a length is far more
    check.judge(what, said, found, good, "no token takes 5 times the median", speed=True)


def check_answers(check: Check) -> None:
    model, adapter = check.work / check.args.size / "model", check.work / "wide-fast/adapter"
    if not adapter.is_dir():
        train_wide(check, "fast", LORA, "--config {fast-lora}", 4)
    for dtype in ("float32", "bfloat16"):
        for name, options in (("adapter", [adapter, "--base_model", model]), ("whole model", [model])):
            what = f"{name}, {dtype}"
            check.attempt(what, answer, check, what, "--dtype", dtype, "--model_name_or_path", *options)


def check_variants(check: Check) -> None:
    """The recipe fast with one setting changed, on rows in the same order."""
    fast = train_wide(check, "fast", LORA, "--config {fast-lora}", 40)
    judge_wide(check, "fast", fast, None)
    for name, (options, how) in VARIANTS.items():
        steps = 10 if "16" in name else 40
        before, environment = (["-c", PATCHES[how] + RUN], {}) if isinstance(how, str) else ([], how)
        given = [check, name, LORA, f"--config {{fast-lora}} {options}", steps, *before]
        if found := check.attempt(name, train_wide, *given, **environment):
            ratio = found["tokens_per_second"] / fast["tokens_per_second"]
            memory = found["allocated"] / 2**30
            said = f"{ratio:.2f} of fast, {found['tokens_per_second']:,.0f} tokens/s, {memory:.2f} GiB"
            check.say(name, said, found | {"ratio": ratio})


STEPS = {"doctor": check_doctor, "kernels": check_kernels, "tiny": check_tiny, "wide": check_wide,
         "answers": check_answers, "variants": check_variants}  # fmt: skip


def format_table(check: Check, machine: str) -> str:
    lines = [machine, "", "| step | what | found | should be | |", "| --- | --- | --- | --- | --- |"]
    for row in check.rows:
        mark = {True: "yes", False: "NO", None: "not judged" if row["limit"] else ""}[row["good"]]
        lines.append(f"| {row['step']} | {row['what']} | {row['found']} | {row['limit']} | {mark} |")
    judged = [row["good"] for row in check.rows if row["good"] is not None]
    verdict = f"{sum(judged)} of {len(judged)} are as they should be."
    lines += ["", verdict if check.gpu else f"{verdict} Speed and memory are judged on an accelerator alone."]
    return "\n".join(lines) + "\n"


def add_wheels(folder: Path, site: Path) -> None:
    """Packages out of wheels, for this process and those that it starts; nothing is fetched."""
    wheels = sorted(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target"]
    if not wheels or subprocess.run([*pip, site, *wheels]).returncode:
        sys.exit(f"error: no wheels in {folder}, or pip cannot install them. Give another folder: --wheels FOLDER")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])


def look_for_torch(args: argparse.Namespace) -> None:
    """Ends where this Python has no torch, or torch no accelerator."""
    look = [sys.executable, "-c", "import torch; raise SystemExit(0 if torch.cuda.is_available() else 3)"]
    status = subprocess.run(look, capture_output=True).returncode
    if status == 3 and args.device == "cpu":
        return
    if status == 3:
        sys.exit('error: PyTorch finds no accelerator. Type: make check-gpu, or add ARGS="--size tiny --device cpu"')
    if status:
        sys.exit(f"error: {sys.executable} has no PyTorch that works. Type: make setup, or name one that has: PYTHON=")


def write_report(check: Check, seconds: float) -> str:
    """gpu.json and gpu.md of what was found so far; the table."""
    machine = f"{check.machine}, {check.args.size}, {datetime.now().astimezone():%Y-%m-%d}, {seconds:.0f} s"
    text = format_table(check, machine)
    good = not any(row["good"] is False for row in check.rows)
    report = {"machine": machine, "good": good, "seconds": seconds, "rows": check.rows, "doctor": check.report}
    file = check.args.output_dir / check.stem
    file.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    file.with_suffix(".md").write_text(text, encoding="utf-8")
    return text


def main() -> None:
    args = parse_arguments()
    begin = time.monotonic()
    shared = Path("/dev/shm")  # memory: the wide model is read many times
    roomy = shared.is_dir() and shutil.disk_usage(shared).free > 60e9
    with tempfile.TemporaryDirectory(dir=shared if roomy else None) as name:
        if args.wheels:
            add_wheels(args.wheels, Path(name, "site"))
        look_for_torch(args)
        check = Check(args, Path(name))
        shutil.rmtree(check.logs, ignore_errors=True)
        check.logs.mkdir(parents=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, check.stop)
        for check.step in args.only:
            try:
                check.attempt(check.step, STEPS[check.step], check)
            finally:
                write_report(check, time.monotonic() - begin)
    seconds = time.monotonic() - begin
    if args.only == list(MAIN):
        check.step = "all"
        good = seconds <= 60 * args.minutes
        check.judge("time", f"{seconds:.0f} s", seconds, good, f"at most {args.minutes:g} minutes", speed=True)
    bad = [f"{row['step']}: {row['what']}" for row in check.rows if row["good"] is False]
    print(f"\n{write_report(check, seconds)}")
    if bad:
        sys.exit(f"error: not as it should be: {'; '.join(bad)}. What was said: {check.logs}")


if __name__ == "__main__":
    try:
        main()
    except OSError as error:  # a full disk, a folder that cannot be written
        sys.exit(f"error: {error}. Mend that, or give another folder: --output_dir FOLDER")
