"""The chain's reports on a tiny model: evaluate.py, compare_runs.py, plot_loss.py, verify_run.py, write_card.py."""

import hashlib
import json
import shutil

import pytest
import yaml
from conftest import ROOT, check_refusal, load, run, write_rows

LORA = ("--lora_target_modules", "all-linear", "--learning_rate", "0.02", "--lora_dropout", "0")
COLORS = ["blue", "green", "red", "red"]


def read(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def write(file, record: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record))


def step(out, result, reads, script, *options):
    command = ("chain/run_step.py", out / result, "--reads", *(out / name for name in reads), "--")
    done = run(*command, ROOT / "scripts" / script, *options, cwd=out)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def out(tiny_model, question_rows, tmp_path_factory):
    """What make would leave of the color questions: base-model/, dataset/, lora/, full/, merged/."""
    out = tmp_path_factory.mktemp("out")
    shutil.copytree(tiny_model, out / "base-model")
    write(out / "base-model/run.json", {"base_model": {"name": "tiny", "sha256": "ab" * 32, "license": "mit"}})
    shutil.copytree(question_rows, out / "dataset")
    origin = {"name": "colors", "license": "cc0-1.0", "held_out_rows": 4}
    for file in (out / "dataset").glob("*.jsonl"):
        origin[file.stem] = {"rows": len(file.open().readlines()), "sha256": hash_file(file)}
    write(out / "dataset/run.json", {"dataset": origin})
    args = ("--model_name_or_path", out / "base-model", "--dataset_name", out / "dataset")
    args += ("--dataset_test_split", "validation", "--num_train_epochs", 20, "--per_device_train_batch_size", 14)
    args += ("--logging_steps", 4, "--optim", "adamw_torch", "--report_to", "none", "--save_strategy", "no")
    step(out, "lora", ["base-model", "dataset"], "02_train_lora.py", *args, *LORA)
    step(out, "full", ["base-model", "dataset"], "03_train_full.py", *args, "--learning_rate", "0.01")
    merge = ("--model_name_or_path", out / "lora/adapter", "--prompts", "what color is the sky", "a")
    step(out, "merged", ["base-model", "lora"], "04_merge_adapter.py", *merge)
    return out


def hash_file(file) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Runs a module of the chain in this process, in the test's folder; returns its exit status and what it said."""

    def call(script, *args) -> tuple[int, str]:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("sys.argv", [script, *map(str, args)])
        status, said = 0, ""
        try:
            load(f"chain/{script}").main()
        except SystemExit as stop:
            status, said = 1, stop.code
        return status, "".join(capsys.readouterr()) + said

    return call


def evaluate(out, report, *args, models=("lora/adapter",)):
    command = ("--base_model", out / "base-model", "--models", *(out / model for model in models))
    command += ("--max_new_tokens", 4, "--output_dir", report)
    return run("chain/evaluate.py", *command, "--dataset_name", *(args or [out / "dataset"]), cwd=out)


# Evaluation -----------------------------------------------------------------------------------------------------------
def test_the_evaluation_measures_what_the_training_measured_and_shows_right_answers(out, tmp_path):
    result = evaluate(out, tmp_path, models=("lora/adapter", "full/model", "merged/model"))
    assert result.returncode == 0, result.stderr
    report = read(tmp_path / "evaluation.json")
    base, lora, full, merged = report["models"]
    assert [model["name"] for model in report["models"]] == ["base", "lora", "full", "merged"]
    assert {(model["rows"], model["tokens"], model["measured"]) for model in report["models"]} == {
        (4, 8, "completions")
    }
    for model in (lora, full):
        run = read(out / model["name"] / "run.json")
        assert run["metrics"]["eval_loss"] == model["loss"]  # to the last bit
        assert run["metrics"]["eval_tokens"] == 8  # the color and the EOS of four answers
        losses = [entry["loss"] for entry in run["history"] if "loss" in entry]
        assert losses[-1] < 0.2 * losses[0] and model["loss"] < 0.2 * base["loss"]
    assert merged["loss"] == pytest.approx(lora["loss"], abs=1e-4) and merged["answers"] == lora["answers"]
    assert [answer.strip() for answer in lora["answers"]] == COLORS and base["answers"] != lora["answers"]
    text = (tmp_path / "evaluation.md").read_text()
    assert f"| lora | {lora['loss']:.4f} |" in text and "what color is the sky" in text


def test_the_loss_of_an_adapter_of_quantized_weights_is_told_apart(out, tmp_path):
    shutil.copytree(out / "lora", tmp_path / "qlora")
    write(tmp_path / "qlora/run.json", read(out / "lora/run.json") | {"quantization": {"load_in_4bit": True}})
    result = evaluate(out, tmp_path, models=(tmp_path / "qlora/adapter",))
    assert result.returncode == 0, result.stderr
    there = read(out / "lora/run.json")["metrics"]["eval_loss"]
    told = f"qlora was trained on quantized weights, where its loss is {there:.4f}"
    assert told in (tmp_path / "evaluation.md").read_text()


def test_a_model_is_not_measured_beside_rows_it_was_not_trained_on(out, question_rows, tmp_path):
    check = load("chain/evaluate.py").check_training_rows
    data, models = out / "dataset", [str(out / "lora/adapter"), str(out / "merged/model"), str(out / "base-model")]
    check(models, str(data), "validation")
    check(models, str(data / "validation.jsonl"), "validation")
    for same in ((data, "train"), (data / "train.jsonl", "validation")):
        with pytest.raises(SystemExit, match="lora/adapter was trained on these rows"):
            check(models, *map(str, same))
    with pytest.raises(SystemExit, match="merged/model was trained on these rows"):
        check(models[1:], str(data / "train.jsonl"), "validation")
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "red"}])
    with pytest.raises(SystemExit, match="trained on other rows"):
        check(models, str(tmp_path), "validation")

    # A run on a folder that nobody noted anything of
    run = read(out / "lora/run.json")
    run["dataset"]["name"] = str(question_rows)
    run["inputs"][question_rows.name] = {"sha256": load("chain/folders.py").verify(question_rows), "record": {}}
    write(tmp_path / "lora/run.json", run)
    check([str(tmp_path / "lora/adapter")], str(question_rows), "validation")
    with pytest.raises(SystemExit, match="trained on these rows"):
        check([str(tmp_path / "lora/adapter")], str(question_rows), "train")
    with pytest.raises(SystemExit, match="trained on other rows"):
        check([str(tmp_path / "lora/adapter")], str(tmp_path), "validation")


# Figures and pictures -------------------------------------------------------------------------------------------------
def test_figures_are_of_the_whole_of_an_interrupted_training():
    figures = load("chain/figures.py")
    common = {"num_input_tokens_seen": 800, "epoch": 2.0, "step": 8}
    history = [{"step": 3, "loss": 4.0}, {"step": 4, "loss": 2.0}, {"step": 8, "loss": 1.0, "train_runtime": 5.0}]
    history += [common | {"train_loss": 0.5, "train_runtime": 5.0, "seconds": 20.0}, {"step": 8, "seconds": 23.0}]
    metrics = common | {"train_loss": 0.5, "train_runtime": 5.0}
    run = {"dataset": {"rows": 40}, "metrics": metrics, "history": history}
    of_all = {"seconds": 20.0, "tokens_per_second": 40.0, "samples_per_second": 4.0, "epochs": 2.0}
    assert figures.measure(run) == of_all | {"loss": (3 * 4 + 2 + 4 * 1) / 8}
    assert figures.measure(run | {"history": history[:2] + history[3:]})["loss"] == 0.5  # its end was not logged
    del run["history"]  # as in the record of a merge
    assert figures.measure(run)["seconds"] == 5.0


def test_the_picture_shows_the_runs_and_a_short_one_too(out, call, tmp_path):
    short = read(out / "full/run.json")
    short["history"] = [entry for entry in short["history"] if "loss" not in entry]
    write(tmp_path / "short/run.json", short)
    runs = (out / "lora/run.json", out / "full/run.json", "short/run.json")
    assert call("plot_loss.py", *runs, "--output", "new/loss.png") == (0, "The picture is new/loss.png\n")
    assert (tmp_path / "new/loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_loss_that_does_not_fall_is_said(out, call, tmp_path):
    flat = read(out / "lora/run.json")
    flat["history"] = [entry | ({"loss": 2.0} if "loss" in entry else {}) for entry in flat["history"]]
    write(tmp_path / "flat/run.json", flat)
    status, said = call("plot_loss.py", "flat/run.json")
    assert status == 0 and "warning: the loss did not fall: 2.0000 first, 2.0000 last (flat)" in said


# Comparison -----------------------------------------------------------------------------------------------------------
def test_the_comparison_shows_what_was_measured_beside_the_tutorials_figures(out, tmp_path):
    files = (out / "lora/run.json", out / "full/run.json")
    result = run("chain/compare_runs.py", *files, "--output_dir", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lora, full = map(read, files)
    lines = (tmp_path / "comparison.md").read_text().splitlines()
    table = {line.split(" | ")[0]: line.split(" | ")[1:] for line in lines}
    assert table["| trainable parameters"][:2] == [f"{run['parameters']['trainable']:,}" for run in (lora, full)]
    assert table["| trainable parameters"][2:] == ["33,554,432", "6,738,415,616 |"]
    assert table["| trainable share"][1:] == ["100.0000 %", "0.4955 %", "100.0000 % |"]
    assert table["| held-out loss"][:2] == [f"{run['metrics']['eval_loss']:.4f}" for run in (lora, full)]
    assert table["| mean training loss"][:2] == [f"{run['metrics']['train_loss']:.4f}" for run in (lora, full)]
    assert table["| data"][0] == "colors, 28 rows" and table["| recipe"][0] == "the script's defaults"
    measured = read(tmp_path / "comparison.json")["measured"]
    assert measured.keys() == {"lora", "full"}
    # 28 rows of 10 to 17 tokens, 20 times, padding not counted
    assert 28 * 10 * 20 < measured["lora"]["real tokens/s"] * measured["lora"]["runtime"] < 28 * 20 * 20
    size = sum(file.stat().st_size for file in (out / "full/model").iterdir())
    assert measured["full"]["size on disk"] == size / 1e6


DIFFERENT = {
    "training rows": lambda run: run["inputs"]["dataset"]["record"]["dataset"]["train"].update(sha256="0"),
    "base models": lambda run: run["base_model"].update(sha256="0"),
    "seeds": lambda run: run["arguments"].update(seed=1),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_runs_of_different_data_base_or_seed_are_not_compared_unless_asked(what, out, call, tmp_path):
    other = read(out / "full/run.json")
    DIFFERENT[what](other)
    write(tmp_path / "run.json", other)
    status, said = call("compare_runs.py", out / "lora/run.json", "run.json")
    assert status == 1 and f"different {what}" in said and not (tmp_path / "report").exists()
    assert call("compare_runs.py", out / "lora/run.json", "run.json", "--allow_different")[0] == 0


# Curves ---------------------------------------------------------------------------------------------------------------
@pytest.fixture
def verdict(out, call, tmp_path):
    """Records the curve of lora/run.json, and holds that run against it as a function changed it."""
    call("verify_run.py", out / "lora/run.json", "--record", "curves/mine.json")

    def verdict(change=lambda record: None) -> str:
        record = read(out / "lora/run.json")
        change(record)
        write(tmp_path / "run.json", record)
        return "{} {}".format(*call("verify_run.py", "run.json", "--curves", "curves"))

    return verdict


def test_a_run_is_held_against_the_curve_on_record(verdict, tmp_path):
    curve = tmp_path / "curves/mine.json"
    third = read(curve)["points"][2]
    assert verdict().startswith("0") and "pass: all 10 points within 0.0000 %" in verdict()
    off = verdict(lambda record: record["history"][2].update(loss=third[1] * 1.03))
    assert off.startswith("1") and f"leaves the curve at epoch {third[0]:.3f}" in off
    assert verdict(lambda record: record["history"][2].update(loss=float("nan"))).startswith("1")
    assert verdict(lambda record: record.update(history=[])).startswith("1")
    assert "learning_rate 1 instead of 0.02" in verdict(lambda record: record["arguments"].update(learning_rate=1))
    assert "dataset_sha256 0 instead" in verdict(DIFFERENT["training rows"])
    assert "nothing was compared" in verdict(lambda record: record.update(script="03_train_full.py"))
    write(curve, read(curve) | {"binding": False, "note": "another batch size", "dataset_sha256": "0"})
    assert "Not binding: another batch size" in verdict(lambda record: record["arguments"].update(learning_rate=1))


def test_a_log_more_is_no_other_curve(verdict):
    def interrupt(record):
        """At step 6 of 4 to 8, where half of the loss was logged."""
        before = record["history"][1]
        middle = before | {"step": 6, "epoch": (record["history"][0]["epoch"] + before["epoch"]) / 2}
        record["history"][1:2] = [middle | {"loss": before["loss"] + 0.5}, before | {"loss": before["loss"] - 0.5}]

    assert "pass: all 10 points within 0.0000 %" in verdict(interrupt)


def test_a_run_on_4_bit_weights_has_a_curve_of_its_own(verdict, tmp_path):
    plain = read(tmp_path / "curves/mine.json")
    write(tmp_path / "curves/qlora.json", plain | {"arguments": plain["arguments"] | {"load_in_4bit": True}})
    assert verdict().count("pass: all") == 1
    assert verdict(lambda record: record["arguments"].update(load_in_4bit=True)).count("pass: all") == 1


RECIPES = {"embedded-lora": "embedded", "embedded-qlora": "embedded-qlora", "embedded-full": "embedded-full"}


@pytest.mark.parametrize("name", RECIPES)
def test_curves_on_record_are_of_the_recipes_and_the_rows_that_are_here(name):
    curve = read(ROOT / f"env/curves/{name}.json")
    stated = load(curve["script"]).PARAMETERS
    stated = stated | yaml.safe_load((ROOT / f"env/recipes/{RECIPES[name]}.yaml").read_text())
    stated["lora_target_modules"] = "all-linear"  # what ModelConfig makes of a list of one
    expected = {key: value for key, value in stated.items() if key in curve["arguments"]}
    assert curve["arguments"] == curve["arguments"] | expected and len(expected) > 12
    assert curve["dataset_sha256"] == hash_file(ROOT / "data/train.jsonl")


def test_the_tutorials_log_is_shown_beside_and_not_binding(out, call, tmp_path):
    record = read(out / "lora/run.json")
    record["base_model"] = {"name": "meta-llama/Llama-2-7b-chat-hf", "revision": "abc"}
    record["inputs"]["dataset"]["record"]["dataset"]["name"] = "mlabonne/guanaco-llama2-1k"
    write(tmp_path / "run.json", record)
    status, said = call("verify_run.py", "run.json", "--curves", ROOT / "env/curves")
    assert status == 0 and "1.5973" in said and "Not binding" in said


# Cards ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("lora", "A LoRA adapter for `tiny` (sha256 abababababab), trained on 28 rows of `colors` (sha256 "),
        ("full", "`tiny` (sha256 abababababab), all of its parameters fine-tuned on 28 rows of `colors` (sha256 "),
        ("merged", "into one model.\n"),
    ],
)
def test_each_result_gets_a_card(name, said, out, call, tmp_path):
    folder = shutil.copytree(out / name, tmp_path / name)
    assert call("write_card.py", folder / "run.json")[0] == 0
    text = (folder / ("adapter" if name == "lora" else "model") / "README.md").read_text()
    assert said in text and "| epochs, seed | 20, 42 |" in text and "Base model: mit. Training data: cc0-1.0." in text


def test_the_card_of_a_merge_says_that_the_training_was_on_quantized_weights(out, call, tmp_path):
    folder = shutil.copytree(out / "merged", tmp_path / "merged")
    record = read(folder / "run.json")
    quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    record["inputs"]["lora"]["record"]["quantization"] = quantization
    write(folder / "run.json", record)
    assert call("write_card.py", folder / "run.json")[0] == 0
    text = (folder / "model/README.md").read_text()
    assert "quantized: 4 bits, nf4, double quantization" in text and "not into the quantized ones" in text
    assert (
        f"| mean training loss | {load('chain/figures.py').measure(read(out / 'lora/run.json'))['loss']:.4f} |" in text
    )  # of the whole run


BAD = {
    "one run": ("compare_runs.py", ["full/run.json"], "one run alone"),
    "missing run": ("compare_runs.py", ["full/run.json", "lost/run.json"], "no run at lost/run.json. Train first"),
    "merged run": ("compare_runs.py", ["full/run.json", "merged/run.json"], "not of a training run"),
    "no run": ("verify_run.py", [], "no run"),
    "no picture": ("plot_loss.py", ["lost/run.json"], "no run at lost/run.json"),
    "no training": ("write_card.py", ["base-model/run.json"], "no record of a training"),
    "no tokens": ("evaluate.py", ["--max_new_tokens", "0"], "invalid count value: '0'"),
    "no held-out rows": ("evaluate.py", ["--dataset_name", "half"], "half has no validation rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_answered_in_a_line_or_two(case, out, monkeypatch, capsys):
    write_rows((out / "half").mkdir(exist_ok=True) or out / "half/train.jsonl", [{"text": "a"}])
    script, args, said = BAD[case]
    check_refusal(f"chain/{script}", args, said, out, monkeypatch, capsys)
