"""03_train_full.py, 04_merge_adapter.py, 06_pipeline_infer.py, compare_runs.py, verify_run.py on a tiny model."""

import hashlib
import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from conftest import ROOT, check_refusal, load, run, write_rows
from peft.tuners.tuners_utils import BaseTuner
from safetensors.torch import load_file

FAST = ["--learning_rate", "0.005", "--optim", "adamw_torch", "--logging_steps", "5"]
QUESTIONS = ["what color is the sky", "what color is the sea", "what color is the a"]


def train(script, model, data, output, *args):
    common = ("--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, *FAST)
    result = run(script, *common, *args, cwd=output.parent)
    assert result.returncode == 0, result.stderr
    return result


@pytest.fixture(scope="module")
def runs(tiny_model, question_rows, tmp_path_factory):
    """Folder with lora/, full/ and merged/ of the color questions."""
    folder = tmp_path_factory.mktemp("runs")
    args = ("--num_train_epochs", "15", "--dataset_test_split", "validation")
    lora = ("--lora_target_modules", "all-linear", "--learning_rate", "0.01")
    train("02_train_lora.py", tiny_model, question_rows, folder / "lora", *args, *lora)
    said = train("03_train_full.py", tiny_model, question_rows, folder / "full", *args, "--max_shard_size", "50KB")
    assert "|| trainable%: 100.0000" in said.stdout
    merge = ("--model_name_or_path", "lora/adapter", "--output_dir", "merged", "--prompts", *QUESTIONS)
    result = run("04_merge_adapter.py", *merge, cwd=folder)
    assert result.returncode == 0, result.stderr
    assert "merged in float32: 6 of 6 tokens" in result.stdout and "saved in float32: 6 of 6" in result.stdout
    return folder


def read(file) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def weights(folder) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


def logits_in_a_new_process(load_model: str, cwd) -> torch.Tensor:
    """Logits of the tokens 1 to 9, of a model that plain Python loads."""
    code = f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = {load_model}.eval()
with torch.no_grad():
    torch.save(model(torch.arange(1, 10)[None]).logits, "logits.pt")
"""
    subprocess.run([sys.executable, "-c", code], cwd=cwd, check=True, capture_output=True)
    return torch.load(cwd / "logits.pt")


def test_full_training_saves_a_whole_sharded_model_and_no_lora(runs, tiny_model):
    folder = runs / "full/model"
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert len(list(folder.glob("model-0000?-of-0000?.safetensors"))) > 1
    assert weights(folder).keys() == weights(tiny_model).keys()
    assert {value.dtype for value in weights(folder).values()} == {torch.float32}
    record = read(runs / "full/run.json")
    total = sum(value.numel() for value in weights(folder).values())
    assert record["parameters"] == {"trainable": total, "total": total, "trainable_percent": 100.0}
    assert record["metrics"]["size_bytes"] == sum(file.stat().st_size for file in folder.iterdir())


def test_every_parameter_gets_a_gradient_and_moves(tiny_model, question_rows, tmp_path):
    # Adam moves what has a gradient by about the learning rate, and without weight decay nothing else.
    args = ("--max_steps", "1", "--weight_decay", "0", "--max_grad_norm", "0")
    train("03_train_full.py", tiny_model, question_rows, tmp_path / "full", *args)
    before, after = weights(tiny_model), weights(tmp_path / "full/model")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert all(value == pytest.approx(0.005, rel=0.05) for value in moved.values()), moved


def test_a_reload_in_a_new_process_gives_the_same_logits(tiny_model, question_rows, tmp_path, monkeypatch):
    module, trainers = load("03_train_full.py"), []

    class Trainer(module.PlainLossTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(module, "PlainLossTrainer", Trainer)
    monkeypatch.chdir(tmp_path)
    command = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(question_rows), "--output_dir", "full"]
    monkeypatch.setattr("sys.argv", ["03_train_full.py", *command, *FAST, "--max_steps", "3"])
    module.main()
    with torch.no_grad():
        expected = trainers[0].model.eval()(torch.arange(1, 10)[None]).logits
    assert torch.equal(
        logits_in_a_new_process("AutoModelForCausalLM.from_pretrained('full/model')", tmp_path), expected
    )


def test_adapter_and_merged_model_load_in_plain_python_and_agree(runs, tiny_model):
    base = f"AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})"
    calls = {
        "PeftModel": f"PeftModel.from_pretrained({base}, 'lora/adapter')",
        "AutoModel": "AutoModelForCausalLM.from_pretrained('lora/adapter')",
        "merged": "AutoModelForCausalLM.from_pretrained('merged/model')",
        "base": base,
    }
    logits = {name: logits_in_a_new_process(call, runs) for name, call in calls.items()}
    assert torch.equal(logits["PeftModel"], logits["AutoModel"])
    assert torch.allclose(logits["PeftModel"], logits["merged"], atol=1e-4)
    assert not torch.allclose(logits["base"], logits["merged"], atol=1)
    names = {file.name for file in (runs / "merged/model").iterdir()}
    assert "tokenizer.json" in names and "generation_config.json" in names and "adapter_config.json" not in names
    record = read(runs / "merged/run.json")
    assert record["check"]["same_tokens"] == 6 and record["check"]["largest_difference"] < 1e-4
    assert record["dataset"] == read(runs / "lora/run.json")["dataset"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_saved_in_fewer_bits_is_checked_with_its_own_tolerance(dtype, runs, tmp_path):
    merge = ("--model_name_or_path", runs / "lora/adapter", "--output_dir", tmp_path, "--prompts", *QUESTIONS)
    result = run("04_merge_adapter.py", *merge, "--dtype", dtype, "--max_new_tokens", 2, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {str(value.dtype) for value in weights(tmp_path / "model").values()} == {f"torch.{dtype}"}
    assert 1e-4 < read(tmp_path / "run.json")["check"]["largest_difference"] < (0.5 if dtype == "bfloat16" else 0.1)


def test_a_merge_that_is_not_the_adapter_fails_and_leaves_what_was_there(runs, tmp_path, monkeypatch):
    module = load("04_merge_adapter.py")
    output = shutil.copytree(runs / "merged", tmp_path / "merged")
    before = weights(output / "model")
    monkeypatch.setattr(BaseTuner, "merge_and_unload", lambda self, **options: self.unload())  # the base alone
    monkeypatch.setattr(
        "sys.argv", ["04", "--model_name_or_path", str(runs / "lora/adapter"), "--output_dir", str(output)]
    )
    with pytest.raises(SystemExit, match="is not what the adapter is"):
        module.main()
    assert sorted(file.name for file in output.iterdir()) == [".lock", "model", "run.json"]
    assert all(torch.equal(value, before[name]) for name, value in weights(output / "model").items())


def test_a_merge_that_is_spoiled_on_its_way_to_the_disk_fails(runs, tmp_path, monkeypatch):
    module = load("04_merge_adapter.py")
    load_model = module.load_model

    def load_spoiled(name, *args):
        model, tokenizer = load_model(name, *args)
        if name.endswith("model.tmp"):
            model.model.layers[0].mlp.up_proj.weight.data.zero_()
        return model, tokenizer

    monkeypatch.setattr(module, "load_model", load_spoiled)
    command = ["--model_name_or_path", str(runs / "lora/adapter"), "--output_dir", str(tmp_path), "--dtype", "bfloat16"]
    monkeypatch.setattr("sys.argv", ["04_merge_adapter.py", *command])
    with pytest.raises(SystemExit, match="is not what the adapter is"):
        module.main()
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


def test_generation_settings_that_could_not_be_saved_do_not_cost_the_training(tiny_model, question_rows, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    settings = read(base / "generation_config.json") | {"temperature": 0.9, "top_p": 0.6}  # without do_sample
    (base / "generation_config.json").write_text(json.dumps(settings))
    train("03_train_full.py", base, question_rows, tmp_path / "full", "--max_steps", "2", "--save_steps", "1")
    assert read(tmp_path / "full/model/generation_config.json")["temperature"] == 0.9


def test_held_out_rows_without_loss_stop_the_training_before_it_begins(tiny_model, tmp_path):
    rows = [{"prompt": "a", "completion": "b"}]
    write_rows(tmp_path / "train.jsonl", rows * 4)
    write_rows(tmp_path / "validation.jsonl", [{"prompt": "a " * 60, "completion": "b"}])
    command = ("--model_name_or_path", tiny_model, "--dataset_name", tmp_path, "--output_dir", tmp_path / "out")
    for script in ("02_train_lora.py", "03_train_full.py"):
        file = ("--dataset_name", tmp_path / "train.jsonl", "--dataset_test_split", "validation")
        result = run(script, *command, *file, cwd=tmp_path)
        assert result.returncode == 1 and "a file has no split 'validation'" in result.stderr
        result = run(script, *command, "--dataset_test_split", "validation", "--max_length", 30, cwd=tmp_path)
        assert result.returncode == 1 and "no held-out row has a token with loss" in result.stderr, result.stderr
        assert "'train_loss'" not in result.stdout + result.stderr


def test_a_rerun_leaves_no_weights_of_another_size(runs, tiny_model, question_rows, tmp_path):
    shutil.copytree(runs / "full", tmp_path / "full")
    train("03_train_full.py", tiny_model, question_rows, tmp_path / "full", "--max_steps", "1")
    assert [file.name for file in (tmp_path / "full/model").glob("*.safetensors*")] == ["model.safetensors"]


def test_held_out_loss_in_run_json_is_that_of_the_evaluation(runs, tiny_model, question_rows, tmp_path):
    models = [runs / "lora/adapter", runs / "full/model", runs / "merged/model"]
    command = ("--base_model", tiny_model, "--models", *models, "--dataset_name", question_rows, "--max_new_tokens", 2)
    result = run("evaluate.py", *command, "--output_dir", tmp_path, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    base, lora, full, merged = read(tmp_path / "evaluation.json")["models"]
    assert [model["name"] for model in (lora, full, merged)] == ["lora", "full", "merged"]
    for model in (lora, full):
        metrics = read(runs / model["name"] / "run.json")["metrics"]
        assert metrics["eval_loss"] == pytest.approx(model["loss"], abs=1e-5) and metrics["eval_tokens"] == 8
        assert model["loss"] < 0.5 * base["loss"]
    assert merged["loss"] == pytest.approx(lora["loss"], abs=1e-4) and merged["answers"] == lora["answers"]


def test_the_pipeline_answers_as_generate_does(runs, tiny_model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for model in (tiny_model, runs / "lora/adapter", runs / "full/model", runs / "merged/model"):
        command = ["--model_name_or_path", str(model), "--max_new_tokens", "5", "--prompt", *QUESTIONS]
        answers = []
        for script in ("05_generate.py", "06_pipeline_infer.py"):
            monkeypatch.setattr("sys.argv", [script, *command, "--output", "a.jsonl"])
            load(script).main()
            answers.append([json.loads(line)["answer"] for line in (tmp_path / "a.jsonl").read_text().splitlines()])
        assert answers[0] == answers[1] and len(answers[0]) == 3
    raw = run("06_pipeline_infer.py", *command[:4], "--raw", "--prompt", f"[INST] {QUESTIONS[0]} [/INST]", cwd=tmp_path)
    assert raw.stdout.strip() == "blue"


def test_a_conversation_is_kept_until_an_empty_line(runs, tmp_path, monkeypatch, capsys):
    module = load("05_generate.py")
    model, tokenizer = module.load_model(str(runs / "full/model"), None, "float32")
    typed, seen = iter([QUESTIONS[0], QUESTIONS[1], "/new", QUESTIONS[0], ""]), []
    generate = module.generate

    def note(model, tokenizer, prompts, raw, **options):
        seen.append([message["content"] for message in prompts[0]])
        return generate(model, tokenizer, prompts, raw, **options)

    monkeypatch.setattr(module, "generate", note)
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    module.chat(model, tokenizer, max_new_tokens=4, do_sample=False)
    assert seen[0] == [QUESTIONS[0]] and seen[2] == [QUESTIONS[0]]
    assert seen[1][0] == QUESTIONS[0] and seen[1][1].strip() == "blue" and seen[1][2] == QUESTIONS[1]

    # What no longer fits is dropped from its beginning, a question with its answer.
    seen.clear()
    model.config.max_position_embeddings = 20
    typed = iter([QUESTIONS[0], QUESTIONS[1], QUESTIONS[2], ""])
    module.chat(model, tokenizer, max_new_tokens=4, do_sample=False)
    assert [len(messages) for messages in seen] == [1, 1, 1]

    result = subprocess.run(
        [sys.executable, ROOT / "scripts/05_generate.py", "--chat", "--model_name_or_path", runs / "full/model"],
        input=f"{QUESTIONS[0]}\n{QUESTIONS[1]}\n", capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert result.returncode == 0 and "blue" in result.stdout, result.stderr


def test_the_comparison_shows_what_was_measured_beside_the_tutorials_figures(runs, tmp_path):
    result = run(
        "compare_runs.py", runs / "lora/run.json", runs / "full/run.json", "--output_dir", tmp_path, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    lora, full = (read(runs / name / "run.json") for name in ("lora", "full"))
    table = {
        line.split(" | ")[0]: line.split(" | ")[1:] for line in (tmp_path / "comparison.md").read_text().splitlines()
    }
    assert table["| trainable parameters"][:2] == [f"{r['parameters']['trainable']:,}" for r in (lora, full)]
    assert table["| held-out loss"][:2] == [f"{r['metrics']['eval_loss']:.4f}" for r in (lora, full)]
    assert table["| real tokens/s"][:2] == [f"{r['metrics']['tokens_per_second']:.1f}" for r in (lora, full)]
    assert table["| trainable parameters"][2:] == ["33,554,432", "6,738,415,616 |"]
    assert read(tmp_path / "comparison.json")["measured"].keys() == {"lora", "full"}


DIFFERENT = {
    "training rows": lambda run: run["dataset"].update(sha256="0"),
    "base models": lambda run: run["base_model"].update(name="else"),
    "seeds": lambda run: run["arguments"].update(seed=1),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_runs_of_different_data_base_or_seed_are_not_compared_unless_asked(what, runs, tmp_path):
    other = read(runs / "full/run.json")
    DIFFERENT[what](other)
    (tmp_path / "run.json").write_text(json.dumps(other))
    result = run("compare_runs.py", runs / "lora/run.json", "run.json", cwd=tmp_path)
    assert result.returncode == 1 and f"different {what}" in result.stderr and not (tmp_path / "report").exists()
    result = run("compare_runs.py", runs / "lora/run.json", "run.json", "--allow_different", cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_run_is_held_against_the_curve_on_record(runs, tmp_path):
    curve = tmp_path / "curves/mine.json"
    curve.parent.mkdir()
    assert run("verify_run.py", runs / "lora/run.json", "--record", curve, cwd=tmp_path).returncode == 0
    verify = ("verify_run.py", "run.json", "--curves", "curves")

    def verdict(change) -> str:
        record = read(runs / "lora/run.json")
        change(record)
        (tmp_path / "run.json").write_text(json.dumps(record))
        result = run(*verify, cwd=tmp_path)
        return f"{result.returncode} {result.stdout} {result.stderr}"

    losses = [entry for entry in read(runs / "lora/run.json")["history"] if "loss" in entry]
    assert "pass: all 21 points within 0.0000 %" in verdict(lambda record: None)
    third = losses[2]
    off = verdict(lambda record: record["history"][2].update(loss=third["loss"] * 1.03))
    assert off.startswith("1") and f"leaves the curve at epoch {third['epoch']:.3f}" in off
    assert verdict(lambda record: record["history"][2].update(loss=float("nan"))).startswith("1")
    assert "learning_rate 1 instead of 0.01" in verdict(lambda record: record["arguments"].update(learning_rate=1))
    assert "nothing was compared" in verdict(lambda record: record.update(script="03_train_full.py"))
    curve.write_text(json.dumps(read(curve) | {"binding": False, "note": "another batch size", "dataset_sha256": "0"}))
    assert "Not binding: another batch size" in verdict(lambda record: record["arguments"].update(learning_rate=1))


@pytest.mark.parametrize(
    ("name", "script", "recipe"),
    [
        ("embedded-lora", "02_train_lora.py", "embedded"),
        ("embedded-qlora", "02_train_lora.py", "embedded-qlora"),
        ("embedded-full", "03_train_full.py", "embedded-full"),
    ],
)
def test_curves_on_record_are_of_the_recipes_and_the_rows_that_are_here(name, script, recipe):
    curve, module = read(ROOT / f"env/curves/{name}.json"), load(script)
    stated = module.PARAMETERS | yaml.safe_load((ROOT / f"env/recipes/{recipe}.yaml").read_text())
    stated["lora_target_modules"] = "all-linear"  # what ModelConfig makes of a list of one
    expected = {key: value for key, value in stated.items() if key in curve["arguments"]}
    assert curve["script"] == script and curve["arguments"] == curve["arguments"] | expected and len(expected) > 12
    rows = module.load_rows(str(ROOT / "data"), "train")
    assert curve["dataset_sha256"] == hashlib.sha256(json.dumps(rows[:]).encode()).hexdigest()


def test_the_tutorials_log_is_shown_beside_and_not_binding(runs, tmp_path):
    record = read(runs / "lora/run.json")
    record["base_model"] = {"name": "meta-llama/Llama-2-7b-chat-hf", "revision": "abc"}
    record["dataset"]["origin"] = {"name": "mlabonne/guanaco-llama2-1k"}
    (tmp_path / "run.json").write_text(json.dumps(record))
    result = run("verify_run.py", "run.json", "--curves", ROOT / "env/curves", cwd=tmp_path)
    assert result.returncode == 0 and "1.5973" in result.stdout and "Not binding" in result.stdout


BAD = {
    "merge a model": (
        "04_merge_adapter.py",
        ["--model_name_or_path", "full/model"],
        "is a whole model, there is nothing",
    ),
    "merge nothing": ("04_merge_adapter.py", ["--model_name_or_path", "nowhere"], "no adapter at 'nowhere'"),
    "merge into the training": ("04_merge_adapter.py", ["--output_dir", "lora"], "holds the record of the adapter"),
    "another base": ("04_merge_adapter.py", ["--base_model", "other"], "does not fit 'other': the shapes differ"),
    "4-bit base": ("04_merge_adapter.py", ["--base_model", "four"], "is quantized"),
    "lora": ("03_train_full.py", ["--use_peft"], "02_train_lora.py"),
    "bfloat16 weights": ("03_train_full.py", ["--dtype", "bfloat16"], "--bf16 true"),
    "4-bit training": ("03_train_full.py", ["--load_in_4bit"], "quantized"),
    "pipeline": ("06_pipeline_infer.py", ["--model_name_or_path", "nowhere"], "no model at 'nowhere'"),
    "one run": ("compare_runs.py", ["full/run.json"], "one run alone"),
    "missing run": ("compare_runs.py", ["full/run.json", "lost/run.json"], "no run at lost/run.json. Train first"),
    "merged run": ("compare_runs.py", ["full/run.json", "merged/run.json"], "not of a training run"),
    "no run": ("verify_run.py", [], "no run"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_input_is_answered_in_a_line_or_two(case, runs, tiny_model, question_rows, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(runs, tmp_path / "runs")
    config = read(tiny_model / "config.json")
    for name, change in (("other", {"hidden_size": 16}), ("four", {"quantization_config": {"load_in_4bit": True}})):
        shutil.copytree(tiny_model, folder / name)
        (folder / name / "config.json").write_text(json.dumps(config | change))
    if case == "another base":
        from transformers import LlamaConfig, LlamaForCausalLM

        LlamaForCausalLM(LlamaConfig(**config | {"hidden_size": 16})).save_pretrained(folder / "other")
    script, args, said = BAD[case]
    usual = {
        "03_train_full.py": ["--model_name_or_path", str(tiny_model), "--dataset_name", str(question_rows)],
        "04_merge_adapter.py": ["--model_name_or_path", "lora/adapter", "--output_dir", "new"],
    }
    check_refusal(script, [*usual.get(script, []), *args], said, folder, monkeypatch, capsys)
    assert not (folder / "new/model").exists() and not (folder / "new/run.json").exists()
