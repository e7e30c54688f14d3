"""03_train_full.py, 04_merge_adapter.py, 06_pipeline_infer.py and a conversation, on a tiny model."""

import json
import shutil

import pytest
import torch
from conftest import ROOT, check_refusal, load, run
from helpers import call, measure, read, read_losses, read_rows, read_weights
from peft.tuners.tuners_utils import BaseTuner
from transformers import AutoModelForCausalLM, PreTrainedModel

FAST = ["--learning_rate", "0.005", "--optim", "adamw_torch", "--logging_steps", "5"]
QUESTIONS = ["what color is the sky", "what color is the sea", "what color is the a"]


@pytest.fixture(scope="module")
def runs(tiny_model, question_rows, tmp_path_factory):
    """Folder with lora/, full/ and merged/ of the color questions, made by scripts that were copied out."""
    folder = tmp_path_factory.mktemp("runs")

    def run_copy(script, *args):
        result = run(shutil.copy(ROOT / "scripts" / script, folder), *args, cwd=folder)
        assert result.returncode == 0, result.stderr
        return result.stdout

    args = ("--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--dataset_test_split", "validation")
    args += (*FAST, "--num_train_epochs", 15)
    lora = ("--output_dir", "lora", "--lora_target_modules", "all-linear", "--learning_rate", "0.01")
    run_copy("02_train_lora.py", *args, *lora)
    said = run_copy("03_train_full.py", *args, "--output_dir", "full")
    total = sum(value.numel() for value in read_weights(tiny_model).values())
    assert f"trainable params: {total:,} || all params: {total:,} || trainable%: 100.0000" in said
    merge = ("--model_name_or_path", "lora/adapter", "--output_dir", "merged")
    said = run_copy("04_merge_adapter.py", *merge, "--prompts", *QUESTIONS)
    assert "merged in float32: 6 of 6 tokens" in said and "saved in float32: 6 of 6 tokens" in said
    return folder


def logits_in_a_new_process(cwd, **models: str) -> dict[str, torch.Tensor]:
    """Logits of the tokens 1 to 9, of models that plain Python loads."""
    calls = "".join(f"\n    {name!r}: {load_model}," for name, load_model in models.items())
    script = cwd / "plain.py"
    script.write_text(f"""
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
models = {{{calls}
}}
with torch.no_grad():
    torch.save({{name: model.eval()(torch.arange(1, 10)[None]).logits for name, model in models.items()}}, "logits.pt")
""")
    result = run(script, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return torch.load(cwd / "logits.pt")


def test_full_training_saves_a_whole_model_and_no_lora(runs, tiny_model, question_rows):
    folder = runs / "full/model"
    names = {file.name for file in folder.iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= names
    assert read_weights(folder).keys() == read_weights(tiny_model).keys()
    assert {value.dtype for value in read_weights(folder).values()} == {torch.float32}
    record = read(runs / "full/run.json")
    total = sum(value.numel() for value in read_weights(folder).values())
    assert record["parameters"] == {"trainable": total, "total": total}
    assert {path.name for path in (runs / "full").iterdir()} == {"model", "checkpoints", "run.json"}

    losses = read_losses(runs / "full")
    assert losses[-1] < 0.2 * losses[0]
    model, tokenizer = load("05_generate.py").load_model(str(folder), None, "float32")
    loss, tokens = measure(model, tokenizer, question_rows / "validation.jsonl")
    assert record["metrics"]["eval_loss"] == pytest.approx(loss, abs=1e-6)
    assert record["metrics"]["eval_tokens"] == tokens


def test_every_parameter_gets_a_gradient_and_moves(tiny_model, question_rows, tmp_path):
    # Adam moves what has a gradient by about the learning rate, and without weight decay nothing else.
    args = ("--max_steps", 1, "--weight_decay", 0, "--max_grad_norm", 0, "--output_dir", tmp_path)
    call("03_train_full.py", "--model_name_or_path", tiny_model, "--dataset_name", question_rows, *FAST, *args)
    before, after = read_weights(tiny_model), read_weights(tmp_path / "model")
    moved = {name: (after[name] - before[name]).abs().max().item() for name in before}
    assert all(value == pytest.approx(0.005, rel=0.05) for value in moved.values()), moved


def test_a_reload_in_a_new_process_gives_the_same_logits(tiny_model, question_rows, tmp_path, monkeypatch):
    module, trainers = load("03_train_full.py"), []

    class Trainer(module.TokenLossTrainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            trainers.append(self)

    monkeypatch.setattr(module, "TokenLossTrainer", Trainer)
    args = ("--max_steps", 3, "--output_dir", tmp_path / "full")
    call("03_train_full.py", "--model_name_or_path", tiny_model, "--dataset_name", question_rows, *FAST, *args)
    with torch.no_grad():
        expected = trainers[0].model.eval()(torch.arange(1, 10)[None]).logits
    found = logits_in_a_new_process(tmp_path, full="AutoModelForCausalLM.from_pretrained('full/model')")
    assert torch.equal(found["full"], expected)


def test_adapter_and_merged_model_load_in_plain_python_and_agree(runs, tiny_model):
    base = f"AutoModelForCausalLM.from_pretrained({str(tiny_model)!r})"
    logits = logits_in_a_new_process(
        runs,
        PeftModel=f"PeftModel.from_pretrained({base}, 'lora/adapter')",
        AutoModel="AutoModelForCausalLM.from_pretrained('lora/adapter')",
        merged="AutoModelForCausalLM.from_pretrained('merged/model')",
        base=base,
    )
    assert torch.equal(logits["PeftModel"], logits["AutoModel"])
    assert torch.allclose(logits["PeftModel"], logits["merged"], atol=1e-4)
    assert not torch.allclose(logits["base"], logits["merged"], atol=1)
    names = {file.name for file in (runs / "merged/model").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json"} <= names
    assert "adapter_config.json" not in names
    record = read(runs / "merged/run.json")
    assert record["check"]["same_tokens"] == record["check"]["tokens"] == 6
    assert record["check"]["largest_difference"] < 1e-4 and record["quantized_base"] is None
    assert record["base_model"] == {"name": str(tiny_model)} and record["adapter"] == {"name": "lora/adapter"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_merge_saved_in_fewer_bits_is_checked_with_its_own_tolerance(dtype, runs, tmp_path, monkeypatch):
    save, sizes = PreTrainedModel.save_pretrained, []

    def note(self, folder, max_shard_size=None, **options):
        sizes.append(max_shard_size)
        save(self, folder, max_shard_size="20KB", **options)

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", note)
    merge = ("--model_name_or_path", runs / "lora/adapter", "--output_dir", tmp_path, "--prompts", *QUESTIONS)
    call("04_merge_adapter.py", *merge, "--dtype", dtype, "--max_new_tokens", 2)
    assert sizes == ["5GB"] and len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert {str(value.dtype) for value in read_weights(tmp_path / "model").values()} == {f"torch.{dtype}"}
    assert 1e-4 < read(tmp_path / "run.json")["check"]["largest_difference"] < (0.5 if dtype == "bfloat16" else 0.1)


def test_a_merge_that_is_not_the_adapter_fails_and_saves_nothing(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(BaseTuner, "merge_and_unload", lambda self, **options: self.unload())  # the base alone
    with pytest.raises(SystemExit, match="is not what the adapter is"):
        call("04_merge_adapter.py", "--model_name_or_path", runs / "lora/adapter", "--output_dir", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_merge_that_is_spoiled_on_its_way_to_the_disk_fails_and_has_no_record(runs, tmp_path, monkeypatch):
    module = load("04_merge_adapter.py")
    load_model = module.load_model

    def load_spoiled(name, *args):
        model = load_model(name, *args)
        if name == str(tmp_path / "model"):
            model.model.layers[0].mlp.up_proj.weight.data.zero_()
        return model

    monkeypatch.setattr(module, "load_model", load_spoiled)
    command = ("--model_name_or_path", runs / "lora/adapter", "--output_dir", tmp_path, "--dtype", "bfloat16")
    with pytest.raises(SystemExit, match="is not what the adapter is"):
        call("04_merge_adapter.py", *command)
    assert not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("setting", [{"temperature": 0.9}, {"top_p": 0.9, "min_p": 0.1}, {"top_k": 5}])
def test_a_generation_setting_that_could_not_be_saved_costs_no_training_and_makes_nothing_random(
    setting, tiny_model, question_rows, tmp_path
):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    settings = read(base / "generation_config.json") | setting  # without do_sample
    (base / "generation_config.json").write_text(json.dumps(settings))
    args = ("--max_steps", 2, "--save_steps", 1, "--output_dir", tmp_path / "full")
    call("03_train_full.py", "--model_name_or_path", base, "--dataset_name", question_rows, *FAST, *args)
    args = (*args[:-1], tmp_path / "lora")
    call("02_train_lora.py", "--model_name_or_path", base, "--dataset_name", question_rows, *FAST, *args)
    call("04_merge_adapter.py", "--model_name_or_path", tmp_path / "lora/adapter", "--output_dir", tmp_path / "merged")
    assert read(tmp_path / "lora/adapter/generation_config.json").items() >= setting.items()
    for folder in (tmp_path / "full/model", tmp_path / "merged/model"):
        model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[1, 5, 6]])
        greedy = model.generate(ids, do_sample=False, max_new_tokens=9).tolist()
        assert all(model.generate(ids, max_new_tokens=9).tolist() == greedy for _ in range(5))


def test_the_pipeline_answers_as_generate_does(runs, tiny_model, tmp_path):
    def answer(script, model, *args):
        command = ("--model_name_or_path", model, "--max_new_tokens", 5, "--output", tmp_path / "answers.jsonl")
        call(script, *command, "--prompt", *QUESTIONS, *args)
        rows = read_rows(tmp_path / "answers.jsonl")
        assert [(row["prompt"], row["model"]) for row in rows] == [(question, str(model)) for question in QUESTIONS]
        return [row["answer"] for row in rows]

    for model in (tiny_model, runs / "lora/adapter", runs / "full/model", runs / "merged/model"):
        assert answer("05_generate.py", model) == answer("06_pipeline_infer.py", model)
    # A whole model is not asked with another base, and folders may be of links, as the cache of the Hub has them.
    links = tmp_path / "snapshots/main"
    links.mkdir(parents=True)
    for number, file in enumerate((runs / "lora/adapter").iterdir()):
        (links / file.name).symlink_to(shutil.copy(file, tmp_path / f"blob{number}"))
    for script in ("05_generate.py", "06_pipeline_infer.py"):
        assert answer(script, runs / "full/model", "--base_model", tiny_model) == answer(script, runs / "full/model")
        assert answer(script, links, "--base_model", tiny_model) == answer(script, runs / "lora/adapter")
    call(
        "04_merge_adapter.py", "--model_name_or_path", links, "--output_dir", tmp_path / "merged", "--prompts", "red z"
    )
    raw = answer("05_generate.py", tiny_model, "--raw")
    assert raw == answer("06_pipeline_infer.py", tiny_model, "--raw") != answer("05_generate.py", tiny_model)
    script = shutil.copy(ROOT / "scripts/06_pipeline_infer.py", tmp_path)
    said = run(script, "--model_name_or_path", runs / "merged/model", "--prompt", QUESTIONS[0], cwd=tmp_path)
    assert said.stdout.strip() == "blue", said.stderr


def test_a_conversation_is_kept_until_an_empty_line(runs, monkeypatch, capsys):
    module = load("05_generate.py")
    seen, generate = [], module.generate

    def note(model, tokenizer, prompts, raw, **options):
        seen.append([message["content"].strip() for message in prompts[0]])
        return generate(model, tokenizer, prompts, raw, **options)

    def converse(*lines: str) -> list[list[str]]:
        seen.clear()
        typed = list(lines)

        def read_line(prompt):
            if not typed:
                raise EOFError
            return typed.pop(0)

        monkeypatch.setattr("builtins.input", read_line)
        call("05_generate.py", "--chat", "--model_name_or_path", runs / "full/model", "--max_new_tokens", 4)
        return list(seen)

    monkeypatch.setattr(module, "generate", note)
    sky, sea, a = QUESTIONS
    assert converse(sky, sea, "/new", sky, "", a) == [[sky], [sky, "blue", sea], [sky]]
    assert capsys.readouterr().out.count("blue") == 2  # streamed

    # What no longer fits is dropped from its beginning, a question with its answer.
    load_model = module.load_model

    def load_short(*args):
        model, tokenizer = load_model(*args)
        model.config.max_position_embeddings = 20
        return model, tokenizer

    monkeypatch.setattr(module, "load_model", load_short)
    assert converse(sky, sea, a) == [[sky], [sea], [a]]


BAD = {
    "merge a model": (
        "04_merge_adapter.py",
        ["--model_name_or_path", "full/model"],
        "is a whole model, there is nothing",
    ),
    "merge nothing": ("04_merge_adapter.py", ["--model_name_or_path", "nowhere"], "no model at 'nowhere'"),
    "merge into nothing": ("04_merge_adapter.py", ["--base_model", "nowhere"], "no model at 'nowhere'"),
    "4-bit base": ("04_merge_adapter.py", ["--base_model", "four"], "is quantized"),
    "lora": ("03_train_full.py", ["--use_peft"], "02_train_lora.py"),
    "bfloat16 weights": ("03_train_full.py", ["--dtype", "bfloat16"], "all weights are trained, in float32"),
    "4-bit training": ("03_train_full.py", ["--load_in_4bit"], "all weights are trained, in float32"),
    "pipeline": ("06_pipeline_infer.py", ["--model_name_or_path", "nowhere"], "no model at 'nowhere'"),
    "no template": ("06_pipeline_infer.py", ["--model_name_or_path", "plain"], "has no chat template. Add --raw"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_likely_mistake_is_answered_in_a_line(case, runs, tiny_model, question_rows, tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(runs, tmp_path / "runs", ignore=shutil.ignore_patterns("checkpoints"))
    four = shutil.copytree(tiny_model, folder / "four")
    config = read(tiny_model / "config.json") | {"quantization_config": {"load_in_4bit": True}}
    (four / "config.json").write_text(json.dumps(config))
    (shutil.copytree(tiny_model, folder / "plain") / "chat_template.jinja").unlink()
    script, args, said = BAD[case]
    usual = {
        "03_train_full.py": ["--model_name_or_path", str(tiny_model), "--dataset_name", str(question_rows)],
        "04_merge_adapter.py": ["--model_name_or_path", "lora/adapter"],
        "06_pipeline_infer.py": [],
    }
    check_refusal(script, [*usual[script], *args], said, folder, monkeypatch, capsys)
    assert not (folder / "results").exists() and read(folder / "merged/run.json") == read(runs / "merged/run.json")
