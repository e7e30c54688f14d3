"""Set base and trained models side by side in benchmarks, by EleutherAI's lm-eval.

    python benchmark.py --base_model MODEL --models out/lora/adapter --probe probe.json --tasks heldout,arc_easy

Reads   MODEL (hub id or folder), adapters or full models, as 05_generate.py does; for the task heldout the held-out
        rows of probe.json, without a network. Other tasks: names of lm-eval, with rows from the Hub, or TASK.yaml.
Writes  report/benchmark.md and report/benchmark.json: each metric of each task, with its distance from the base model.

Python needs lm-eval (env/requirements-benchmark.txt), which loads nothing here: model and tokenizer are given to it.
"""

import argparse
import gc
import sys
from itertools import groupby
from pathlib import Path

from folders import fail, make_parser, read_json, write_json, write_text
from records import load_script

HELDOUT = "heldout"
LIST = f"{Path(sys.executable).with_name('lm_eval')} ls tasks"


def above_zero(text: str) -> float:
    """A number above 0: a whole one, or a share below 1."""
    if (number := float(text)) <= 0 or number > 1 and number % 1:
        raise ValueError(text)
    return number


def read_arguments() -> argparse.Namespace:
    parser = make_parser(__doc__)
    add = parser.add_argument
    add("--base_model", default="meta-llama/Llama-2-7b-chat-hf", help="hub id or folder of the model before training")
    add("--models", nargs="+", default=[], help="folders of adapters or trained models to set beside it")
    add("--probe", type=Path, help="probe.json with the rows of the task heldout")
    add("--tasks", default=HELDOUT, help="heldout, names of lm-eval, or files of tasks, with commas between them")
    add("--limit", type=above_zero, help="so many rows of each task, or that share: for a trial, not for a result")
    add("--num_fewshot", type=int, help="solved examples before each question (default: as the task says)")
    add("--batch_size", type=int, default=8, help="questions at once (default: 8)")
    add("--apply_chat_template", action="store_true", help="ask as a chat (default: plain text, as lm-eval does)")
    add("--dtype", help="type of the weights, as make infer has it (default: that of 05_generate.py)")
    add("--output_dir", type=Path, default=Path("report"), help="folder for benchmark.md and benchmark.json")
    return parser.parse_args()


if __name__ == "__main__":
    read_arguments()  # before the imports that take seconds: for --help, and for what is wrong in the options

generation = load_script("05_generate.py")

import torch


# The task heldout -----------------------------------------------------------------------------------------------------
def list_answers(rows: list[dict]) -> list[dict]:
    """Each stretch of tokens with loss, after all that stands before it. The first token of a row follows on nothing:
    neither the training nor evaluate.py counts it."""
    answers = []
    for row in rows:
        ids, labels = row["input_ids"], [-100, *row["labels"][1:]]
        for learned, stretch in groupby(enumerate(labels), lambda pair: pair[1] != -100):
            if learned:
                places = [place for place, _ in stretch]
                end = places[-1] + 1
                answers.append({"context": ids[: places[0]], "answer": ids[places[0] : end]})
    return answers


def score(answer: dict, results: list[tuple[float, bool]]) -> dict:
    """What lm-eval found out about an answer: its likelihood, and whether all its tokens are the likeliest."""
    ((likelihood, greedy),) = results
    return {"loss": (likelihood, len(answer["answer"])), "acc": float(greedy)}


def mean_loss(items: list[tuple[float, int]]) -> float:
    """Nats per token of all answers."""
    return -sum(likelihood for likelihood, _ in items) / sum(tokens for _, tokens in items)


def describe_task(answers: list[dict]) -> dict:
    """The task heldout as lm-eval takes it. It has no texts: wrap_model gives the tokens."""
    from datasets import Dataset

    return {
        "task": HELDOUT,
        "custom_dataset": lambda **_: {"validation": Dataset.from_list(answers)},
        "validation_split": "validation",
        "output_type": "loglikelihood",
        "num_fewshot": 0,
        "doc_to_text": lambda answer: "",
        "doc_to_target": lambda answer: "",
        "process_results": score,
        "metric_list": [
            {"metric": "loss", "aggregation": mean_loss, "higher_is_better": False},
            {"metric": "acc", "aggregation": "mean", "higher_is_better": True},
        ],
    }


def wrap_model(model, tokenizer, batch_size: int):
    """A model as lm-eval takes it, with the likelihoods in float32."""
    from lm_eval.models.huggingface import HFLM

    class Model(HFLM):
        def loglikelihood(self, requests, disable_tqdm=False):
            """As tokens what is of heldout: from its text lm-eval would make others, such as of the line break that
            ends a prompt, or of a letter that --max_length cut."""
            ours = [each for each in requests if each.task_name == HELDOUT]
            others = [each for each in requests if each.task_name != HELDOUT]
            tokens = [(each.args, each.doc["context"], each.doc["answer"]) for each in ours]
            of_ours = iter(self._loglikelihood_tokens(tokens, disable_tqdm) if ours else [])
            of_others = iter(super().loglikelihood(others, disable_tqdm) if others else [])
            return [next(of_ours if each.task_name == HELDOUT else of_others) for each in requests]

    options = {"batch_size": batch_size, "softmax_dtype": "float32"}
    return Model(pretrained=model, tokenizer=tokenizer, backend="causal", **options)


# All tasks ------------------------------------------------------------------------------------------------------------
def refuse(name: str, error: Exception) -> None:
    """Ends with what only another task helps against; the runner explains the rest, such as a hub that is away."""
    said = " ".join(str(error).split())
    if "CODE_EVAL" in said or "code_eval" in said:
        fail(f"{name} runs what the model writes, which is not done here. Take another task: {LIST}")
    if "trust_remote_code" in said or "scripts are no longer supported" in said:
        fail(f"the rows of {name} come with code of their own, which is not run. Take another task: {LIST}")
    raise RuntimeError(f"{name}: {said}") from error


def find_tasks(names: list[str], answers: list[dict]) -> list:
    """Tasks and groups of tasks, with their rows; stops where one cannot be had, before a model is loaded."""
    from lm_eval.tasks import TaskManager

    own = [name for name in names if name == HELDOUT or name.endswith((".yaml", ".yml"))]
    manager, found = TaskManager(include_defaults=own != names), []  # lm-eval's thousands take seconds to look at
    for name in names:
        if name == HELDOUT:
            wanted = [describe_task(answers)]
        elif name in own:
            wanted = [name] if Path(name).is_file() else []
        else:
            wanted = manager.match_tasks([name])
        if not wanted:
            fail(f"lm-eval has no task {name}, and there is no such file. For those it has: {LIST}")
        try:
            loaded = manager.load(wanted)
        except Exception as error:  # a hub, a data set, the task's own code
            refuse(name, error)
        tasks = loaded["tasks"].items()
        if unsafe := [task for task, each in tasks if each.get_config("unsafe_code")]:
            refuse(unsafe[0], ValueError("code_eval"))
        if seen := [task for task, each in tasks if each.get_config("doc_to_image") or each.get_config("doc_to_audio")]:
            fail(f"{seen[0]} shows pictures or sounds, and the model reads text. Take another task: {LIST}")
        inner = {child for children in loaded["group_map"].values() for child in children}
        found += [each for key, each in [*loaded["groups"].items(), *tasks] if key not in inner]
    return found


def measure(path: str, args: argparse.Namespace, tasks: list) -> dict:
    """What lm-eval says of a model: for each task its version, examples, samples, and metrics."""
    import lm_eval

    merge = torch.accelerator.is_available()  # as make infer does
    model, tokenizer = generation.load_model(path, args.base_model, args.dtype or generation.DTYPE, merge)
    if args.apply_chat_template and not tokenizer.chat_template:
        fail(f"{path} has no chat template. Leave out --apply_chat_template.")
    asked = {name: getattr(args, name) for name in ("limit", "num_fewshot", "apply_chat_template")}
    said = lm_eval.simple_evaluate(
        wrap_model(model, tokenizer, args.batch_size), tasks=tasks, log_samples=False, **asked
    )
    results = {}
    for task, values in said["results"].items():
        metrics = {}
        for key, value in values.items():
            name, _, how = key.partition(",")  # acc,none or acc_stderr,none; others are not of a metric
            if how and not name.endswith("_stderr") and isinstance(value, int | float):
                error = values.get(f"{name}_stderr,{how}")
                metrics[name if how == "none" else f"{name} ({how})"] = {
                    "value": value,
                    "stderr": error if isinstance(error, int | float) else None,
                    "higher_is_better": said["higher_is_better"].get(task, {}).get(name),
                }
        results[task] = {
            "version": said["versions"].get(task),
            "num_fewshot": said["n-shot"].get(task),
            "samples": said["n-samples"].get(task, {}).get("effective", values.get("sample_len")),
            "metrics": metrics,
        }
    return results


# The report -----------------------------------------------------------------------------------------------------------
def name_models(base: str, paths: list[str]) -> list[str]:
    """base, and for each model the name of its step, lora of out/lora/adapter; whole paths where two have one name."""
    folders = [Path(path).resolve() for path in paths]
    names = [folder.parent.name if folder.name in ("adapter", "model") else folder.name for folder in folders]
    names = names if len({"base", *names}) > len(names) else paths
    return ["base", *names]


def format_cell(metric: dict, base: dict | None) -> str:
    """A value, its standard error where lm-eval gives one, and in brackets the distance from the base model."""
    cell = f"{metric['value']:.4f}" + ("" if metric["stderr"] is None else f" ± {metric['stderr']:.4f}")
    return cell + (f" ({metric['value'] - base['value']:+.4f})" if base else "")


def format_report(report: dict) -> str:
    """The report as Markdown: a line for each metric of each task, a column for each model."""
    base, *others = report["models"]
    columns = ["task", "metric", "samples", *(each["name"] for each in report["models"])]
    lines = ["# Benchmark", "", f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
    for task, result in base["results"].items():
        for name, metric in result["metrics"].items():
            better = {True: " ↑", False: " ↓", None: ""}[metric["higher_is_better"]]
            theirs = [format_cell(each["results"][task]["metrics"][name], metric) for each in others]
            cells = " | ".join([format_cell(metric, None), *theirs])
            lines.append(f"| {task} | {name}{better} | {result['samples']} | {cells} |")
    lines += ["", "↑ higher is better, ↓ lower is better; in brackets: minus base; ±: lm-eval's standard error.", ""]
    of_hub = {task: each for task, each in base["results"].items() if task != HELDOUT and each["metrics"]}
    versions = [f"{task} version {each['version']}, {each['num_fewshot']}-shot" for task, each in of_hub.items()]
    lines.append("; ".join([f"lm-eval {report['lm_eval']}", *versions]) + ".")
    if report["limit"]:
        lines.append(f"Only --limit {report['limit']:g} of each task was asked: no result to compare with others'.")
    if of_hub:
        asked = "as a chat (--apply_chat_template)" if report["apply_chat_template"] else "as plain text"
        lines.append(f"The questions were put {asked}.")
    if heldout := report["heldout"]:
        lines.append(
            "heldout: {answers} answers, {tokens} tokens, the same for all models: those of {model}.".format(**heldout)
        )
        lines.append("loss: nats per token; acc: answers of which each token is the likeliest.")
        for each in report["models"]:
            if each["path"] == heldout["model"] and not report["limit"]:
                distance = each["results"][HELDOUT]["metrics"]["loss"]["value"] - heldout["loss"]
                lines.append(f"make evaluate: {heldout['loss']:.4f} of {each['name']}; here it is {distance:+.4f}.")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = read_arguments()
    names = list(dict.fromkeys(name.strip() for name in args.tasks.split(",") if name.strip()))
    if not names:
        fail(f"no task is given. Type: --tasks {HELDOUT}, or a name of: {LIST}")
    answers, heldout = [], None
    if HELDOUT in names:
        probe = read_json(args.probe) if args.probe and args.probe.is_file() else {"rows": []}
        answers = list_answers(probe["rows"])
        if not answers:
            fail(f"no held-out rows for {HELDOUT}. Train with VALIDATION_ROWS=10, or give other tasks (TASKS).")
        heldout = {"answers": len(answers), "tokens": sum(len(each["answer"]) for each in answers)}
        heldout |= {"model": probe["model"], "loss": probe["loss"]}
    here = str(Path(__file__).resolve().parent)
    sys.path[:] = [path for path in sys.path if path != here]  # lm-eval's evaluate is a package, and not our script

    from lm_eval import __version__

    tasks = find_tasks(names, answers)
    settings = ("limit", "num_fewshot", "apply_chat_template", "batch_size")
    report = {"lm_eval": __version__, **{name: getattr(args, name) for name in settings}}
    report |= {"heldout": heldout, "models": []}
    paths = [args.base_model, *args.models]
    for name, path in zip(name_models(*paths[:1], paths[1:]), paths, strict=True):
        report["models"].append({"name": name, "path": path, "results": measure(path, args, tasks)})
        gc.collect()  # the model, before the next one is loaded
        write_json(args.output_dir / "benchmark.json", report)  # what was measured stays if the next one fails
        write_text(args.output_dir / "benchmark.md", format_report(report))
        print(f"{name} is measured", file=sys.stderr, flush=True)
    print(format_report(report))


if __name__ == "__main__":
    main()
