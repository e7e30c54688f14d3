"""What a training would take of rows, steps, memory, disk and time, from the config of its model; for try_out.py."""

import argparse
import copy
import math
import re
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from find_rows import find_rows, list_files
from folders import fail, read_record
from huggingface_hub import HfApi, snapshot_download
from memory import QLORA, unknown_to
from peft import get_peft_model
from predict_memory import judge_memory, judge_needs, predict, read_settings
from records import load_script
from transformers import AutoModelForCausalLM
from trl import get_peft_config

download = load_script("01_download.py")
LIGHT = [pattern for pattern in download.MODEL_FILES["allow_patterns"] if pattern != "*.safetensors"]
MOST_PARAMETERS = 700_000_000  # of a model that is timed: two layers of 7 billion parameters
MOST_WORK = 5e11  # floating-point operations of a pass that is timed on the CPU: some seconds
COUNTING = 10  # seconds for counting rows


def count_rows(args: argparse.Namespace, read: int) -> tuple[int, str]:
    """How many rows there are to train on, of which the first were read, with a word where that is not exact. Those of
    files here are counted, for some seconds at most; of those on a hub the card may say it."""
    name, config, begin = args.dataset_name, args.dataset_config, time.monotonic()
    splits = {"train": args.dataset_train_split, "validation": args.dataset_test_split}
    if Path(name).exists():
        for count, _ in enumerate(find_rows(name, None, config, splits, None)["train"].read(), 1):
            if count % 1000 == 0 and time.monotonic() - begin > COUNTING:
                return count, "at least "
        return count, ""
    card = list_files(name, download.describe("dataset", name, args.dataset_revision)["revision"])[2] or {}
    infos = card.get("dataset_info") or []
    for info in infos if isinstance(infos, list) else [infos]:
        for split in info.get("splits") or []:
            wanted = (config or info.get("config_name"), splits["train"] or "train")
            if (info.get("config_name"), split["name"]) == wanted:
                return split["num_examples"], ""
    return read, "at least "


def count_steps(rows: int, mean: float, args) -> int:
    """Steps of a training, as the Trainer counts them; mean: tokens in a row."""
    if args.max_steps > 0:
        return args.max_steps
    rows = math.ceil(rows * mean / args.max_length) if args.packing else rows
    batches = math.ceil(rows / args.per_device_train_batch_size)
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def fetch_light(name: str, revision: str, known: Path, folder: Path) -> tuple[Path, list[int]]:
    """A folder with config and tokenizer of a model, and the sizes of its files of weights, 0: not known."""
    if name == "embedded":
        if read_record(known).get("base_model", {}).get("name") != download.EMBEDDED["name"]:
            download.convert_embedded(known := folder)
        name = str(known)
    if Path(name).exists():
        return Path(name), [file.stat().st_size for file in Path(name).glob("*.safetensors")]
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        fail(f"there is no {Path(name).absolute()}. Give a folder, or a hub id: user/name")
    commit = download.describe("model", name, revision)["revision"]
    ignored = download.MODEL_FILES["ignore_patterns"]
    light = snapshot_download(name, revision=commit, allow_patterns=LIGHT, ignore_patterns=ignored)
    files = HfApi().model_info(name, revision=commit, files_metadata=True).siblings
    weights = [file for file in files if re.fullmatch(r"(?!consolidated)[^/]*\.safetensors", file.rfilename)]
    return Path(light), [file.size or 0 for file in weights]


def build(config, layers: int | None = None, **options) -> torch.nn.Module:
    """A model of a config, with random weights; layers: with the first of its layers alone."""
    config = copy.deepcopy(config)
    if layers:
        whole = config.num_hidden_layers
        for key, value in [*vars(config).items()]:
            if isinstance(value, list) and len(value) == whole:  # of each layer its kind
                setattr(config, key, value[:layers])
        config.num_hidden_layers = layers
    return AutoModelForCausalLM.from_config(config, **options)


def count_parameters(config, model_args=None, layers: int | None = None, **options) -> tuple[int, list[str]]:
    """Parameters of a model, or of a LoRA adapter of it and where these are. Takes no memory."""
    with torch.device("meta"):
        model = build(config, layers, **options)
        if model_args is None:
            return model.num_parameters(), []
        adapted = get_peft_model(model, get_peft_config(model_args))
    found = [*adapted.base_model.targeted_module_names, *adapted.base_model.targeted_parameter_names]
    targets = sorted({name.rpartition(".")[2] for name in found})
    return adapted.num_parameters(only_trainable=True), targets


# What it takes --------------------------------------------------------------------------------------------------------
def choose_fast(recipe: list[str], folder: Path, report: Path, options: list[str], file: Path) -> str:
    """The recipe that Make would train with for RECIPE=fast, throughput and qlora."""
    chain = Path(__file__).parent
    predict = [sys.executable, chain / "predict_memory.py", "--model", folder, "--method", "lora"]
    predict += ["--audit", report] if report.is_file() else []
    command = [sys.executable, chain / "choose_fast.py", "--method", "lora", *recipe, "--output", file]
    command = [*map(str, [*command, "--", *predict, "--", "--config", file, *options])]
    said = subprocess.run(command, capture_output=True, text=True).stderr
    return str(file) if file.is_file() else fail(said.strip().removeprefix("error: "))


def try_memory(model: dict, options: list[str], longest: int | None, machine: tuple, missing: list[str]) -> tuple:
    """Predictions of the memory for LoRA, QLoRA and full training, with the other settings of the options; as lines."""
    (where, device, memory), config, predictions, lines = machine, model["config"].to_dict(), [], []
    asked = read_settings(options, {})[0]
    if reason := unknown_to(config, asked["lora_target_modules"]):
        return [], [f"not predicted: {reason}; the weights alone: {model['total'] * model['width'] / 2**30:.1f} GiB"]
    plain = {"load_in_4bit": False, "load_in_8bit": False}
    ways = {"LoRA": ({}, plain), "QLoRA": (QLORA, {"load_in_4bit": True}), "full": ({}, plain | {"dtype": "float32"})}
    for label, (base, change) in ways.items():
        method, settings = "full" if label == "full" else "lora", read_settings(options, base)[0] | change
        if settings["dtype"] == "auto":  # the checkpoint's own
            settings["dtype"] = config.get("dtype") or "float32"
        tokens = settings["max_length"]
        tokens = tokens if settings["packing"] else min(tokens, longest or tokens)
        predictions.append(each := predict(config, method, settings, tokens, where, memory))
        parts = ("weights", "gradients", "optimizer", "activations", "logits")
        parts = ", ".join(f"{part} {each['bytes'][part] / 2**30:.1f}" for part in parts)
        peak, fit = each["bytes"]["peak"] / 2**30, "fits" if each["fits"] else "does not fit"
        lines.append(f"{label:6}{peak:8.1f}  {fit:14}{parts}")
    wanted = predictions[asked["load_in_4bit"]]
    findings = [judge_memory(wanted, config, where, device, memory), judge_needs(wanted["settings"], 120)]
    for cause, command in filter(None, findings):
        missing.append(f"{cause}: {command.replace(', --force here', '')}")
    return predictions, [f"GiB, of {memory / 2**30:.1f} free ({device}), for rows of {tokens:,} tokens:", *lines]


def try_disk(model: dict, settings: tuple, steps: int, args: argparse.Namespace, missing: list[str]) -> tuple:
    """Bytes that each result takes; checkpoints keep 8 bytes for a parameter besides, as run_step.py counts them."""
    _, model_args, training = settings
    save_steps = training.save_steps if training.save_steps >= 1 else math.ceil(steps * training.save_steps)
    every = {"steps": save_steps, "epoch": steps / training.num_train_epochs, "no": math.inf}
    left = math.ceil(steps / every.get(training.save_strategy, steps))
    count = min(left, (training.save_total_limit or left) + 1)
    linked = Path(args.model_name_or_path).exists()
    sizes = {"base model": 0 if linked else model["weights"] or model["total"] * model["width"]}
    for name, number, width in (("LoRA", "trainable", 4), ("full", "total", 4)):
        sizes[name] = int(model[number] * width + count * (model[number] * (width + 8) + 2**25))
    sizes["merged"] = model["total"] * model["width"]
    free = shutil.disk_usage(next(path for path in (args.out, *args.out.absolute().parents) if path.exists())).free
    if (size := sizes["base model"] + sizes["LoRA"]) > free:
        missing.append(f"disk: base model and LoRA take {size / 1e9:.2f} GB. Make room, or take another folder (OUT)")
    said = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in sizes.items())
    return sizes, f"GB, with checkpoints ({count}): {said}; free in {args.out}: {free / 1e9:.1f}"


def time_pass(model: torch.nn.Module, ids: torch.Tensor, bf16: bool) -> float:
    """Seconds of a forward and backward pass; the first, which is slower, does not count."""
    seconds = []
    while len(seconds) < 2 or (sum(seconds[1:]) < 3 and len(seconds) < 12):
        start = time.perf_counter()
        with torch.autocast(ids.device.type, dtype=torch.bfloat16, enabled=bf16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        model.zero_grad()
        if ids.device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def measure_step(config, settings: tuple, length: float, where: str, memory: int) -> tuple[float, str]:
    """Expected seconds of a LoRA step on rows of a length, and what was measured for it: passes through the first layer
    alone and through as many as MOST_PARAMETERS allow, two at least, say what the others add.
    """
    _, model_args, args = settings
    if not hasattr(config, "num_hidden_layers"):
        fail("its config has no num_hidden_layers")
    device, whole = "cuda" if where == "gpu" else "cpu", config.num_hidden_layers
    one, two = (count_parameters(config, layers=min(layers, whole))[0] for layers in (1, 2))
    most = min(whole, max(2, 1 + (MOST_PARAMETERS - one) // max(two - one, 1)))
    size = one + (most - 1) * (two - one)
    if (needed := 6 * size + 2**30) > memory:
        fail(f"{most} layers take {needed / 2**30:.1f} GiB, there are {memory / 2**30:.1f}")
    batch, work = args.per_device_train_batch_size, math.inf if where == "gpu" else MOST_WORK / (4 * size)
    tokens = max(1, round(min(length, work)))
    rows, seconds = max(1, int(min(batch, work // tokens))), []
    for layers in (1, most) if most < whole else (whole,):
        model = build(config, layers, dtype=model_args.dtype, attn_implementation=model_args.attn_implementation)
        model = get_peft_model(model.to(device), get_peft_config(model_args)).train()
        if args.gradient_checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.randint(0, config.vocab_size, (rows, tokens), device=device)
        seconds.append(time_pass(model, ids, args.bf16))
        del model
    step = seconds[0]
    if most < whole:
        step += (whole - 1) * max(seconds[1] - seconds[0], 0) / (most - 1)
    step *= args.gradient_accumulation_steps * batch * length / (rows * tokens)
    return step, f"{most} of its {whole} layers, with random weights and {rows * tokens:,} tokens"


def spell_time(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60:,} h {minutes % 60} min"
