"""The Make graph: what runs when, and how variables reach it. A stand-in for Python logs the steps and leaves files."""

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT

STAND_IN = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> "$LOG"
out= ; args=("$@")
for i in "${!args[@]}"; do case "${args[i]}" in --output_dir|--output) out=${args[i+1]} ;; esac; done
case "$*" in
    *--only\\ model*) mkdir -p "$out/base-model"; echo '{}' > "$out/base-model/run.json" ;;
    *--only\\ dataset*)
        mkdir -p "$out/dataset"; touch "$out/dataset/validation.jsonl"; echo '{}' > "$out/dataset/run.json" ;;
    *02_train_lora*)
        mkdir -p "$out/adapter"; touch "$out/adapter/adapter_model.safetensors"; echo '{}' > "$out/run.json" ;;
    *evaluate*) mkdir -p "$out"; touch "$out/evaluation.md" "$out/evaluation.json" ;;
    *--output*) mkdir -p "$(dirname "$out")"; echo '{}' > "$out" ;;
esac
"""
VARIABLES = "OUT BASE_MODEL DATASET RECIPE ARGS PROMPT FROM BACKEND PYTHON VENV MAKEFLAGS MAKEOVERRIDES MAKELEVEL"
TRAINING = ["00_check_gpu", "01_download", "01_download", "audit_tokens", "02_train_lora", "plot_loss"]


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
        (folder / ".venv.settings").write_text("python3 auto\n")
        (folder / ".venv/installed").touch()

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
        return [Path(command.split()[0]).stem for command in self.commands()]


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def trained(project) -> Project:
    assert project.make("train-lora").returncode == 0
    assert project.steps() == TRAINING
    return project


def test_a_second_call_says_up_to_date_at_once_and_starts_no_python(trained):
    start = time.monotonic()
    result = trained.make("train-lora")
    assert time.monotonic() - start < 1
    assert "up to date" in result.stdout
    assert trained.steps() == []


def test_dry_run_leaves_nothing(project):
    result = project.make("-n", "train-lora")
    assert result.returncode == 0 and "02_train_lora.py" in result.stdout
    assert not (project.folder / "outputs").exists() and project.steps() == []


def test_no_target_prints_the_targets(project):
    result = project.make()
    for target in ("setup", "check-gpu", "download", "train-lora", "infer", "evaluate", "test", "lint", "clean"):
        assert f"\n  {target} " in result.stdout


@pytest.mark.parametrize(
    ("changed", "again"),
    [
        ("scripts/02_train_lora.py", ["02_train_lora", "plot_loss"]),
        ("scripts/plot_loss.py", ["plot_loss"]),
        ("env/recipes/embedded.yaml", ["audit_tokens", "02_train_lora", "plot_loss"]),
        ("data/train.jsonl", ["01_download", "audit_tokens", "02_train_lora", "plot_loss"]),
        (".venv/installed", []),
        ("README.md", []),
    ],
)
def test_a_changed_file_runs_what_depends_on_it(trained, changed, again):
    future = time.time() + 2
    (trained.folder / changed).touch()
    os.utime(trained.folder / changed, (future, future))
    assert trained.make("train-lora").returncode == 0
    assert trained.steps() == again


def test_other_arguments_train_again_and_stay_with_their_step(trained):
    trained.make("train-lora", "ARGS=--max_steps 5 --run_name 'a b'")
    assert trained.steps() == ["audit_tokens", "02_train_lora", "plot_loss"]
    assert "--max_steps 5 --run_name a b --output" in trained.commands()[0]
    assert trained.commands()[1].endswith("--output_dir outputs/lora --max_steps 5 --run_name a b")
    trained.make("infer", "ARGS=--max_new_tokens 3")
    assert trained.steps() == ["05_generate"]
    assert "--max_new_tokens 3" in trained.commands()[0]
    trained.make("train-lora", "ARGS=--max_steps 5 --run_name 'a b'")
    assert trained.steps() == []
    trained.make("train-lora")
    assert trained.steps() == ["audit_tokens", "02_train_lora", "plot_loss"]


def test_other_data_or_recipe_runs_the_chain_from_there(trained):
    trained.make("train-lora", "DATASET=other.jsonl")
    assert trained.steps() == ["01_download", "audit_tokens", "02_train_lora", "plot_loss"]
    assert "--dataset_name=other.jsonl" in trained.commands()[0]
    trained.make("train-lora", "DATASET=other.jsonl", "VALIDATION_ROWS=9")
    assert trained.steps() == ["01_download", "audit_tokens", "02_train_lora", "plot_loss"]
    assert "--validation_rows=9" in trained.commands()[0]
    trained.make("train-lora", "DATASET=other.jsonl", "VALIDATION_ROWS=9", "RECIPE=")
    assert trained.steps() == ["audit_tokens", "02_train_lora", "plot_loss"]
    assert "--config" not in " ".join(trained.commands())


def test_infer_and_evaluate_take_what_is_there_and_make_what_is_not(project):
    project.make("infer", "OUT=new", "DATASET=x.jsonl")
    assert project.steps() == [*TRAINING[:-1], "05_generate"]
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


def test_a_changed_model_folder_is_fetched_again_and_evaluated_again(trained):
    model = trained.folder / "model"
    model.mkdir()
    (model / "model.safetensors").touch()
    trained.make("train-lora", "BASE_MODEL=model", "RECIPE=embedded")
    assert trained.steps() == ["01_download", "audit_tokens", "02_train_lora", "plot_loss"]
    future = time.time() + 2
    os.utime(model / "model.safetensors", (future, future))
    trained.make("train-lora", "BASE_MODEL=model", "RECIPE=embedded")
    assert trained.steps() == ["01_download", "audit_tokens", "02_train_lora", "plot_loss"]


def test_an_accelerator_is_required_where_torch_is_built_for_one(project):
    (project.folder / ".venv/backend").write_text("rocm\n")
    project.make("download")
    assert "--require gpu" in project.commands()[0]


def test_a_failed_check_is_not_taken_for_done(project):
    python = project.folder / ".venv/bin/python"
    python.write_text(STAND_IN + 'case "$*" in *check_gpu*) exit 1 ;; esac\n')
    assert project.make("check-gpu").returncode == 2
    assert [file.name for file in (project.folder / "outputs/check").iterdir()] == ["not-ready.json"]
    assert project.make("download").returncode == 2
    assert project.steps() == ["00_check_gpu"]


def test_a_failed_step_is_run_again(project):
    python = project.folder / ".venv/bin/python"
    python.write_text(STAND_IN + 'case "$*" in *02_train*) exit 1 ;; esac\n')
    assert project.make("train-lora").returncode == 2
    python.write_text(STAND_IN)
    project.make("train-lora")
    assert project.steps() == ["02_train_lora", "plot_loss"]


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
        (["help", "OUT=a b"], "without spaces"),
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
