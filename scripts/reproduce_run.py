# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
"""Prepare the repetition of a training from its run.json alone, or compare a repetition with it.

    python reproduce_run.py out/run.json --output_dir again
    python reproduce_run.py out/run.json --compare again/lora/run.json

Reads   run.json as 02_train_lora.py and 03_train_full.py write it.
Writes  again/reproduce.yaml, a recipe with all arguments of the run, and again/reproduce.txt, what Make needs besides,
        a line each: target, base model, data set, rows to hold out, options of the download, folder of the result.
Exits   with --compare: with status 0 if losses and weights are the same to the bit, else with 1.
"""

import argparse
import json
import os
import re
import sys
from pathlib import Path

TRAININGS = {"02_train_lora.py": ("train-lora", "lora"), "03_train_full.py": ("train-full", "full")}
# What is given anew: paths, and what belongs to the machine or to one process.
NOT_REPEATED = {"model_name_or_path", "model_revision", "dataset_name", "dataset_train_split", "dataset_test_split"}
NOT_REPEATED |= {"output_dir", "memory_prediction", "restart", "resume_from_checkpoint", "hub_token"}
NOT_REPEATED |= {"run_name", "include_num_input_tokens_seen", "use_peft", "push_to_hub_token"}
NOT_REPEATED |= {"deepspeed", "fsdp_config", "accelerator_config"}


def fail(message: str) -> None:
    """Ends with an error; a token in it is not shown: libraries quote headers, where it may stand in another form."""
    token = os.environ.get("HF_TOKEN", "").strip() or "hf_..."
    sys.exit("error: " + re.sub(r"\bhf_[A-Za-z0-9]{16,}\S*", "<HF_TOKEN>", message.replace(token, "<HF_TOKEN>")))


def read_training(file: Path) -> dict:
    try:
        run = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError, ValueError):
        fail(f"no run at {file}. Type: make reproduce RUN=outputs/lora/run.json OUT=outputs/again")
    if not isinstance(run, dict) or run.get("script") not in TRAININGS or "history" not in run:
        fail(f"{file} is not the record of a training. Give that of 02_train_lora.py or 03_train_full.py.")
    return run


def find_source(kind: str, source: dict) -> tuple[str, str]:
    """What to give 01_download.py for a model or a data set: its name, and the option that pins its revision."""
    if "package" in source:
        return "embedded", ""
    if revision := source.get("revision"):
        if not (re.fullmatch(r"[\w.-]+/[\w.-]+", source["name"]) and re.fullmatch(r"[\w.-]+", revision)):
            fail(f"the {kind} of the run, {source['name']!r} at {revision!r}, is no name on the Hub.")
        return source["name"], f"--{kind}_revision {revision}"
    if not Path(source["name"]).exists():
        fail(
            f"the {kind} of the run, {source['name']!r}, is not here. Type the command where it was, or bring it back."
        )
    return source["name"], ""


def list_losses(run: dict) -> list[tuple]:
    """Step and loss of each log, and the mean loss."""
    losses = [(entry["step"], entry["loss"]) for entry in run["history"] if "loss" in entry]
    return [*losses, ("mean", run["metrics"]["train_loss"])]


def say_what_is_the_same(run: dict, again: dict) -> int:
    """Says what is the same in two runs; returns the exit status."""
    for what, one, other in (
        ("model", run["base_model"], again["base_model"]),
        ("rows (sha256)", run["dataset"]["sha256"], again["dataset"]["sha256"]),
        ("packages", run["packages"], again["packages"]),
        ("accelerator", run["accelerator"], again["accelerator"]),
    ):
        print(f"{what}: {'the same' if one == other else f'{other} instead of {one}'}")
    losses, losses_again = list_losses(run), list_losses(again)
    furthest = max((abs(a[1] - b[1]) for a, b in zip(losses, losses_again, strict=False)), default=0.0)
    same_losses = losses == losses_again
    print(f"losses: {f'the same {len(losses)}' if same_losses else f'up to {furthest:.2g} apart'}")
    same_weights = run.get("sha256") is not None and run["sha256"] == again["sha256"]
    print(f"weights: {'the same to the bit' if same_weights else 'others (sha256)'}")
    print("The result is the same." if same_losses and same_weights else "The result is not the same.")
    return 0 if same_losses and same_weights else 1


def write_text(file: Path, text: str) -> None:
    """Writes the file whole or not at all, and sees that it is on the disk."""
    temporary = file.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(file)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.error = lambda message: fail(f"{message}. See --help.")
    parser.add_argument("run", type=Path, metavar="RUN", help="run.json of a training")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--output_dir", type=Path, help="folder for the repetition")
    task.add_argument("--compare", type=Path, metavar="AGAIN", help="run.json of the repetition")
    args = parser.parse_args()
    run = read_training(args.run)
    if args.compare:
        sys.exit(say_what_is_the_same(run, read_training(args.compare)))
    target, folder = TRAININGS[run["script"]]
    if args.output_dir.resolve() in args.run.resolve().parents:
        fail(f"{args.run} lies in {args.output_dir}, where the repetition would go. Add: OUT=outputs/again")
    model, model_pin = find_source("model", run["base_model"])
    origin = run["dataset"]["origin"] or {"name": run["dataset"]["name"]}
    data, data_pin = find_source("dataset", origin)
    held_out = origin.get("held_out_rows", 0)
    if not isinstance(held_out, int) or "\n" in f"{model}{data}":  # each is to be a line
        fail(f"{args.run} is not the record of a training: {held_out!r} held-out rows of {data!r}, {model!r}.")
    if run["arguments"].get("trust_remote_code"):
        fail("the run executed code that came with its model. A record alone is no reason: type its command yourself.")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    arguments = {
        key: value
        for key, value in run["arguments"].items()
        if key not in NOT_REPEATED and value != f"<{key.upper()}>"  # which hides what ends in token
    }
    # JSON is YAML too.
    write_text(args.output_dir / "reproduce.yaml", json.dumps(arguments, indent=2) + "\n")
    lines = (target, model, data, held_out, f"{model_pin} {data_pin}".strip(), folder)
    write_text(args.output_dir / "reproduce.txt", "".join(f"{line}\n" for line in lines))
    print(f"{target} again, {model} on {data}, in {args.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except OSError as error:  # a full disk, a folder that cannot be written
        fail(f"{error}. Mend that, and type the same command again.")
