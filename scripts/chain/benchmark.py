"""Set base and trained models side by side in benchmarks, by EleutherAI's lm-eval.

    python benchmark.py --base_model MODEL --models out/lora/adapter --probe probe.json --tasks heldout,arc_easy

Reads   models as 05_generate.py does; for the task heldout probe.json of probe.py, with the held-out rows, and no hub;
        other tasks by the names of lm-eval (lm_eval ls tasks), whose data comes from a hub, or a FILE.yaml of yours.
Writes  benchmark.json and benchmark.md: each metric of each task, with the distance from the base model.
"""

import argparse
import re
import sys
from itertools import groupby
from pathlib import Path

from folders import fail, make_parser, read_json, write_json, write_text
from records import load_script


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--base_model", default="outputs/base-model", help="hub id or folder of the model before training")
    add("--models", nargs="+", default=[], help="folders of adapters or trained models to set beside it")
    add("--probe", type=Path, help="probe.json with the rows of the task heldout")
    add(
        "--tasks", default="heldout", help="heldout, names of lm-eval's tasks, files of tasks: with commas between them"
    )
    add("--limit", type=float, help="rows of each task, or a share of them below 1: for a try, not for a result")
    add("--num_fewshot", type=int, help="solved examples before each question (default: as the task has it)")
    add("--batch_size", type=int, default=8, help="rows at once (default: 8)")
    add("--apply_chat_template", action="store_true", help="ask the tasks of lm-eval as a chat; its default is not to")
    add("--dtype", help="type of the weights (default: that of 05_generate.py)")
    add("--output_dir", type=Path, default=Path("report"), help="folder for benchmark.json and benchmark.md")
    return parser.parse_args()


if __name__ == "__main__":
    read_arguments()  # before the imports that take seconds: for --help, and for what is wrong in the options

generation = load_script("05_generate.py")
sys.path.remove(str(Path(__file__).resolve().parent))  # where evaluate.py is not the package that lm-eval imports

import lm_eval
import torch
from datasets import Dataset
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer


def list_answers(rows: list[dict], tokenizer) -> list[dict]:
    """What is learned of each held-out row, behind the text before it; several where it has several answers.

    The first token of a row, which nothing stands before, has no loss. tokens: how many are learned. White space that
    ends a context lm-eval takes for a part of the answer: its likelihood counts, without being counted as a token.
    """
    found = []
    for row in rows:
        ids, labels = row["input_ids"], [-100, *row["labels"][1:]]
        for learned, group in groupby(enumerate(labels), lambda pair: pair[1] != -100):
            if learned:
                places = [place for place, _ in group]
                start, end = places[0], places[-1] + 1
                context, whole = tokenizer.decode(ids[:start]), tokenizer.decode(ids[:end])
                answer = whole[len(context) :]  # with the space that may stand between them
                found.append({"context": context, "answer": answer, "tokens": end - start})
    return found


def mean_loss(items: list[tuple[float, int]]) -> float:
    """Nats per token, of (log-likelihood, tokens) of each answer."""
    return -sum(likelihood for likelihood, _ in items) / sum(tokens for _, tokens in items)


def score(answer: dict, results: list[tuple[float, bool]]) -> dict:
    """Metrics of an answer, from its log-likelihood and whether each of its tokens is the likeliest."""
    ((likelihood, greedy),) = results
    return {"loss": (likelihood, answer["tokens"]), "acc": float(greedy)}


def make_task(answers: list[dict]) -> dict:
    """The task heldout, as lm-eval takes a task."""
    return {
        "task": "heldout",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(answers)},
        "test_split": "test",
        "output_type": "loglikelihood",
        "doc_to_text": lambda answer: answer["context"],
        "doc_to_target": lambda answer: answer["answer"],
        "target_delimiter": "",
        "process_results": score,
        "metric_list": [
            {"metric": "loss", "aggregation": mean_loss, "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def find_tasks(names: list[str]) -> tuple[TaskManager, list[str]]:
    """lm-eval's tasks and those of files, with their data; stops where one cannot be had, before a model is loaded."""
    files = [Path(name) for name in names if name.endswith((".yaml", ".yml"))]
    if missing := [file for file in files if not file.is_file()]:
        fail(f"there is no {missing[0]}. Give a task of lm-eval, or a file of your own.")
    manager = TaskManager(include_path=[str(file.parent) for file in files] or None)
    found = []
    for name in names:
        if Path(name) in files:
            name = re.search(r"^task:\s*(\S+)", Path(name).read_text(encoding="utf-8"), re.MULTILINE)[1].strip("'\"")
        elif name not in manager.all_tasks:
            fail(f"lm-eval has no task {name!r}. Its tasks: {Path(sys.executable).parent}/lm_eval ls tasks")
        found.append(name)
    try:
        manager.load(found)
    except Exception as error:  # no network, no such data, code that it would run
        reason = " ".join(str(error).split())[:300]
        fail(f"the data of {', '.join(found)} is not to be had: {reason}. Without a hub: make benchmark TASKS=heldout")
    return manager, found


def measure(path: str, base: str, args: argparse.Namespace, answers: list[dict], manager, tasks: list[str]) -> dict:
    """Metrics of a model: {task: {metric: [value, standard error or None, whether higher is better, samples]}}."""
    adapter_base = base if path != base else None
    dtype, merge = args.dtype or generation.DTYPE, torch.accelerator.is_available()
    model, tokenizer = generation.load_model(path, adapter_base, dtype, merge)
    found = {}
    for which in ([make_task(answers)] if answers else [], tasks):
        if not which:
            continue
        # The rows of heldout have their BOS in the text; for the others it is as the tokenizer has it.
        bos = {"add_bos_token": False} if which is not tasks else {}
        engine = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=args.batch_size, **bos)
        options = {"num_fewshot": args.num_fewshot, "apply_chat_template": args.apply_chat_template}
        report = lm_eval.simple_evaluate(
            engine,
            tasks=which,
            limit=args.limit,
            task_manager=manager,
            log_samples=False,
            **(options if which is tasks else {}),
        )
        for task, metrics in report["results"].items():
            for key, value in metrics.items():
                name, _, how = key.partition(",")
                if not how or name.endswith("_stderr") or not isinstance(value, float | int):
                    continue
                error = metrics.get(f"{name}_stderr,{how}")
                higher = report["higher_is_better"].get(task, {}).get(name)
                samples = report["n-samples"].get(task, {}).get("effective")
                label = name if how == "none" else f"{name} ({how})"
                found.setdefault(task, {})[label] = [
                    value,
                    error if isinstance(error, float) else None,
                    higher,
                    samples,
                ]
    return found


def name_model(path: str) -> str:
    """lora of out/lora/adapter, full of out/full/model."""
    folder = Path(path).resolve()
    return folder.parent.name if folder.name in ("adapter", "model") else path


def format_report(report: dict) -> str:
    """The report as Markdown: a line for each metric, a column for each model, with the distance from the first."""
    base, *others = report["models"]
    lines = ["# Benchmark", "", f"| task | metric | rows | {' | '.join([base, *others])} |"]
    lines.append("| --- | --- | --- |" + " --- |" * len(report["models"]))
    for task, metrics in report["models"][base].items():
        for metric, (value, error, higher, samples) in metrics.items():
            cells = [f"{value:.4f}" + (f" ± {error:.4f}" if error is not None else "")]
            for model in others:
                other, error, *_ = report["models"][model][task][metric]
                spread = f" ± {error:.4f}" if error is not None else ""
                cells.append(f"{other:.4f}{spread} ({other - value:+.4f})")
            arrow = {True: " ↑", False: " ↓", None: ""}[higher]
            lines.append(f"| {task} | {metric}{arrow} | {samples or ''} | {' | '.join(cells)} |")
    lines += ["", *report["notes"]]
    return "\n".join(lines) + "\n"


def main() -> None:
    args = read_arguments()
    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    probe = read_json(args.probe) if args.probe else {"rows": []}
    if "heldout" in names and not probe["rows"]:
        fail("there are no held-out rows for the task heldout. Train with VALIDATION_ROWS=10, or name other TASKS.")
    others = [name for name in names if name != "heldout"]
    manager, tasks = find_tasks(others) if others else (TaskManager(include_defaults=False), [])
    settings = {"limit": args.limit, "num_fewshot": args.num_fewshot, "apply_chat_template": args.apply_chat_template}
    report = {"lm_eval": lm_eval.__version__, **settings, "models": {}, "notes": []}
    said = ", ".join(f"{name} {value}" for name, value in settings.items() if value not in (None, False))
    report["notes"].append(
        f"lm-eval {lm_eval.__version__}{', ' + said if said else ''}. In brackets: minus the base model."
    )
    answers = []
    if "heldout" in names:
        answers = list_answers(probe["rows"], AutoTokenizer.from_pretrained(probe["model"]))
        tokens, by_evaluate = sum(answer["tokens"] for answer in answers), f"{probe['loss']:.4f} over {probe['tokens']}"
        report["notes"].append(f"heldout: {len(answers)} answers, {tokens} tokens, in nats per token. ")
        report["notes"][-1] += f"make evaluate measures {name_model(probe['model'])} with {by_evaluate}."
    for path in [args.base_model, *args.models]:
        name = "base" if path == args.base_model else name_model(path)
        report["models"][name] = measure(path, args.base_model, args, answers, manager, tasks)
        write_json(args.output_dir / "benchmark.json", report)
    write_text(args.output_dir / "benchmark.md", format_report(report))
    print(format_report(report))


if __name__ == "__main__":
    main()
