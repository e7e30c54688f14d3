"""make reproduce: a run.json alone says what to do again, and whether the result is the same."""

import json
import shutil

import pytest
from conftest import ROOT, check_refusal, load, run

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


def step(folder, reads, script, *args):
    """A step as make would run it."""
    reads = ["--reads", *reads] if reads else []
    result = run("chain/run_step.py", folder, *reads, "--", ROOT / "scripts" / script, *args, cwd=folder.parent)
    assert result.returncode == 0, result.stderr


def fetch(out, model, data, held_out, *options):
    step(out / "base-model", [], "01_download.py", "--only", "model", "--model_name_or_path", model, *options)
    args = ("--only", "dataset", "--dataset_name", data, "--validation_rows", held_out, *options)
    step(out / "dataset", [], "01_download.py", *args)


def train(out, target, *args):
    inputs = out / "base-model", out / "dataset"
    args = ("--model_name_or_path", inputs[0], "--dataset_name", inputs[1], "--dataset_test_split", "validation", *args)
    step(out / target.split("-")[1], inputs, SCRIPTS[target], *args)


@pytest.fixture(scope="module")
def recorded(tiny_model, question_rows, tmp_path_factory):
    """Folder with the result of each kind of training."""
    folder = tmp_path_factory.mktemp("recorded")
    (folder / "train.jsonl").write_bytes((question_rows / "train.jsonl").read_bytes())
    fetch(folder, tiny_model, folder / "train.jsonl", 3)
    for target in SCRIPTS:
        train(folder, target, *RECIPE[: 6 if target == "train-full" else None])
    return folder


NOT_ASKED = [f"{name}=" for name in ("DATASET_CONFIG", "DATASET_SPLIT", "COLUMNS", "DATASET_TEST_SPLIT", "ROWS")]


@pytest.mark.parametrize("target", SCRIPTS)
def test_a_run_is_repeated_from_its_record_alone(target, recorded, tiny_model, tmp_path, capsys):
    name = target.split("-")[1]
    record = shutil.copy(recorded / name / "run.json", tmp_path)
    result = run("chain/reproduce_run.py", record, "--output_dir", "again", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = (tmp_path / "again/reproduce.txt").read_text().splitlines()
    assert lines == [target, str(tiny_model), str(recorded / "train.jsonl"), "3", "", name, *NOT_ASKED]
    fetch(tmp_path / "again", *lines[1:4], *lines[4].split())
    train(tmp_path / "again", target, "--config", tmp_path / "again/reproduce.yaml")
    again = tmp_path / "again" / name / "run.json"
    result = run("chain/reproduce_run.py", record, "--compare", again, cwd=tmp_path)
    assert result.returncode == 0, result.stdout
    assert "losses: the same 2" in result.stdout and "The result is the same." in result.stdout
    # As after an interruption at step 3, which adds a log: what has other beginnings is not compared
    compare, again = load("chain/reproduce_run.py").say_what_is_the_same, json.loads(again.read_text())
    other = json.loads((tmp_path / "run.json").read_text())
    other["history"].insert(1, other["history"][1] | {"step": 3, "loss": 9.0})
    assert compare(other, again) == 0 and "losses: the same 1\n" in capsys.readouterr().out
    # As after another learning rate
    other["history"][0]["loss"] += 0.01
    other["sha256"] = dict.fromkeys(other["sha256"], "0")
    assert compare(other, again) == 1
    said = capsys.readouterr().out
    apart = other["history"][0]["loss"] / again["history"][0]["loss"] - 1
    assert f"losses: up to {apart:.2g} of a loss apart" in said and "weights: others (sha256)" in said


@pytest.mark.parametrize(
    ("where", "bf16", "apart", "same"),
    [
        (("CPU, 2 threads", "CPU, 2 threads"), False, 0, False),  # where weights have to be the same to the bit
        (("AMD Instinct MI300X", "AMD Instinct MI300X"), False, 1e-3, True),
        (("CPU, 2 threads", "AMD Instinct MI300X"), False, 1e-3, True),
        (("AMD Instinct MI300X", "AMD Instinct MI300X"), False, 5e-3, False),
        (("AMD Instinct MI300X", "NVIDIA H100 80GB HBM3"), True, 5e-3, True),
        (("AMD Instinct MI300X", "AMD Instinct MI300X"), True, 2e-2, False),
        (("AMD Instinct MI300X", "AMD Instinct MI300X"), False, float("nan"), False),
    ],
)
def test_on_an_accelerator_losses_are_the_same_within_a_tolerance(where, bf16, apart, same, recorded, capsys):
    record = json.loads((recorded / "lora/run.json").read_text())
    runs = [record | {"accelerator": name, "arguments": record["arguments"] | {"bf16": bf16}} for name in where]
    history = [dict(entry) for entry in record["history"]]
    history[0]["loss"] *= 1 + apart
    runs[1] |= {"history": history, "sha256": dict.fromkeys(record["sha256"], "0")}
    assert load("chain/reproduce_run.py").say_what_is_the_same(*runs) == (0 if same else 1)
    said = capsys.readouterr().out
    assert f"The result is {'the same' if same else 'not the same'}." in said
    assert ("may be 0.01 apart" in said) == bf16 and ("a sum has no fixed order" in said) == ("AMD" in where[1] or bf16)


def test_what_pins_a_source_is_passed_on():
    find_source = load("chain/reproduce_run.py").find_source
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
        (["merge.json", "--output_dir", "again"], "is not of a training"),
        (["lines.json", "--output_dir", "again"], "is not of a training"),
        (["code.json", "--output_dir", "again"], "executed code that came with its model"),
        (["lora/run.json", "--output_dir", "."], "Add: OUT=outputs/again"),
        (["lora/run.json", "--output_dir", "done"], "done/lora is there already"),
    ],
)
def test_wrong_input_is_named(args, said, recorded, tmp_path, monkeypatch, capsys):
    (tmp_path / "lora").mkdir()
    (tmp_path / "done/lora").mkdir(parents=True)
    shutil.copy(recorded / "lora/run.json", tmp_path / "lora")
    (tmp_path / "merge.json").write_text(json.dumps({"script": "04_merge_adapter.py"}))
    record = json.loads((tmp_path / "lora/run.json").read_text())
    record["arguments"]["trust_remote_code"] = True
    (tmp_path / "code.json").write_text(json.dumps(record))
    record["inputs"]["dataset"]["record"]["dataset"]["held_out_rows"] = "0\n; touch hacked #"
    (tmp_path / "lines.json").write_text(json.dumps(record))
    check_refusal("chain/reproduce_run.py", args, said, tmp_path, monkeypatch, capsys)
    assert not (tmp_path / "again").exists()


def test_another_precision_or_a_run_that_stops_short_is_not_the_same(recorded, capsys):
    record = json.loads((recorded / "lora/run.json").read_text()) | {"accelerator": "AMD Instinct MI300X"}
    compare = load("chain/reproduce_run.py").say_what_is_the_same
    other = record | {"sha256": dict.fromkeys(record["sha256"], "0")}
    assert compare(record, other) == 0
    assert compare(record, other | {"arguments": record["arguments"] | {"bf16": True}}) == 1
    assert compare(record | {"history": record["history"] + [{"step": 99, "loss": 1.0}]}, other) == 0  # one span more
    longer = [{"step": 100 + number, "loss": 1.0} for number in range(9)]
    assert compare(record | {"history": record["history"] + longer}, other) == 1
    zero = [entry | {"loss": 0.0} for entry in record["history"] if "loss" in entry]
    assert compare(record | {"history": zero}, other | {"history": zero}) == 0
