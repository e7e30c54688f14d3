"""Take what people bring, forms of data and architectures, through all steps as they would, and print what came of it.

    python bring_your_own.py --output_dir out [--only alpaca mamba] [--jobs 2]

Calls for each case of brought.py, with a recipe of three steps,

    make download audit train-lora merge infer evaluate BASE_MODEL=... DATASET=... OUT=...

Writes  out/table.md, out/table.json, and out/logs/ with what make printed.
Exits   with status 1 where a case FAILED: it ended in a traceback, or in a message that names nothing to do; it was
        taken or refused against what is expected; or its rows are not those of the files.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from brought import FORMS, KINDS, MODELS, PLAIN, Case, encode, save_model, write_data

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("download", "audit", "train-lora", "merge", "infer", "evaluate")
RECIPE = {"max_steps": 3, "logging_steps": 1, "max_length": 128, "learning_rate": 0.01, "optim": "adamw_torch"}
COLUMNS = ("case", "made of", "outcome", "how it was read, or what was said", "seconds")


# Judging --------------------------------------------------------------------------------------------------------------
# What a sentence that says what to do begins with.
VERBS = "type give add mend leave take put make rename name keep save set remove convert choose install check train use"
NEXT = rf"(?i)(?:^|[.:;,] (?:or )?)(?:{VERBS.replace(' ', '|')})\b"
UNFORESEEN = "TRACEBACK=1"  # what the runner ends with where it knows no advice


def find_message(output: str) -> str:
    """The refusal in what make printed, in one line."""
    found = re.search(r"(?ms)^(?:error: |Makefile:\d+: \*\*\* )(.*?)(?=^make\b.*\*\*\*|\Z)", output)
    return " ".join(found[1].split()) if found else ""


def judge(case: Case, status: int, output: str, left: dict) -> tuple[str, str]:
    """ok, refused, or FAILED; and how the rows were read, the refusal, or what is wrong. left: what is in OUT."""
    message, said = find_message(output), f"it does not say {case.says!r}"
    if "Traceback (most recent call last)" in output:
        return "FAILED", f"a traceback: {output.strip().splitlines()[-1]}"
    if status not in (0, 2):
        return "FAILED", f"make ended with status {status}"
    if status and (not re.search(NEXT, message) or UNFORESEEN in message):
        return "FAILED", f"it names nothing to do: {message or output.strip()[-200:]}"
    if bool(status) != case.refused:
        return "FAILED", f"refused: {message}" if status else "taken, and should be refused"
    if not re.search(case.says, message if status else output):
        return "FAILED", f"{said}: {message}" if status else said
    if status:
        return "refused", message
    counts = (left["rows"] - left["held_out"], left["held_out"])
    if counts != (case.rows - case.held_out, case.held_out):
        return "FAILED", f"{counts[0]} rows and {counts[1]} held out, of {case.rows} with {case.held_out}"
    if missing := [word for word in case.words if word not in left["text"]]:
        return "FAILED", f"{len(missing)} texts are not in the rows: {missing[0]}"
    if not left["losses"] or not all(map(math.isfinite, left["losses"])):
        return "FAILED", f"held-out losses {left['losses']}"
    notes = re.findall(r"(?im)^((?:read|left out|held out|note|warning(?!: the loss)|all-linear).*)", output)
    return "ok", ". ".join(dict.fromkeys(note.strip().rstrip(".") for note in notes))


def look_at(out: Path) -> dict:
    """What the steps left: rows, their text as it is read, and the held-out loss of base, adapter and merged model."""
    files = [out / "dataset" / f"{split}.jsonl" for split in ("train", "validation")]
    lines = [file.read_text(encoding="utf-8").splitlines() if file.is_file() else [] for file in files]
    text = json.dumps([json.loads(line) for part in lines for line in part], ensure_ascii=False).replace('\\"', '"')
    report = out / "report/evaluation.json"
    models = json.loads(report.read_text(encoding="utf-8"))["models"] if report.is_file() else []
    losses = [model["loss"] for model in models]
    return {"rows": sum(map(len, lines)), "held_out": len(lines[1]), "text": text, "losses": losses}


# Running --------------------------------------------------------------------------------------------------------------
def make(out: Path, targets: list[str], log: Path, **variables) -> tuple[int, str]:
    """Status and output of make, as a user types it."""
    own = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"}  # of the make that may have called this
    environment = {key: value for key, value in os.environ.items() if key not in own}
    given = [f"{key}={value}" for key, value in (variables | {"OUT": out}).items()]
    command = ["make", "--no-print-directory", "-C", str(ROOT), *targets, *given]
    with log.open("w+", encoding="utf-8") as file:
        status = subprocess.run(command, env=environment, stdout=file, stderr=file, stdin=subprocess.DEVNULL).returncode
        file.seek(0)
        return status, file.read().replace("\r", "\n")


def try_case(number: int, name: str, case: Case, folder: Path, logs: Path) -> dict:
    """Takes one case through the steps. The base model and the rows that most cases share are there already."""
    begin, log = time.perf_counter(), logs / f"{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}.log"
    base, data, own = folder / "base", folder / "rows.jsonl", folder / str(number)  # names say nothing of the case
    out, recipe = own / "out", own / "few.yaml"
    shutil.copytree(folder / "first", out, symlinks=True)
    recipe.write_text(json.dumps(RECIPE | case.recipe))  # which is YAML too
    if case.model or case.change:
        base = own / "base"
        save_model(base, *(case.model or KINDS["Llama"]))
        if case.change:
            case.change(base)
    if case.files:
        data = write_data(case, own / "data")
    given = {"BASE_MODEL": base, "DATASET": data, "RECIPE": recipe, "VALIDATION_ROWS": 4, "PROMPT": "What is LoRA?"}
    status, output = make(out, TARGETS, log, **(given | case.variables))
    outcome, what = judge(case, status, output, look_at(out))
    what = what.replace(f"{own}/", "").replace(f"{folder}/", "")
    kind = json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"]
    made_of = kind if name in MODELS else "a folder" if callable(case.files) else ", ".join([*case.files][:3])
    shutil.rmtree(own)
    made_of += "".join(f" {key}={value}" for key, value in case.variables.items())
    print(f"{outcome:8}{name}: {what}", file=sys.stderr, flush=True)
    return dict(zip(COLUMNS, (name, made_of, outcome, what, round(time.perf_counter() - begin)), strict=True))


def format_table(done: list[dict]) -> str:
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for each in done:
        cells = [" ".join(str(value).replace("|", "\\|").replace("<", "&lt;").split()) for value in each.values()]
        lines.append([cell if len(cell) <= 240 else f"{cell[:240]}…" for cell in cells])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bench/own"), help="folder for table and logs")
    parser.add_argument("--only", nargs="+", default=[""], help="cases with one of these words in their name")
    parser.add_argument("--jobs", type=int, default=1, help="cases at a time (default: 1)")
    args = parser.parse_args()
    cases = {name: case for name, case in (FORMS | MODELS).items() if any(w.lower() in name.lower() for w in args.only)}
    if not cases:
        names = ", ".join(FORMS | MODELS)
        sys.exit(f"error: no case has {' or '.join(args.only)} in its name. Take words of these: {names}")
    done, logs = [], args.output_dir.absolute() / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="brought-") as temporary, ThreadPoolExecutor(args.jobs) as pool:
        folder = Path(temporary)
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        save_model(folder / "base", *KINDS["Llama"])
        (folder / "rows.jsonl").write_bytes(encode("rows.jsonl", PLAIN))
        first = {"BASE_MODEL": folder / "base", "DATASET": folder / "rows.jsonl", "VALIDATION_ROWS": 4}
        status, output = make(folder / "first", ["download"], logs / "first.log", **first)
        if status:
            sys.exit(f"error: make download fails, as {logs / 'first.log'} has it: {find_message(output)}")
        for each in pool.map(lambda each: try_case(each[0], *each[1], folder, logs), enumerate(cases.items())):
            done.append(each)
            (args.output_dir / "table.md").write_text(format_table(done), encoding="utf-8")
            (args.output_dir / "table.json").write_text(json.dumps(done, indent=1), encoding="utf-8")
    outcomes = [each["outcome"] for each in done]
    print(format_table(done) + ", ".join(f"{outcomes.count(kind)} {kind}" for kind in ("ok", "refused", "FAILED")))
    sys.exit(1 if "FAILED" in outcomes else 0)


if __name__ == "__main__":
    main()
