"""make reproduce: a run.json alone says what to do again, and whether the result is the same."""

import json
import shutil

import pytest
from conftest import check_refusal, load, run

RECIPE = [
    "--learning_rate",
    "0.01",
    "--max_steps",
    "4",
    "--logging_steps",
    "2",
    "--lora_target_modules",
    "q_proj",
    "v_proj",
]
SCRIPTS = {"train-lora": "02_train_lora.py", "train-full": "03_train_full.py"}


@pytest.fixture(scope="module")
def recorded(tiny_model, question_rows, tmp_path_factory):
    """Folder with the run.json of each kind of training, whose model and rows came out of 01_download.py."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "train.jsonl").write_bytes((question_rows / "train.jsonl").read_bytes())
    sources = ("--model_name_or_path", tiny_model, "--dataset_name", folder / "train.jsonl", "--validation_rows", 3)
    assert run("01_download.py", *sources, "--output_dir", folder, cwd=folder).returncode == 0
    for target, script in SCRIPTS.items():
        args = ("--model_name_or_path", folder / "base-model", "--dataset_name", folder / "dataset")
        args = (*args, "--dataset_test_split", "validation", "--output_dir", folder / target)
        result = run(script, *args, *RECIPE[: 6 if target == "train-full" else None], cwd=folder)
        assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.parametrize("target", SCRIPTS)
def test_a_run_is_repeated_from_its_record_alone(target, recorded, tiny_model, tmp_path):
    record = shutil.copy(recorded / target / "run.json", tmp_path)
    result = run("reproduce_run.py", record, "--output_dir", "again", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "again/reproduce.txt").read_text().splitlines()
    assert lines == [target, str(tiny_model), str(recorded / "train.jsonl"), "3", "", target.split("-")[1]]
    args = ("--model_name_or_path", lines[1], "--dataset_name", lines[2], "--validation_rows", lines[3])
    assert run("01_download.py", *args, "--output_dir", "again", cwd=tmp_path).returncode == 0
    args = (
        "--model_name_or_path",
        "again/base-model",
        "--dataset_name",
        "again/dataset",
        "--config",
        "again/reproduce.yaml",
    )
    args = (*args, "--dataset_test_split", "validation", "--output_dir", "again/run")
    result = run(SCRIPTS[target], *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    result = run("reproduce_run.py", record, "--compare", "again/run/run.json", cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "losses: the same 3" in result.stdout and "The result is the same." in result.stdout
    # Not the same: another learning rate
    assert run(SCRIPTS[target], *args, "--learning_rate", "0.011", cwd=tmp_path).returncode == 0
    result = run("reproduce_run.py", record, "--compare", "again/run/run.json", cwd=tmp_path)
    assert result.returncode == 1 and "apart" in result.stdout and "weights: others (sha256)" in result.stdout


def test_what_pins_a_source_is_passed_on():
    find_source = load("reproduce_run.py").find_source
    assert find_source("model", {"name": "x", "package": "p==1", "sha256": "0"}) == ("embedded", "")
    assert find_source("dataset", {"name": "a/b", "revision": "c0ffee"}) == ("a/b", "--dataset_revision c0ffee")
    with pytest.raises(SystemExit, match="is no name on the Hub"):
        find_source("model", {"name": "a/b", "revision": "c; touch hacked"})
    with pytest.raises(SystemExit, match="is not here"):
        find_source("model", {"name": "/nowhere/model", "sha256": "0"})


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["nowhere.json", "--output_dir", "again"], "no run at nowhere.json"),
        (["merge.json", "--output_dir", "again"], "is not the record of a training"),
        (["lines.json", "--output_dir", "again"], "is not the record of a training"),
        (["code.json", "--output_dir", "again"], "executed code that came with its model"),
        (["lora/run.json", "--output_dir", "."], "Add: OUT=outputs/again"),
    ],
)
def test_wrong_input_is_named(args, said, recorded, tmp_path, monkeypatch, capsys):
    (tmp_path / "lora").mkdir()
    shutil.copy(recorded / "train-lora/run.json", tmp_path / "lora")
    (tmp_path / "merge.json").write_text(json.dumps({"script": "04_merge_adapter.py"}))
    record = json.loads((tmp_path / "lora/run.json").read_text())
    record["arguments"]["trust_remote_code"] = True
    (tmp_path / "code.json").write_text(json.dumps(record))
    record["dataset"]["origin"]["held_out_rows"] = "0\n; touch hacked #"
    (tmp_path / "lines.json").write_text(json.dumps(record))
    check_refusal("reproduce_run.py", args, said, tmp_path, monkeypatch, capsys)
    assert not (tmp_path / "again").exists()
