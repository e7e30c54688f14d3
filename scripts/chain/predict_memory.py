"""Predict the peak memory of a training: whether it fits, and what would.

    python predict_memory.py --model MODEL [--memory 192]      a table: LoRA, QLoRA and full fine-tuning, by part
    python predict_memory.py --model MODEL --method lora -- --max_length 512 --lora_r 16       one training

MODEL is a folder or a hub id. After -- stand options of the training scripts, --config FILE.yaml among them.
Writes  a JSON report to --output, if given and if the one training fits.
Exits   with status 0: it fits, 3: the one training does not, 1: another error; bitsandbytes, where it needs it, fails.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

import yaml
from folders import fail, make_parser, read_json, write_json
from memory import METHODS, QLORA, SETTINGS, count_weights, describe_optimizer, fits, predict_memory, unknown_to
from records import load_script

doctor = load_script("00_check_gpu.py")


def read_settings(options: list[str], base: dict) -> tuple[dict, list[str]]:
    """SETTINGS as a training script would read them: base, then --config, then the options. And the other options."""
    parser = argparse.ArgumentParser(allow_abbrev=False, add_help=False, exit_on_error=False)
    parser.argument_default = argparse.SUPPRESS
    parser.add_argument("--config", type=Path)
    for name, default in SETTINGS.items():
        names = (f"--{name}", f"--{name.replace('_', '-')}")
        if isinstance(default, bool):
            parser.add_argument(*names, nargs="?", const=True, type=lambda text: text.lower() in ("true", "1", "yes"))
            parser.add_argument(f"--no_{name}", action="store_false", dest=name)
        elif isinstance(default, list):
            parser.add_argument(*names, nargs="+")
        else:
            parser.add_argument(*names, type=type(default))
    given, others = parser.parse_known_args(options)
    given, settings = vars(given), SETTINGS | base
    if file := given.pop("config", None):
        recipe = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        settings |= {name: value for name, value in recipe.items() if name in SETTINGS and value is not None}
        if isinstance(settings["lora_target_modules"], str):
            settings["lora_target_modules"] = [settings["lora_target_modules"]]
    return settings | given, others


def check_settings(method: str, settings: dict) -> None:
    """Raises a ValueError for what no training can have."""
    if settings["dtype"] not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"--dtype {settings['dtype']} is none of float32, bfloat16, float16")
    if settings["per_device_train_batch_size"] < 1 or settings["max_length"] < 1 or settings["lora_r"] < 1:
        raise ValueError("--per_device_train_batch_size, --max_length and --lora_r are at least 1")
    if method == "full" and (settings["load_in_4bit"] or settings["load_in_8bit"]):
        raise ValueError("quantized weights are not trained in full")


def find_memory(torch: dict | None, root: Path) -> tuple[str, str, int]:
    """Where a training would run (cpu or gpu), its name, and the bytes of memory there."""
    if torch and torch["available"]:
        doctor.share_memory(torch, root)
        return "gpu", torch["gpus"][0]["name"], torch["gpus"][0]["free_bytes"]
    available = doctor.find(r"(?<=MemAvailable:)\s+\d+", doctor.read(root / "proc/meminfo"))
    memory = int(available) * 1024 if available else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = doctor.read(root / "sys/fs/cgroup/memory.max")
    return "cpu", "the CPU", min(memory, int(limit)) if limit.isdigit() else memory


def read_config(model: str, timeout: float) -> dict:
    """The config of a hub id or a folder."""
    if Path(model, "config.json").is_file():
        return read_json(Path(model, "config.json"))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", model) or Path(model).parent.exists():
        fail(f"no model at {model!r}. Give a hub id (user/name) or a folder with a config.json.")
    answer = doctor.run_probe("hub", timeout, model)
    if answer["status"] != "passed":
        mend = "Type: make setup" if "ModuleNotFoundError" in answer["error"] else "See to the network and the access"
        fail(f"cannot read the config of {model}: {answer['error']}. {mend}, or give a folder with a config.json.")
    return answer["facts"]["config"]


def list_savings(config: dict, method: str, settings: dict, tokens: int, where: str) -> dict[str, int]:
    """Options that save memory, those that cost least first, and the peak with each."""
    chunks, recompute = {"token_metrics": True}, {"gradient_checkpointing": True}
    whole = [recompute]  # the batch stays
    if where == "gpu" and not settings["token_metrics"]:  # on the CPU chunks take more
        whole = [chunks, recompute, chunks | recompute]
    batches = [settings["per_device_train_batch_size"] // 2**power for power in range(1, 20)]
    smaller = [{"per_device_train_batch_size": batch} for batch in batches if batch]
    changes = [*whole, *smaller, *(recompute | change for change in smaller)]
    if method == "lora":
        changes += [recompute | change | {"dtype": "bfloat16"} for change in smaller[-1:]]
    sizes = {}
    for change in changes:
        options = " ".join(f"--{name} {str(value).lower()}" for name, value in change.items())
        sizes[options] = predict_memory(config, method, settings | change, tokens, where)["peak"]
    return sizes


def judge_memory(prediction: dict, config: dict, where: str, name: str, memory: int) -> tuple[str, str] | None:
    """The cause, if a training does not fit, and what does."""
    if prediction["fits"]:
        return None
    method, settings, tokens = prediction["method"], prediction["settings"], prediction["tokens"]
    cause = f"{method} needs {prediction['bytes']['peak'] / 2**30:.1f} GiB, there are {memory / 2**30:.1f} ({name})"
    force = "(all the same: FORCE=1 with Make, --force here)"
    for options, peak in list_savings(config, method, settings, tokens, where).items():
        if fits(peak, where, memory):
            return cause, f"add the option {options}   {force}"
    if fits(predict_memory(config, "lora", settings | QLORA, tokens, where)["peak"], where, memory):
        return cause, f"make train-lora RECIPE=qlora   {force}"
    return f"{cause}, whatever the batch", f"take a smaller model   {force}"


def judge_needs(settings: dict, timeout: float) -> tuple[str, str] | None:
    """The cause, if bitsandbytes does not work in what a training takes from it, and what mends it."""
    quantized = settings["load_in_4bit"] or settings["load_in_8bit"]
    optimizer = describe_optimizer(settings["optim"])[1]
    probes = ["bitsandbytes"] * bool(quantized or optimizer) + ["optimizer"] * optimizer
    probes += ["quantize", "decode_4bit"] * settings["load_in_4bit"]
    for probe in probes:
        answer = doctor.run_probe(probe, timeout)
        if answer["status"] != "passed":
            what = "quantized weights need" if quantized else f"{settings['optim']} needs"
            mend = "make bitsandbytes" + ("" if quantized else "   (or add to ARGS: --optim adamw_torch_fused)")
            return f"{what} bitsandbytes, {probe}: {answer['error']}", mend
    return None


def advise_optimizer(prediction: dict, config: dict, torch: dict | None, memory: int) -> str:
    """What to take for an optimizer whose paged state stays in the memory of the host, as on AMD without XNACK."""
    settings, state = prediction["settings"], prediction["bytes"]["optimizer"]
    if prediction["method"] != "full" or not settings["optim"].startswith("paged") or not (torch or {}).get("hip"):
        return ""
    fused = settings | {"optim": "adamw_torch_fused"}
    peak = predict_memory(config, "full", fused, prediction["tokens"], "gpu")["peak"]
    verdict = "which fits" if fits(peak, "gpu", memory) else "which does not fit"
    said = (
        f"{settings['optim']}: {state / 2**30:.1f} GiB of state, which AMD's driver may leave in the memory of the host"
    )
    return f"{said} and move over PCIe at each step. On the accelerator, {verdict}: --optim adamw_torch_fused"


def read_training(args: argparse.Namespace, config: dict) -> tuple[str, dict, int]:
    """Method, settings and the tokens of the longest row of the one training; names the options that do not count."""
    method = args.method.removeprefix("q")
    try:
        settings, others = read_settings(args.options, QLORA if args.method == "qlora" else {})
        if settings["dtype"] == "auto":  # the checkpoint's own
            settings["dtype"] = config.get("dtype") or config.get("torch_dtype") or "float32"
        check_settings(method, settings)
        tokens = settings["max_length"]
        if args.audit and not settings["packing"]:
            tokens = min(tokens, json.loads(args.audit.read_text(encoding="utf-8"))["longest_row"])
    except Exception as error:  # of a file, of YAML, of a value
        given = " ".join(map(str, [*args.options, args.audit or ""]))
        fail(f"cannot read the options of the training: {' '.join(str(error).split())}. Mend {given}")
    if others:
        print(f"Options that do not count for the memory: {' '.join(others)}")
    return method, settings, tokens


def predict(config: dict, method: str, settings: dict, tokens: int, where: str, memory: int) -> dict:
    """The bytes of a training, by part, and whether they fit."""
    sizes = predict_memory(config, method, settings, tokens, where)
    fit = fits(sizes["peak"], where, memory)
    return {"method": method, "tokens": tokens, "settings": settings, "bytes": sizes, "fits": fit}


def predict_all(trainings: list[tuple], config: dict, where: str, memory: int) -> list[dict]:
    """A prediction for each training, in a table."""
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "overhead", "peak")
    print(f"{'':26}{'batch':>6}{'length':>7}" + "".join(f"{part:>12}" for part in parts))
    predictions = []
    for label, method, settings, tokens in trainings:
        each = predict(config, method, settings, tokens, where, memory)
        line = f"{label:26}{settings['per_device_train_batch_size']:6}{tokens:7}"
        line += "".join(f"{each['bytes'][part] / 2**30:12.2f}" for part in parts)
        print(f"{line}  {'fits' if each['fits'] else 'does not fit'}")
        predictions.append(each | {"method": label if label in METHODS else method})
    margin = "a fifth of it, by which it may be off" if where == "cpu" else "1 GiB for the driver and 5 % for gaps"
    print(f"What fits: the peak and {margin}.")
    return predictions


def main() -> None:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model", required=True, help="hub id or folder")
    add("--memory", type=float, metavar="GIB", help="memory of an accelerator that is not here; MI300X 192, H100 80")
    add("--method", choices=["lora", "qlora", "full"], help="this one training, with its options after --")
    add("--batch", type=int, nargs="+", default=[1, 4], help="rows in a batch, of the table (default: 1 4)")
    add("--length", type=int, nargs="+", default=[512, 1024, 2048], help="tokens of the longest row, of the table")
    add("--audit", type=Path, metavar="FILE", help="report of audit_tokens.py: the longest row is taken from there")
    add("--force", action="store_true", help="with --method: exit with 0 all the same")
    add("--timeout", type=float, default=120, help="seconds that a probe may take (default: 120)")
    add("--root", type=Path, default=Path("/"), help="folder of another system's files")
    add("--output", type=Path, help="file for the report, JSON")
    add("options", nargs="*", help="after --: options of the training")
    args = parser.parse_args()
    if args.options and not args.method:
        fail("options of a training stand after -- only with --method. See --help.")
    if args.memory is not None and args.memory <= 0:
        fail("--memory is in GiB, above 0. See --help.")

    config = read_config(args.model, args.timeout)
    if args.method:
        method, settings, tokens = read_training(args, config)
        trainings = [(args.method, method, settings, tokens)]
    else:
        trainings = [
            (label, method, SETTINGS | base | {"per_device_train_batch_size": batch}, tokens)
            for label, (method, base) in METHODS.items()
            for batch in args.batch
            for tokens in args.length
        ]
    torch = None if args.memory else doctor.run_probe("torch", args.timeout).get("facts")
    if args.memory:
        where, name, memory = "gpu", f"{args.memory:g} GiB", int(args.memory * 2**30)
    else:
        where, name, memory = find_memory(torch, args.root)
    predictions, findings = [], []
    if reason := unknown_to(config, trainings[0][2]["lora_target_modules"]):
        print(f"No prediction of the memory for {args.model}: {reason}. The formulas are for Llama-like decoders.")
    else:
        print(f"{args.model}: {count_weights(config, [], 0)['total']:,} parameters. GiB, {name}: {memory / 2**30:.1f}")
        predictions = predict_all(trainings, config, where, memory)
        if args.method and (advice := advise_optimizer(predictions[0], config, torch, memory)):
            print(advice)
    if args.method:
        findings = [judge_memory(each, config, where, name, memory) for each in predictions]
        findings = list(filter(None, [*findings, judge_needs(settings, args.timeout)]))
    for cause, command in findings:
        print(f"error: {cause}\n    type: {command}", file=sys.stderr)
    if args.output and (not findings or args.force):
        report = {"model": args.model, "memory_bytes": memory, "where": where, "predictions": predictions}
        if args.method and predictions:  # for whom the memory runs out all the same
            savings, most = list_savings(config, method, settings, tokens, where), predictions[0]["bytes"]["peak"]
            report["smaller"] = [{"options": each, "bytes": peak} for each, peak in savings.items() if peak < most]
        write_json(args.output, report)
    if findings and not args.force:
        sys.exit(1 if all(each["fits"] for each in predictions) else 3)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
