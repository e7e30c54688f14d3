"""Prepare the repetition of a training from its run.json alone, or compare a repetition with it.

    python reproduce_run.py out/lora/run.json --output_dir again
    python reproduce_run.py out/lora/run.json --compare again/lora/run.json

Reads   run.json of a training.
Writes  again/reproduce.yaml, a recipe with all arguments of the run, and again/reproduce.txt, what Make needs besides,
        a line each: target, base model, data set, rows to hold out, options of the download, folder of the result, and
        the variables that say which rows were read, and how.
Exits   with --compare: with status 0 if the result is the same, else with 1: losses and weights to the bit, or, where
        one of the two ran on an accelerator, losses within TOLERANCE.
"""

import re
import sys
from pathlib import Path

from figures import find_data, list_spans
from folders import fail, make_parser, write_json, write_text
from records import read_run

# On an accelerator kernels that add in whatever order they end, other kernels for another card, and products that are
# cut into other parts round otherwise. Seen, of a logged loss: nothing between two runs on an H100, and in 114 steps in
# float32 7.5e-4 of it between an H100 and a CPU. In bfloat16 a rounding is 4e-3 of a value.
TOLERANCE = {"float32": 2e-3, "bfloat16": 1e-2}
# Variables of Make, by what read_rows.py notes of their values.
READ = {"DATASET_CONFIG": "dataset_config", "DATASET_SPLIT": "dataset_train_split", "COLUMNS": "columns"}
READ |= {"DATASET_TEST_SPLIT": "dataset_test_split", "ROWS": "rows"}
TRAININGS = {"02_train_lora.py": ("train-lora", "lora"), "03_train_full.py": ("train-full", "full")}
# What is given anew: paths, and what belongs to the machine or to one process.
NOT_REPEATED = {"model_name_or_path", "model_revision", "dataset_name", "dataset_train_split", "dataset_test_split"}
NOT_REPEATED |= {"output_dir", "resume_from_checkpoint", "hub_token", "push_to_hub_token", "run_name"}
NOT_REPEATED |= {"deepspeed", "fsdp_config", "accelerator_config", "include_num_input_tokens_seen"}


def read_training(file: Path) -> dict:
    if not file.is_file():
        fail(f"no run at {file}. Type: make reproduce RUN=outputs/lora/run.json OUT=outputs/again")
    run = read_run(file)
    if run["script"] not in TRAININGS:
        fail(f"{file} is not of a training. Give the run.json of 02_train_lora.py or 03_train_full.py.")
    return run


def find_source(kind: str, source: dict) -> tuple[str, str]:
    """What to give 01_download.py for a model or a data set: its name, and the option that pins its revision."""
    name, revision = source["name"], source.get("revision")
    if "package" in source:
        return "embedded", ""
    if revision:
        if not (re.fullmatch(r"[\w.-]+/[\w.-]+", name) and re.fullmatch(r"[\w.-]+", revision)):
            fail(f"the {kind} of the run, {name!r} at {revision!r}, is no name on the Hub.")
        return name, f"--{kind}_revision {revision}"
    if not Path(name).exists():
        fail(f"the {kind} of the run, {name!r}, is not here. Type the command where it was, or bring it back.")
    return name, ""


def say_what_is_the_same(run: dict, again: dict) -> int:
    """Says what is the same in two runs; returns the exit status."""
    for what, one, other in (
        ("model", run["base_model"], again["base_model"]),
        ("rows (sha256)", find_data(run)["train"]["sha256"], find_data(again)["train"]["sha256"]),
        ("packages", run["packages"], again["packages"]),
        ("accelerator", run["accelerator"], again["accelerator"]),
    ):
        print(f"{what}: {'the same' if one == other else f'{other} instead of {one}'}")
    losses, losses_again = list_spans(run), list_spans(again)
    common = losses.keys() & losses_again.keys()
    apart = [abs(losses[span] - losses_again[span]) / (abs(losses[span]) or 1) for span in common]
    same_losses = bool(common) and all(each == 0 for each in apart)  # of a loss that is no number not
    print(
        f"losses: {f'the same {len(common)}' if same_losses else f'up to {max(apart, default=1):.2g} of a loss apart'}"
    )
    same_weights = run["sha256"] == again["sha256"]
    print(f"weights: {'the same to the bit' if same_weights else 'others (sha256)'}")
    same = same_losses and same_weights
    if not same and not all(str(each["accelerator"]).startswith("CPU") for each in (run, again)):
        bf16 = [bool(each["arguments"].get("bf16")) for each in (run, again)]
        precision = "bfloat16" if all(bf16) else "float32"
        # An interruption parts a span in two, which are not compared; most are there.
        enough = 2 * len(common) > len(losses) and bf16[0] == bf16[1]
        same = enough and all(each <= TOLERANCE[precision] for each in apart)
        print(
            f"On an accelerator a sum has no fixed order: in {precision} losses may be {TOLERANCE[precision]:g} apart."
        )
    print("The result is the same." if same else "The result is not the same.")
    return 0 if same else 1


def main() -> None:
    parser = make_parser(__doc__)
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
    if (args.output_dir / folder).exists():
        fail(f"{args.output_dir / folder} is there already. Take another OUT, or remove it to repeat the run again.")
    model, model_pin = find_source("model", run["base_model"])
    origin = find_data(run)
    data, data_pin = find_source("dataset", origin)
    held_out = origin.get("held_out_rows", 0)
    read = "".join(str(origin.get(key) or "") for key in READ.values())
    if not isinstance(held_out, int) or "\n" in f"{model}{data}{read}":  # each is to be a line
        fail(f"{args.run} is not of a training: {held_out!r} held-out rows of {data!r}, {model!r}. Give another.")
    if run["arguments"].get("trust_remote_code"):
        fail("the run executed code that came with its model. A record alone is no reason: type its command yourself.")
    arguments = {
        name: value
        for name, value in run["arguments"].items()
        if name not in NOT_REPEATED and value != f"<{name.upper()}>"  # which hides what ends in token
    }
    write_json(args.output_dir / "reproduce.yaml", arguments)  # JSON is YAML too
    lines = [target, model, data, held_out, f"{model_pin} {data_pin}".strip(), folder]
    lines += [f"{variable}={origin.get(key) or ''}" for variable, key in READ.items()]
    write_text(args.output_dir / "reproduce.txt", "".join(f"{line}\n" for line in lines))
    print(f"{target} again, {model} on {data}, in {args.output_dir}")


if __name__ == "__main__":
    main()
