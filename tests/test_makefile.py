"""The Make graph: what runs when, and how variables reach it. A stand-in for Python logs the steps and leaves files."""

import json
import os
import re
import resource
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT

STAND_IN = r"""#!/usr/bin/env bash
printf '%s\n' "$*" >> "$LOG"
script=$1 folder= note=; shift
if [[ $script = */run_step.py ]]; then
    [[ $1 = --* ]] || { folder=$1; shift; }
    read_folders=()
    while [ "$1" != -- ]; do
        [ "$1" != --note ] || note=$2
        [ ! -e "$1/SHA256SUMS" ] || read_folders+=("$1/SHA256SUMS")
        shift
    done
    shift; script=$1; shift
fi
out= ; args=("$@")
for i in "${!args[@]}"; do case "${args[i]}" in --output_dir|--output) out=${args[i+1]} ;; esac; done
case $script in
    *02_train_lora*)
        [ -z "${SLOW-}" ] ||
            { trap 'echo "got TERM" >> "$LOG"; kill %1; exit 143' TERM; sleep 60 & echo ready >> "$LOG"; wait; } ;;
esac
if [ "$folder" ]; then
    mkdir -p "$folder"; rm -rf "$folder"/*
    case "$script $*" in
        *02_train_lora*) mkdir "$folder/adapter" ;;
        *03_train_full*|*04_merge*) mkdir "$folder/model" ;;
        *read_rows*) touch "$folder/validation.jsonl" ;;
    esac
    { cksum <<< "$*"; cat "${read_folders[@]}"; } | cksum > "$folder/SHA256SUMS"  # of what it was made of
    echo '{}' > "$folder/run.json"
    mkdir -p "$(dirname "$note")"; printf '%s\n' "$NOTE" > "$note"
    exit
fi
case $script in
    *write_card*) card=("${1%/run.json}"/*/); touch "${card[0]}README.md" ;;
    *compare_runs*) mkdir -p "$out"; touch "$out/comparison.md" "$out/comparison.json" ;;
    *evaluate*) mkdir -p "$out"; touch "$out/evaluation.md" "$out/evaluation.json" ;;
    *reproduce_run*)
        [ "$out" ] || exit 0
        mkdir -p "$out"
        printf '%s\n' train-full org/name 'my data.jsonl' 5 '--model_revision c0ffee' full > "$out/reproduce.txt"
        printf '%s\n' 'COLUMNS=a b:prompt' ROWS= >> "$out/reproduce.txt"
        echo '{}' > "$out/reproduce.yaml" ;;
    *)
        for i in "${!args[@]}"; do  # of choose_fast there are two
            [ "${args[i]}" != --output ] || { mkdir -p "$(dirname "${args[i+1]}")"; echo '{}' > "${args[i+1]}"; }
        done ;;
esac
"""
VARIABLES = (
    "OUT BASE_MODEL DATASET RECIPE ARGS PROMPT FROM BACKEND TORCH_INDEX TORCH_VERSION PYTHON VENV "
    "DATASET_CONFIG DATASET_SPLIT DATASET_TEST_SPLIT COLUMNS ROWS "
    "REPO RUN DEVICE PRICE VALIDATION_ROWS RESTART COMPUTE_BACKEND BNB_ROCM_ARCH BNB_TAG BNB_SOURCE JOBS FORCE "
    "MAKEFLAGS MAKEOVERRIDES MAKELEVEL"
)
# The audit of the data, and the prediction of the memory.
AUDIT = ["audit_tokens", "predict_memory"]
LORA = ["02_train_lora", "write_card", "plot_loss"]
TRAINING = ["00_check_gpu", "01_download", "read_rows", *AUDIT, *LORA]
FULL = [*AUDIT, "03_train_full", "write_card", "plot_loss"]
ANSWERS = [*["05_generate"] * 4, "06_pipeline_infer"]
REST = ["compare_runs", "plot_loss", "04_merge_adapter", "write_card", *ANSWERS]


class Project:
    """A copy of the repository whose environment is there already, with the stand-in as Python."""

    def __init__(self, folder: Path):
        self.folder, self.log = folder, folder / "log"
        for name in ("scripts", "env", "data"):
            shutil.copytree(ROOT / name, folder / name)
        shutil.copy(ROOT / "Makefile", folder)
        python = folder / ".venv/bin/python"
        python.parent.mkdir(parents=True)
        python.write_text(STAND_IN)
        python.chmod(0o755)
        (folder / ".venv/backend").write_text("cpu\n")
        (folder / ".venv/installed").write_text("PYTHON=python3 BACKEND=auto TORCH_INDEX= TORCH_VERSION=\n")

    def make(self, *args: str, **environment: str) -> subprocess.CompletedProcess:
        self.log.unlink(missing_ok=True)
        clean = {key: value for key, value in os.environ.items() if key not in VARIABLES.split()}
        command = ["make", *args]
        return subprocess.run(
            command, cwd=self.folder, env=clean | {"LOG": str(self.log)} | environment, capture_output=True, text=True
        )

    def commands(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def steps(self) -> list[str]:
        return [name(command) for command in self.commands()]


def name(command: str) -> str:
    """The script that was run, by the runner or without it."""
    words = command.split()
    return Path(words[words.index("--") + 1] if words[0].endswith("run_step.py") else words[0]).stem


def change(file: Path) -> None:
    """Other content, whatever it is; the time stays."""
    status = file.stat()
    file.write_bytes(file.read_bytes() + b"\n")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))


def act(project, first: str) -> None:
    """Has the stand-in do something first."""
    python = project.folder / ".venv/bin/python"
    python.write_text(STAND_IN.replace("script=$1", f"{first}\nscript=$1", 1))


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def trained(project) -> Project:
    assert project.make("train-lora").returncode == 0
    assert project.steps() == TRAINING
    return project


def test_a_second_call_says_up_to_date_at_once_and_starts_no_python(trained):
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = trained.make("train-lora")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime < 1  # seconds of a core, whatever else runs
    assert "up to date" in result.stdout
    assert trained.steps() == []


def test_a_signal_to_make_reaches_the_training(trained):
    (trained.folder / "outputs/lora/run.json").unlink()
    environment = os.environ | {"LOG": str(trained.log), "SLOW": "1"}
    make = subprocess.Popen(["make", "train-lora"], cwd=trained.folder, env=environment, stderr=subprocess.PIPE)
    while "ready" not in trained.commands():
        assert make.poll() is None, make.communicate()
        time.sleep(0.05)
    make.terminate()
    assert make.communicate(timeout=10) and make.returncode != 0
    assert trained.commands()[-1] == "got TERM"


def test_an_audit_takes_the_options_that_are_typed_with_it(trained):
    trained.make("train-lora", "ARGS=--max_steps 5")
    for options in ([], ["ARGS=--lora_r 4"]):
        trained.make("audit", *options)
        (command,) = (command for command in trained.commands() if "audit_tokens" in command)
        assert "--max_steps" not in command and ("--lora_r 4" in command) is bool(options)


def test_a_restart_is_for_the_training_that_is_asked_for(trained):
    trained.make("train-lora", "RESTART=1")
    assert "--restart --" in next(command for command in trained.commands() if "02_train" in command)
    (trained.folder / "outputs/lora/run.json").unlink()
    trained.make("infer", RESTART="1")
    assert "02_train_lora" in trained.steps() and "--restart" not in trained.log.read_text()


def test_a_run_is_reproduced_with_its_own_model_data_and_arguments(trained):
    result = trained.make("reproduce", "RUN=outputs/lora/run.json", "OUT=again", BASE_MODEL="another", ROWS="3")
    assert result.returncode == 0, result.stderr
    first, *commands, last = [command for command in trained.commands() if not command.startswith("-m")]
    assert first == "scripts/chain/reproduce_run.py outputs/lora/run.json --output_dir again"
    assert last == "scripts/chain/reproduce_run.py outputs/lora/run.json --compare again/full/run.json"
    model, data = (command for command in commands if "01_download" in command or "read_rows" in command)
    assert "--model_name_or_path=org/name --model_revision c0ffee" in model
    assert "--dataset_name=my data.jsonl --validation_rows=5 --columns=a b:prompt --model_revision c0ffee" in data
    (training,) = (command for command in commands if "03_train_full" in command)
    assert "--config again/reproduce.yaml" in training and "run_step.py again/full " in training


def test_dry_run_leaves_nothing(project):
    result = project.make("-n", "train-lora")
    assert result.returncode == 0 and "02_train_lora.py" in result.stdout
    assert not (project.folder / "outputs").exists() and project.steps() == []


def test_no_target_prints_the_targets(project):
    result = project.make()
    phony = (ROOT / "Makefile").read_text().split(".PHONY: ")[1].replace("\\\n", " ").split("\n")[0].split()
    assert "tutorial" in phony
    for target in set(phony) - {"FORCE"}:
        assert f"\n  {target} " in result.stdout, target


CHANGED = [
    ("scripts/01_download.py", ["01_download", "read_rows"]),  # which makes the same again
    ("scripts/02_train_lora.py", [*AUDIT, *LORA]),
    ("scripts/chain/plot_loss.py", []),
    ("env/recipes/embedded.yaml", [*AUDIT, *LORA]),
    ("data/train.jsonl", ["read_rows"]),  # the stand-in makes the same of it
    ("README.md", []),
]


@pytest.mark.parametrize("days", [3, -3])
def test_a_changed_file_runs_what_depends_on_it_whatever_the_clocks_say(trained, days):
    for changed, again in CHANGED:
        date_results(trained, days)
        (trained.folder / changed).touch()
        change(trained.folder / changed)
        assert trained.make("train-lora").returncode == 0
        assert trained.steps() == again, changed


def date_results(project, days: float) -> None:
    then = time.time() + 86400 * days
    for path in (project.folder / "outputs").rglob("*"):
        os.utime(path, (then, then))


@pytest.mark.parametrize(
    ("setting", "again"),
    [
        ("ARGS=--max_steps 5", [*AUDIT, *LORA]),
        ("RECIPE=", [*AUDIT, *LORA]),
        ("DATASET=other.jsonl", ["read_rows", *AUDIT, *LORA]),
        ("VALIDATION_ROWS=9", ["read_rows", *AUDIT, *LORA]),
        ("BASE_MODEL=org/name", ["01_download", *AUDIT, *LORA]),
    ],
)
def test_another_setting_runs_again_also_where_results_are_dated_three_days_ahead(trained, setting, again):
    date_results(trained, 3)
    recipe = ["RECIPE=embedded"] if "RECIPE" not in setting else []
    assert trained.make("train-lora", *recipe).returncode == 0 and trained.steps() == []
    assert trained.make("train-lora", *recipe, setting).returncode == 0
    assert trained.steps() == again
    assert trained.make("train-lora", *recipe, setting).returncode == 0 and trained.steps() == []
    assert trained.make("train-lora", *recipe).returncode == 0 and trained.steps() == again


def test_a_new_environment_is_checked(trained):
    future = time.time() + 2
    os.utime(trained.folder / ".venv/installed", (future, future))
    assert trained.make("train-lora").returncode == 0
    assert trained.steps() == ["00_check_gpu"]


def test_a_chat_template_that_was_changed_trains_again(trained):
    (trained.folder / "my.jinja").write_text("one")
    for again in (True, False, True):
        trained.make("train-lora", "ARGS=--chat_template_path my.jinja")
        assert trained.steps() == [*AUDIT, *LORA] * again
        if not again:
            change(trained.folder / "my.jinja")
    (trained.folder / "my.yaml").write_text("chat_template_path: my.jinja\n")
    for again in (True, False, True):
        trained.make("train-lora", "RECIPE=my.yaml", "ARGS=")
        assert trained.steps() == [*AUDIT, *LORA] * again
        if not again:
            change(trained.folder / "my.jinja")


def test_other_arguments_train_again_and_stay_with_their_step(trained):
    trained.make("train-lora", "ARGS=--max_steps 5 --run_name 'a b'")
    assert trained.steps() == [*AUDIT, *LORA]
    assert all(c.endswith("--max_steps 5 --run_name a b") for c in trained.commands()[:3])
    assert "-- --config env/recipes/embedded.yaml --max_steps 5" in trained.commands()[1]
    trained.make("infer", "ARGS=--max_new_tokens 3")
    assert trained.steps() == ["05_generate"]
    assert "--max_new_tokens 3" in trained.commands()[0]
    trained.make("train-lora", "ARGS=--max_steps 5 --run_name 'a b'")
    assert trained.steps() == []
    trained.make("train-lora")
    assert trained.steps() == [*AUDIT, *LORA]


def test_settings_reach_the_commands(trained):
    trained.make("train-lora", "DATASET=other.jsonl", "VALIDATION_ROWS=9", "RECIPE=")
    assert trained.steps() == ["read_rows", *AUDIT, *LORA]
    assert "--dataset_name=other.jsonl --validation_rows=9" in trained.commands()[0]
    given = ["DATASET_CONFIG=main", "DATASET_SPLIT=train_sft", "DATASET_TEST_SPLIT=test_sft", "ROWS=9"]
    options = "--dataset_config=main --dataset_train_split=train_sft --dataset_test_split=test_sft --rows=9"
    trained.make("download", *given, "COLUMNS=a b:prompt")
    assert f"{options} --columns=a b:prompt" in trained.commands()[-1]
    trained.make("download", *given, "COLUMNS=a b:prompt")
    assert not trained.steps()  # the same again
    for columns in ("80", "c:text"):  # the first is the width of a terminal
        trained.make("download", *given, COLUMNS=columns)
        assert ("--columns=c:text" in trained.commands()[-1]) == (columns == "c:text")
    assert "--config" not in " ".join(trained.commands())


def test_infer_and_evaluate_take_what_is_there_and_make_what_is_not(project):
    project.make("infer", "OUT=new", "DATASET=x.jsonl")
    assert project.steps() == [*TRAINING[:-2], "05_generate"]
    project.make("infer", "OUT=new")
    assert project.steps() == ["05_generate"]
    project.make("infer", "FROM=base", "OUT=new")
    assert "--model_name_or_path new/base-model --prompt=" in project.commands()[0]
    project.make("evaluate", "OUT=new")
    assert project.steps() == ["evaluate"]
    project.make("evaluate", "OUT=new")
    assert project.steps() == []
    project.make("infer", "FROM=base", "OUT=newer")
    assert project.steps() == ["00_check_gpu", "01_download", "05_generate"]


def test_the_tutorial_runs_every_step_in_its_order_and_not_again(project):
    for _ in range(2):
        result = project.make("-j2", "tutorial")
        assert result.returncode == 0, result.stderr
        assert "The tutorial is done" in result.stdout
        if not project.steps():
            break
        assert project.steps() == [*TRAINING, *FULL, *REST]
    assert project.steps() == []
    commands = project.make("tutorial", "PROMPT=else") and project.commands()
    assert project.steps() == ANSWERS
    folders = ["lora/adapter", "base-model", "full/model", "merged/model", "base-model"]
    asked = [command.split("--model_name_or_path ")[1].split()[0] for command in commands]
    assert asked == [f"outputs/{folder}" for folder in folders]


def test_steps_of_the_tutorial_never_run_at_once(project):
    act(project, "mkdir busy || touch overlap; trap 'rmdir busy' EXIT; sleep 0.05")
    assert project.make("-j4", "tutorial").returncode == 0
    assert not (project.folder / "overlap").exists()


def test_arguments_of_the_tutorial_go_to_both_trainings(project):
    project.make("tutorial", "ARGS=--max_steps 5")
    assert [name(command) for command in project.commands() if "--max_steps 5" in command] == [
        *AUDIT,
        "02_train_lora",
        *AUDIT,
        "03_train_full",
    ]
    project.make("train-full")
    assert project.steps() == FULL
    project.make("train-full", "RECIPE=")
    assert "--config" not in " ".join(project.commands())


def test_the_full_training_has_a_recipe_of_its_own_where_there_is_one(project):
    project.make("train-full")
    assert (
        "03_train_full.py" in project.commands()[-3]
        and "--config env/recipes/embedded-full.yaml" in project.commands()[-3]
    )
    (project.folder / "mine.yaml").touch()
    project.make("train-full", "RECIPE=mine.yaml")
    assert project.steps() == FULL and "--config mine.yaml" in project.commands()[2]


@pytest.mark.parametrize(
    ("model", "recipe", "written"),
    [
        ("embedded", "qlora", "embedded-qlora"),
        ("org/name", "qlora", "qlora"),
        ("../org/*", "qlora", "qlora"),
        ("org/name", "gemma3", "gemma3"),
        ("embedded", "throughput", "embedded-throughput"),
        ("org/name", "throughput", "throughput"),
    ],
)
def test_a_recipe_of_this_base_model_goes_before_that_of_any(project, model, recipe, written):
    assert project.make("train-lora", f"BASE_MODEL={model}", f"RECIPE={recipe}").returncode == 0
    audit, *_, training = [line for line in project.commands() if re.search("audit_tokens|02_train", line)]
    assert f"--config env/recipes/{written}.yaml" in audit
    if written == "embedded-qlora":  # whose figures are on record, in float32
        assert f"--config env/recipes/{written}.yaml" in training and "--bf16" not in audit
    else:  # with settings of this machine, which the audit does without
        (chosen,) = [line for line in project.commands() if "choose_fast" in line]
        assert f"--config env/recipes/{written}.yaml --output outputs/check/fast-lora.yaml" in chosen
        assert "--config outputs/check/fast-lora.yaml" in training and "--bf16 false" in audit


def test_held_out_rows_are_measured_where_there_are_any(trained):
    assert trained.make("train-lora", "ARGS=--seed 1").returncode == 0
    assert "--dataset_test_split validation" in trained.commands()[2]
    (trained.folder / "outputs/dataset/validation.jsonl").unlink()
    trained.make("train-lora")
    assert "--dataset_test_split" not in trained.commands()[2]


def test_a_full_model_is_asked_but_not_trained_on_the_way(trained):
    for target in ("infer", "chat", "pipeline"):
        result = trained.make(target, "FROM=full")
        assert result.returncode == 2 and "Type: make train-full" in result.stderr and trained.steps() == []
    trained.make("compare")
    assert trained.steps() == ["compare_runs", "plot_loss"]  # with one run missing: the script says so
    trained.make("train-full")
    for target, script in (("infer", "05_generate"), ("chat", "05_generate"), ("pipeline", "06_pipeline_infer")):
        assert trained.make(target, "FROM=full", "BASE_MODEL=else").returncode == 0
        assert trained.steps() == [script] and "--model_name_or_path outputs/full/model" in trained.commands()[0]


def test_a_merged_model_follows_its_adapter(trained):
    trained.make("infer", "FROM=merged")
    assert trained.steps() == ["04_merge_adapter", "05_generate"]
    trained.make("infer", "FROM=merged", "DATASET=else")
    assert trained.steps() == ["05_generate"]
    trained.make("train-lora", "ARGS=--seed 1")
    trained.make("infer", "FROM=merged")
    assert trained.steps() == ["04_merge_adapter", "05_generate"]


def test_a_merged_model_is_used_where_its_adapter_is_gone(trained):
    trained.make("merge")
    shutil.rmtree(trained.folder / "outputs/lora")
    for target in ("infer", "pipeline", "chat"):
        trained.make(target, "FROM=merged")
        assert len(trained.steps()) == 1 and "outputs/merged/model" in trained.commands()[0]


def test_a_report_does_not_outlive_what_it_reports(trained):
    trained.make("train-full", "merge")
    trained.make("compare", "evaluate")
    assert trained.make("compare", "evaluate").returncode == 0 and trained.steps() == []
    shutil.rmtree(trained.folder / "outputs/full")
    trained.make("compare")
    assert trained.steps()[0] == "compare_runs"  # which says what is missing
    trained.make("evaluate")
    assert "--models outputs/lora/adapter outputs/merged/model --dataset" in trained.commands()[0]


def test_only_what_is_asked_for_is_made_to_be_evaluated(project):
    project.make("download", "evaluate")
    assert (
        "03_train_full" not in project.steps() and "--models outputs/lora/adapter --dataset" in project.commands()[-1]
    )
    project.make("merge", "evaluate", "OUT=new")
    assert "--models new/lora/adapter new/merged/model --dataset" in project.commands()[-1]


def test_everything_that_was_trained_is_evaluated(trained):
    trained.make("train-full", "merge")
    trained.make("evaluate")
    assert "--models outputs/lora/adapter outputs/full/model outputs/merged/model" in trained.commands()[0]
    trained.make("evaluate")
    assert trained.steps() == []


def test_a_card_is_written_before_the_upload_and_the_base_is_not_uploaded(trained):
    (trained.folder / "outputs/lora/adapter/README.md").write_text("[More Information Needed]\n")  # as PEFT leaves it
    assert trained.make("push", "REPO=user/name").returncode == 0
    assert trained.steps() == ["write_card", "push_model"]
    assert "--folder outputs/lora/adapter --repo_id=user/name" in trained.commands()[1]
    assert "REPO is not given" in trained.make("push").stderr
    assert "Type: make merge" in trained.make("push", "FROM=merged", "REPO=user/name").stderr and trained.steps() == []
    assert "not yours to upload" in trained.make("push", "FROM=base", "REPO=user/name").stderr


@pytest.mark.parametrize("sealed", [True, False])
def test_a_change_deep_in_a_data_set_or_in_an_unsealed_one_of_ours_is_seen(sealed, trained):
    """As the Hub has it, train.* lies in data/."""
    rows = trained.folder / ("mine/data/train.jsonl" if sealed else "outputs/dataset/train.jsonl")
    rows.parent.mkdir(parents=True, exist_ok=True)
    if not sealed:  # as the documents have it for a change of one's own
        (trained.folder / "outputs/dataset/SHA256SUMS").unlink()
    for number in range(2):
        rows.write_text("{}\n" * (number + 1))
        trained.make("train-lora", "DATASET=mine" if sealed else "DATASET=data", "RECIPE=embedded")
        fetched_only = sealed and number  # the stand-in finds the same rows
        assert trained.steps() == ["read_rows"] * sealed + [*AUDIT, *LORA] * (not fetched_only)
        trained.make("train-lora", "DATASET=mine" if sealed else "DATASET=data", "RECIPE=embedded")
        assert trained.steps() == []


def test_a_sealed_model_in_a_folder_with_a_space_is_verified(project):
    (project.folder / "my model").mkdir()
    (project.folder / "my model/SHA256SUMS").touch()
    project.make("download", "BASE_MODEL=my model", "RECIPE=")
    assert "--reads my model" in project.commands()[1]


def test_a_folder_for_results_may_begin_with_a_dot_and_a_slash(project):
    for _ in range(2):
        assert project.make("train-lora", "OUT=./outputs").returncode == 0
    assert project.steps() == []
    assert (project.folder / "outputs/lora/run.json").exists() and (project.folder / "outputs/.notes/lora").exists()


def test_a_signal_after_the_exchange_leaves_the_record(project):
    act(project, 'trap "[ ! -e outputs/lora/run.json ] || { kill -TERM $PPID; sleep 1; }" EXIT')
    assert project.make("train-lora").returncode != 0
    assert (project.folder / "outputs/lora/run.json").exists()


def test_a_changed_model_folder_is_fetched_again_and_trained_on_again(trained):
    model = trained.folder / "model"
    model.mkdir()
    (model / "model.safetensors").touch()
    trained.make("train-lora", "BASE_MODEL=model", "RECIPE=embedded")
    assert trained.steps() == ["01_download", *AUDIT, *LORA]
    future = time.time() + 2
    os.utime(model / "model.safetensors", (future, future))
    trained.make("train-lora", "BASE_MODEL=model", "RECIPE=embedded")
    assert trained.steps() == ["01_download"]  # which finds the same weights
    change(trained.folder / "outputs/base-model/SHA256SUMS")  # or others
    trained.make("train-lora", "BASE_MODEL=model", "RECIPE=embedded")
    assert trained.steps() == [*AUDIT, *LORA]


def test_a_failed_check_is_not_taken_for_done(project):
    act(project, 'case "$*" in *check_gpu*) mkdir -p outputs/check; touch outputs/check/report.json; exit 1 ;; esac')
    assert project.make("check-gpu").returncode == 2
    assert [file.name for file in (project.folder / "outputs/check").iterdir()] == ["not-ready.json"]
    assert project.make("download").returncode == 2
    assert project.steps() == ["00_check_gpu"]


def test_a_check_with_warnings_is_enough(project):
    act(project, 'case "$*" in *check_gpu*) mkdir -p outputs/check; touch outputs/check/report.json; exit 2 ;; esac')
    assert project.make("check-gpu").returncode == 0
    assert project.make("train-lora").returncode == 0
    assert project.steps() == TRAINING[1:]


@pytest.mark.parametrize(("backend", "require"), [("cpu", "cpu"), ("rocm", "gpu"), ("cuda", "gpu")])
def test_the_check_requires_what_torch_is_built_for(backend, require, project):
    (project.folder / ".venv/backend").write_text(f"{backend}\n")
    project.make("check-gpu", "BASE_MODEL=user/model")
    assert project.commands()[0].endswith(f"--require {require} --access user/model")
    project.make("check-gpu")
    assert project.commands()[0].endswith(f"--require {require}")


def test_a_training_that_does_not_fit_is_begun_only_when_told_so(project):
    act(project, 'case "$*" in *--force*) ;; *--method*) exit 1 ;; esac')
    assert project.make("train-full").returncode == 2
    assert project.steps()[-1] == "predict_memory" and not (project.folder / "outputs/full").exists()
    assert project.make("train-full", "FORCE=1").returncode == 0
    assert project.steps() == FULL
    assert "--prediction outputs/check/memory-full.json" in project.commands()[2]
    assert project.make("train-full").returncode == 0 and project.steps() == []


def test_a_failed_step_is_run_again(project):
    act(project, 'case "$*" in *02_train*) exit 1 ;; esac')
    assert project.make("train-lora").returncode == 2
    act(project, "")
    project.make("train-lora")
    assert project.steps() == [*AUDIT, *LORA]  # the memory may be another by now


@pytest.mark.parametrize(
    "prompt", ["$(touch hacked) `touch hacked`; touch hacked", 'it\'s "$HOME" $$ #1', "two\nlines"]
)
def test_a_prompt_is_just_text(trained, prompt):
    result = trained.make("infer", f"PROMPT={prompt}")
    assert result.returncode == 0, result.stderr
    assert f"--prompt={prompt}" in trained.log.read_text()
    assert not (trained.folder / "hacked").exists()


def test_a_file_of_prompts_goes_without_the_default_prompt(trained):
    trained.make("infer", "ARGS=--prompts_file p.txt")
    assert "--prompts_file p.txt" in trained.commands()[0] and "--prompt=" not in trained.commands()[0]


def test_env_file_gives_defaults_that_environment_and_command_line_override(trained):
    lines = [
        "# settings",
        "PROMPT='from file $(HOME)'  ",
        "export FROM=base # a comment",
        "DATASET=",
        'VENV=".venv" # x\r',
    ]
    (trained.folder / ".env").write_text("\n".join(lines))
    trained.make("infer")
    assert "--model_name_or_path outputs/base-model --prompt=from file $(HOME)" in trained.commands()[0]
    trained.make("infer", PROMPT="from environment")
    assert "--prompt=from environment" in trained.commands()[0]
    trained.make("infer", "PROMPT=from command", PROMPT="from environment")
    assert "--prompt=from command" in trained.commands()[0]
    assert trained.make("train-lora").returncode == 0
    assert trained.steps() == []  # the empty DATASET hides nothing


def test_env_example_is_the_tutorial_without_a_recipe(project):
    shutil.copy(ROOT / ".env.example", project.folder / ".env")
    assert project.make("train-lora").returncode == 0
    log = project.log.read_text()
    assert "--model_name_or_path=meta-llama/Llama-2-7b-chat-hf" in log
    assert "--dataset_name=mlabonne/guanaco-llama2-1k" in log
    assert "--config" not in log


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["infer", "FROM=nowhere"], "FROM=nowhere is unknown"),
        (["train-lora", "RECIPE=nowhere"], "there is no env/recipes/nowhere.yaml"),
        (["train-full", "RECIPE=qlora"], "env/recipes/embedded-qlora.yaml is for LoRA, or quantizes the weights"),
        (["train-full", "RECIPE=qwen3", "BASE_MODEL=org/name"], "Type: make train-lora RECIPE=qwen3, or take another"),
        (["tutorial", "RECIPE=qlora", "BASE_MODEL=org/name"], "Type: make train-lora RECIPE=qlora, or"),
        (["help", "OUT=a b"], "without spaces"),
        (["clean", "OUT=."], "OUT not this folder itself"),
        *((["help", f"{name}=a{mark}b"], "without marks") for name in ("OUT", "VENV") for mark in ";$`'\"\\|&*(#%:"),
        (["help", "MAKE_VERSION=3.81"], "GNU Make 3.81 is too old"),
        (["setup", "BACKEND=tpu"], "BACKEND=tpu is unknown"),
        (["setup", "PYTHON=./nowhere"], "no ./nowhere"),
        (["setup", "VENV=data"], "was not made by this Makefile"),
    ],
)
def test_wrong_variables_are_named(project, args, said):
    result = project.make(*args)
    assert result.returncode != 0
    assert said in result.stderr


@pytest.mark.parametrize(("answers", "said"), [("1 0", "too old"), ("0 1", "no venv module")])
def test_an_unfit_python_is_named(project, answers, said):
    old, no_venv = answers.split()
    python = project.folder / "python"
    python.write_text(f'#!/bin/sh\ncase "$*" in *version_info*) exit {old} ;; *ensurepip*) exit {no_venv} ;; esac\n')
    python.chmod(0o755)
    result = project.make("setup", "PYTHON=./python")
    assert result.returncode != 0 and said in result.stderr


def test_an_interrupted_setup_can_be_typed_again(project):
    python = project.folder / "python"
    python.write_text('#!/bin/sh\ncase "$*" in *"-m venv"*) mkdir -p .venv/bin; echo interrupted >&2; exit 1 ;; esac\n')
    python.chmod(0o755)
    shutil.rmtree(project.folder / ".venv")
    for _ in range(2):
        result = project.make("setup", "PYTHON=./python", "BACKEND=cpu")
        assert result.returncode != 0 and "interrupted" in result.stderr
        assert "not made by this Makefile" not in result.stderr
        assert not (project.folder / ".venv/installed").exists()


def test_clean_removes_results_only(trained):
    (trained.folder / "outputs/notes.txt").write_text("mine")
    assert trained.make("clean").returncode == 0
    assert [file.name for file in (trained.folder / "outputs").iterdir()] == ["notes.txt"]
    assert (trained.folder / ".venv").exists()
    assert trained.make("distclean").returncode == 0
    assert not (trained.folder / ".venv").exists()


def test_the_bitsandbytes_build_gets_its_settings_from_everywhere(project):
    (project.folder / "env/build_bitsandbytes.sh").write_text(
        'echo "$PYTHON,$COMPUTE_BACKEND,$BNB_ROCM_ARCH,$BNB_TAG,$JOBS,$FORCE"\n'
    )
    (project.folder / ".env").write_text('BNB_ROCM_ARCH="gfx90a;gfx942"\nJOBS=3\n')
    result = project.make("bitsandbytes", "COMPUTE_BACKEND=hip", "PYTHON=python3", JOBS="4", FORCE="1")
    assert result.stdout == ".venv/bin/python,hip,gfx90a;gfx942,,4,1\n", result.stderr


def test_the_recipe_fast_is_chosen_for_the_machine_before_a_training(project):
    project.make("train-lora", "RECIPE=fast")
    by_step = {name(command): command for command in project.commands()}
    chosen = "outputs/check/fast-lora.yaml"
    choose = f"scripts/chain/choose_fast.py --method lora --config env/recipes/embedded.yaml --output {chosen} -- "
    assert by_step["choose_fast"].startswith(choose) and by_step["choose_fast"].endswith(f" -- --config {chosen}")
    assert by_step["02_train_lora"].endswith(f" --config {chosen}")
    assert " --config env/recipes/embedded.yaml " in by_step["audit_tokens"]
    project.make("train-lora", "RECIPE=fast")
    assert project.steps() == []
    for interrupted, options, kept in ((True, [], True), (True, ["RESTART=1"], False), (False, [], False)):
        (project.folder / "outputs/lora/run.json").unlink()
        part = project.folder / "outputs/lora.part"
        shutil.rmtree(part, ignore_errors=True)
        if interrupted:
            part.mkdir()
        project.make("train-lora", "RECIPE=fast", *options)
        choose = next(command for command in project.commands() if "choose_fast" in command)
        assert (" --keep -- " in choose) == kept  # what a training that was interrupted began with
    change(project.folder / "scripts/chain/choose_fast.py")
    project.make("train-lora", "RECIPE=fast")
    assert {"choose_fast", "02_train_lora"} <= set(project.steps())
    project.make("train-full", "RECIPE=fast")
    assert any("--method full --config env/recipes/embedded-full.yaml" in command for command in project.commands())
    (training,) = (command for command in project.commands() if "03_train" in command)
    assert training.endswith(" --config outputs/check/fast-full.yaml")
    project.make("train-lora")
    assert "02_train_lora" in project.steps()
    model = project.folder / "model"
    model.mkdir()
    project.make("train-lora", "RECIPE=fast", f"BASE_MODEL={model}")
    choose = next(command for command in project.commands() if "choose_fast" in command)
    assert choose.startswith(f"scripts/chain/choose_fast.py --method lora --output {chosen} -- ")


def test_the_short_bench_of_an_accelerator_downloads_nothing(project):
    assert project.make("bench", "DEVICE=gpu", "ARGS=--rows 8").returncode == 0
    assert project.steps() == ["00_check_gpu", "train_speed"]
    short = "bench/train_speed.py --output_dir outputs/bench --device=gpu --rows 8"
    assert project.commands()[-1] == short
    assert project.make("bench").returncode == 0
    assert project.steps() == ["01_download", "read_rows", "train_speed"]
    usual = "bench/train_speed.py --model outputs/base-model --data outputs/dataset --output_dir outputs/bench"
    assert project.commands()[-1] == usual
    (project.folder / ".env").write_text("DEVICE=gpu\nPRICE=1.50\n")
    for args, environment, options in (
        ([], {}, "--device=gpu --price=1.50"),
        (["PRICE=3; false"], {"PRICE": "2"}, "--device=gpu --price=3; false"),
        ([], {"DEVICE": "cpu", "PRICE": "2"}, "--device=cpu --price=2"),
    ):
        assert project.make("bench", *args, **environment).returncode == 0
        assert project.commands()[-1].endswith(f" --output_dir outputs/bench {options}")


def test_the_makefile_stays_short():
    assert len((ROOT / "Makefile").read_text().splitlines()) <= 280


@pytest.mark.parametrize(
    ("backend", "bf16", "given"), [("rocm", True, True), ("cpu", True, False), ("rocm", False, False)]
)
def test_answers_are_in_the_type_that_was_trained_on_an_accelerator(backend, bf16, given, trained):
    (trained.folder / ".venv/backend").write_text(f"{backend}\n")
    (trained.folder / "outputs/lora/run.json").write_text(json.dumps({"arguments": {"bf16": bf16}}, indent=2))
    for target in ("infer", "pipeline"):
        assert trained.make(target, "ARGS=--dtype float32").returncode == 0
        options = trained.commands()[-1].split()
        types = [options[place + 1] for place, word in enumerate(options) if word == "--dtype"]
        assert types == [*["bfloat16"] * given, "float32"]  # of which the last counts


ENGINES = ("serve", "export", "benchmark")


@pytest.fixture
def engines(trained) -> Project:
    """With the environments of the engines, whose Python is the stand-in too."""
    for engine in ENGINES:
        shutil.copytree(trained.folder / ".venv", trained.folder / f".venv-{engine}")
        (trained.folder / f".venv-{engine}/installed").write_text("cpu\n")
    (trained.folder / ".venv-export/runtime").touch()
    return trained


def test_a_server_takes_what_is_there_and_trains_nothing(engines):
    assert engines.make("serve").returncode == 0 and engines.steps() == ["serve"]
    (command,) = engines.commands()
    assert (
        "--reads outputs/lora outputs/base-model -- scripts/chain/serve.py --model_name_or_path outputs/lora/adapter"
        in command
    )
    assert "--base_model outputs/base-model --name adapter" in command and command.endswith(
        "--host 127.0.0.1 --port 8000"
    )
    assert "--python .venv-serve/bin/python" in command
    assert "Type: make merge" in engines.make("serve", "FROM=merged").stderr
    engines.make("merge", "serve", "FROM=merged", "PORT=80", "ARGS=--seed 3", HOST="a-name-of-this-machine")
    assert engines.steps() == ["04_merge_adapter", "write_card", "serve"]
    options = "--log outputs/check/serve-80.log --host 127.0.0.1 --port 80 --seed 3"
    assert engines.commands()[2].endswith(f"--name merged --python .venv-serve/bin/python {options}")
    (engines.folder / ".env").write_text("HOST=0.0.0.0\n")
    engines.make("serve", "FROM=base")
    assert "--model_name_or_path outputs/base-model --name base" in engines.commands()[0]
    assert "--host 0.0.0.0 " in engines.commands()[0]
    for target in ("serve", "serve-check", "export", "export-check"):
        for step, goal in (("full", "train-full"), ("adapter", "train-lora")):
            result = engines.make(target, f"FROM={step}", "OUT=new")
            assert result.returncode == 2 and f"Type: make {goal} OUT=new" in result.stderr and not engines.steps()


def test_a_server_is_compared_with_what_infer_answers(engines):
    engines.make("serve-check", "ARGS=--load --patience 60")
    assert engines.steps()[0] == "probe"
    probe, check = engines.commands()
    assert "--output outputs/check/probe-adapter.json --load 200" in probe and "--dataset_name outputs/dataset" in probe
    assert check.startswith("scripts/chain/check_serve.py --probe outputs/check/probe-adapter.json")
    assert "--load --patience 60 -- .venv/bin/python scripts/chain/run_step.py --reads outputs/lora" in check


@pytest.mark.parametrize("engine", ENGINES)
def test_an_environment_is_made_before_its_engine_is_asked_for_and_again_where_its_pins_change(engine, project):
    script = project.folder / "env/setup_engine.sh"
    script.write_text(
        '#!/bin/sh\necho "made $1" >> "$LOG"\nmkdir -p "$VENV-$1"\ncp "$VENV/backend" "$VENV-$1/installed"\n'
    )
    made, lock = f".venv-{engine}/installed", "serve-cpu" if engine == "serve" else engine
    now = time.time()
    for later, change in enumerate((None, script, project.folder / f"env/locks/{lock}.txt")):
        if change:
            os.utime(change, (now + 20 * later,) * 2)
        result = project.make(made)
        assert project.commands() == [f"made {engine}"], result.stderr
        os.utime(project.folder / made, (now + 20 * later + 10,) * 2)
        project.make(made)
        assert project.commands() == []


def test_an_export_is_made_once_for_each_form_and_again_where_its_model_changed(engines):
    assert engines.make("merge", "export", "FROM=merged").returncode == 0
    assert engines.steps() == ["04_merge_adapter", "write_card", "export_gguf"]
    command = engines.commands()[-1]
    assert command.startswith("scripts/chain/run_step.py outputs/export/merged-f16 --reads outputs/merged")
    assert command.split(" -- ")[1] == (
        "scripts/chain/export_gguf.py --model_name_or_path outputs/merged/model "
        "--llama_cpp .venv-export/llama.cpp --quant f16"
    )
    engines.make("export", "FROM=merged", "QUANT=q4_k_m")
    assert engines.steps() == ["export_gguf"]
    for form in ("f16", "q4_k_m"):
        engines.make("export", "FROM=merged", f"QUANT={form}")
        assert engines.steps() == [], form
    engines.make("train-lora", "ARGS=--seed 2")
    engines.make("export", "FROM=merged", QUANT="q4_k_m")
    assert engines.steps() == ["04_merge_adapter", "export_gguf"] and "merged-q4_k_m" in engines.commands()[1]
    engines.make("export")
    assert "--base_model outputs/base-model --llama_cpp" in engines.commands()[0]
    assert (engines.folder / "outputs/export/adapter-f16/run.json").exists()
    for wrong, words in (("QUANT=q5", "QUANT=f32, f16, q8_0 or q4_k_m"), ("FORMAT=onnx", "FORMAT=gguf")):
        result = engines.make("export", wrong)
        assert result.returncode == 2 and words in result.stderr and engines.steps() == []


def test_all_exports_of_a_model_are_checked(engines):
    engines.make("export-check")
    assert engines.steps() == ["export_gguf", "probe", "check_export"]  # the default, where there is none
    engines.make("export", "QUANT=q8_0")
    engines.make("export-check")
    assert engines.steps() == ["probe", "check_export"]
    assert "--reads outputs/export/adapter-f16 outputs/export/adapter-q8_0 -- " in engines.commands()[1]
    assert "--exports outputs/export/adapter-f16 outputs/export/adapter-q8_0" in engines.commands()[1]


def test_a_benchmark_takes_all_that_was_trained(engines):
    engines.make("train-full", "merge")
    assert engines.make("benchmark", "TASKS=heldout,my $task.yaml", "ARGS=--limit 3").returncode == 0
    assert engines.steps() == ["probe", "benchmark"]
    command = engines.commands()[1]
    assert "--models outputs/lora/adapter outputs/full/model outputs/merged/model" in command
    assert (
        "--probe outputs/check/probe-adapter.json --tasks=heldout,my $task.yaml --output_dir outputs/report" in command
    )
    assert command.endswith("--limit 3") and "probe-adapter.json" in engines.commands()[0]
