"""02_train_lora.py, plot_loss.py, evaluate.py and 05_generate.py on a tiny model: what they learn, leave and refuse."""

import json
import shutil

import pytest
from conftest import check_refusal, load, run, write_rows

FAST = ["--learning_rate", "0.01", "--optim", "adamw_torch", "--logging_steps", "5", "--lora_dropout", "0"]


def train(model, data, output, *args):
    return run(
        "02_train_lora.py",
        *("--model_name_or_path", model, "--dataset_name", data, "--output_dir", output, *FAST, *args),
        cwd=output.parent,
    )


@pytest.fixture(scope="module")
def trained(tiny_model, question_rows, tmp_path_factory):
    """Output folder of 15 epochs on the color questions."""
    output = tmp_path_factory.mktemp("trained") / "lora"
    result = train(tiny_model, question_rows, output, "--num_train_epochs", "15", "--lora_target_modules", "all-linear")
    assert result.returncode == 0, result.stderr
    assert "trainable params: " in result.stdout and "'loss': " in result.stderr + result.stdout
    return output


def test_the_result_is_what_the_tutorial_lists_and_a_record(trained, tiny_model):
    adapter = {file.name for file in (trained / "adapter").iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= adapter
    assert list((trained / "checkpoints").glob("runs/*/events.out.tfevents.*"))
    record = json.loads((trained / "run.json").read_text())
    assert record["base_model"]["name"] == str(tiny_model) and len(record["base_model"]["sha256"]) == 64
    assert record["dataset"]["rows"] == 28 and len(record["dataset"]["sha256"]) == 64
    assert record["arguments"]["lora_r"] == 64 and record["arguments"]["seed"] == 42
    assert record["packages"].keys() >= {"torch", "transformers", "trl", "peft"}
    assert 0 < record["parameters"]["trainable"] < record["parameters"]["total"]
    assert record["metrics"]["tokens_per_second"] > 0
    assert 2**27 < record["metrics"]["peak_memory_bytes"] < 2**33
    # 28 rows of 10 to 17 tokens, 15 times, padding not counted
    tokens = record["metrics"]["tokens_per_second"] * record["metrics"]["train_runtime"]
    assert 28 * 10 * 15 < tokens < 28 * 20 * 15


def test_the_loss_falls_and_the_answers_become_right(trained, tiny_model, question_rows, tmp_path):
    losses = [entry["loss"] for entry in json.loads((trained / "run.json").read_text())["history"] if "loss" in entry]
    assert losses[-1] < 0.2 * losses[0]
    result = run(
        "evaluate.py",
        *("--base_model", tiny_model, "--models", trained / "adapter", "--dataset_name", question_rows),
        *("--max_new_tokens", 4, "--output_dir", tmp_path / "report"),
        cwd=tmp_path,
    )
    assert result.returncode == 0, result.stderr
    report = json.loads((tmp_path / "report/evaluation.json").read_text())
    base, lora = report["models"]
    assert (base["name"], lora["name"]) == ("base", "lora")
    assert lora["loss"] < 0.5 * base["loss"]
    assert report["tokens"] == 8  # the color and the EOS of four answers
    assert [answer.strip() for answer in lora["answers"]] == ["blue", "green", "red", "red"]
    assert base["answers"] != lora["answers"]
    text = (tmp_path / "report/evaluation.md").read_text()
    assert f"| lora | {lora['loss']:.4f} |" in text and "what color is the sky" in text


def test_two_runs_are_equal_to_the_bit(tiny_model, question_rows, tmp_path):
    for name in ("one", "two"):
        result = train(tiny_model, question_rows, tmp_path / name, "--max_steps", "6", "--logging_steps", "1")
        assert result.returncode == 0, result.stderr
    histories = [json.loads((tmp_path / name / "run.json").read_text())["history"][:-1] for name in ("one", "two")]
    losses = [[(entry["step"], entry["loss"], entry["grad_norm"]) for entry in history] for history in histories]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    weights = [(tmp_path / name / "adapter/adapter_model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]


def test_another_seed_gives_another_adapter(tiny_model, question_rows, trained, tmp_path):
    for seed in ("1", "2"):
        assert train(tiny_model, question_rows, tmp_path / seed, "--max_steps", "2", "--seed", seed).returncode == 0
    weights = [(tmp_path / seed / "adapter/adapter_model.safetensors").read_bytes() for seed in ("1", "2")]
    assert weights[0] != weights[1]


def test_plain_loss_is_the_same_loss(tiny_model, question_rows, tmp_path):
    losses = []
    for setting in ("true", "false"):
        args = ("--max_steps", "4", "--logging_steps", "1", "--token_metrics", setting)
        assert train(tiny_model, question_rows, tmp_path / setting, *args).returncode == 0
        history = json.loads((tmp_path / setting / "run.json").read_text())["history"]
        losses.append([entry["loss"] for entry in history if "loss" in entry])
        assert ("entropy" in history[0]) == (setting == "true")
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


FORMS = {
    "text": {"text": "<s>[INST] what color is the sky [/INST] blue </s>"},
    "messages": {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "blue"}]},
    "strings": {"prompt": "a b", "completion": "blue"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_rows_of_every_form_from_every_kind_of_file(form, suffix, tiny_model, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer

    if form == "messages" and suffix == ".csv":
        pytest.skip("a CSV file has no lists")
    rows = Dataset.from_list([FORMS[form]] * 3)
    file = tmp_path / f"rows{suffix}"
    {".jsonl": rows.to_json, ".json": rows.to_json, ".csv": rows.to_csv, ".parquet": rows.to_parquet}[suffix](file)
    script, audit = load("02_train_lora.py"), load("audit_tokens.py")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    loaded = script.load_rows(str(file), "train")
    assert len(loaded) == 3
    config = audit.SFTConfig(str(tmp_path / "t"), bf16=False, report_to=[])
    row = audit.tokenize_rows(loaded, tokenizer, config).train_dataset[0]
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith("<s> [INST]") and text.endswith("blue </s>") and text.count("<s>") == 1
    learned = tokenizer.decode([label for label in row["labels"] if label != -100])
    assert learned == ("blue </s>" if form == "strings" else text)


def test_an_adapter_of_a_hub_model_names_the_hub_id(tiny_model, question_rows, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "run.json").write_text('{"base_model": {"name": "org/base", "revision": "abc"}}')
    assert train(model, question_rows, tmp_path / "lora", "--max_steps", "1").returncode == 0
    config = json.loads((tmp_path / "lora/adapter/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")


def test_an_adapter_runs_on_its_own_base_only_and_without_its_tokenizer(trained, tiny_model, tmp_path):
    generate = load("05_generate.py")
    run_folder = shutil.copytree(trained, tmp_path / "lora")
    for name in ("tokenizer_config.json", "SHA256SUMS"):
        (run_folder / "adapter" / name).unlink()
    generate.load_model(str(run_folder / "adapter"), None, "float32")
    base = shutil.copytree(tiny_model, tmp_path / "other")
    (base / "run.json").write_text('{"base_model": {"name": "another"}}')
    with pytest.raises(SystemExit, match="was trained on .* Train it again"):
        generate.load_model(str(run_folder / "adapter"), str(base), "float32")


def test_a_model_is_not_measured_beside_rows_it_was_not_trained_on(trained, question_rows, tmp_path):
    evaluate = load("evaluate.py")
    held_out = evaluate.load_rows(str(question_rows), "validation")
    evaluate.check_training_rows([str(trained / "adapter")], str(question_rows), held_out)
    with pytest.raises(SystemExit, match="was trained on these rows"):
        file = str(question_rows / "train.jsonl")
        evaluate.check_training_rows([str(trained / "adapter")], file, evaluate.load_rows(file, "validation"))
    rows = (question_rows / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "train.jsonl").write_text("".join(rows[:-1]))
    with pytest.raises(SystemExit, match="trained on other rows"):
        evaluate.check_training_rows([str(trained / "adapter")], str(tmp_path), held_out)


def test_questions_of_the_report_belong_to_their_answers():
    from datasets import Dataset

    def say(*words):
        return [{"role": role, "content": word} for role, word in zip(("user", "assistant") * 2, words, strict=False)]

    choose = load("evaluate.py").choose_prompts
    chats = Dataset.from_list([{"messages": say("a", "red", "b", "blue")}])
    assert choose(chats) == [{"prompt": "a", "reference": "red"}]
    turns = Dataset.from_list([{"prompt": say("a", "red", "b"), "completion": say("", "blue")[1:]}])
    assert choose(turns) == [{"prompt": "b", "reference": "blue"}]
    assert choose(Dataset.from_list([{"prompt": "a", "completion": "red"}])) == [{"prompt": "a", "reference": "red"}]


def test_a_short_run_has_a_picture(tiny_model, question_rows, tmp_path):
    assert (
        train(tiny_model, question_rows, tmp_path / "lora", "--max_steps", "1", "--logging_steps", "50").returncode == 0
    )
    result = run("plot_loss.py", "lora/run.json", "--output", "new/loss.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "new/loss.png").exists()


def test_config_file_sets_and_command_line_overrides(tiny_model, question_rows, tmp_path):
    (tmp_path / "recipe.yaml").write_text("lora_r: 4\nmax_steps: 3\nlearning_rate: 1.0e-3\n")
    result = train(
        tiny_model, question_rows, tmp_path / "lora", "--config", tmp_path / "recipe.yaml", "--max_steps", "1"
    )
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "lora/run.json").read_text())
    assert (record["arguments"]["lora_r"], record["metrics"]["train_loss"] > 0) == (4, True)
    assert [entry["step"] for entry in record["history"]][-1] == 1


def test_a_failing_rerun_leaves_the_last_result(trained, tiny_model, question_rows, tmp_path):
    output = shutil.copytree(trained, tmp_path / "lora")
    before = {file: (output / file).read_bytes() for file in ("run.json", "adapter/adapter_model.safetensors")}
    result = train(tiny_model, question_rows, output, "--optim", "adamw_torch", "--packing", "--max_length", "none")
    assert result.returncode != 0
    assert {file: (output / file).read_bytes() for file in before} == before


def test_the_picture_shows_the_runs(trained, tmp_path):
    result = run("plot_loss.py", trained / "run.json", trained / "run.json", "--output", "loss.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    result = run("plot_loss.py", "nowhere/run.json", cwd=tmp_path)
    assert result.returncode == 1 and "no run at nowhere/run.json" in result.stderr


def test_a_batch_of_prompts_answers_as_one_at_a_time(trained, tiny_model, tmp_path):
    prompts = ["what color is the sky", "a", "what color is the sea x x x x", "b"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    base = ("--model_name_or_path", trained / "adapter", "--max_new_tokens", 6)
    result = run("05_generate.py", *base, "--prompts_file", "prompts.txt", "--output", "batch.jsonl", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    batch = [json.loads(line) for line in (tmp_path / "batch.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in batch] == prompts
    generate = load("05_generate.py")
    model, tokenizer = generate.load_model(str(trained / "adapter"), None, "float32")
    options = {"max_new_tokens": 6, "do_sample": False}
    single = [generate.generate(model, tokenizer, [prompt], False, **options)[0] for prompt in prompts]
    assert [row["answer"] for row in batch] == single
    tokenizer.padding_side = "right"
    assert generate.generate(model, tokenizer, prompts, False, **options) != single


def test_a_single_prompt_streams_raw_or_as_a_chat(trained, tmp_path):
    base = ("--model_name_or_path", trained / "adapter", "--max_new_tokens", 4)
    chat = run("05_generate.py", *base, "--prompt", "what color is the sky", cwd=tmp_path)
    raw = run("05_generate.py", *base, "--raw", "--prompt", "[INST] what color is the sky [/INST]", cwd=tmp_path)
    assert (chat.stdout.strip(), raw.stdout.strip()) == ("blue", "blue")


def test_prompts_may_be_repeated_and_sampling_is_seeded(tiny_model, tmp_path):
    base = ("--model_name_or_path", tiny_model, "--max_new_tokens", 8, "--do_sample", "--temperature", "5")
    answers = [
        run("05_generate.py", *base, "--seed", seed, "--prompt", "a", "b", "--prompt", "c", cwd=tmp_path).stdout
        for seed in (1, 1, 2)
    ]
    assert answers[0].count("> ") == 3
    assert answers[0] == answers[1] != answers[2]


BAD_TRAINING = {
    "model folder": (["--model_name_or_path", "./nowhere"], "no model at './nowhere'"),
    "data set": (["--dataset_name", "nowhere.jsonl"], "no data set at 'nowhere.jsonl'"),
    "columns": (["--dataset_name", "columns.jsonl"], "has the columns ['question']"),
    "empty": (["--dataset_name", "empty.jsonl"], "split 'train': no rows"),
    "json": (["--dataset_name", "bad.jsonl"], "line 3"),
    "null": (["--dataset_name", "null.jsonl"], "row 2"),
    "config": (["--config", "unknown.yaml"], "learning_rat"),
    "no config": (["--config", "nowhere.yaml"], "nowhere.yaml"),
    "option": (["--lerning_rate", "1"], "lerning_rate"),
    "split": (["--dataset_train_split", "test"], "'test'"),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_wrong_input_is_answered_in_a_line_or_two(case, tiny_model, question_rows, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "columns.jsonl", [{"question": "a"}])
    write_rows(tmp_path / "null.jsonl", [{"text": "a"}, {"text": None}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n{"text": \n')
    (tmp_path / "unknown.yaml").write_text("learning_rat: 1\n")
    args, said = BAD_TRAINING[case]
    command = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(question_rows), "--output_dir", "out"]
    check_refusal("02_train_lora.py", [*command, *args], said, tmp_path, monkeypatch, capsys)
    assert not (tmp_path / "out/run.json").exists()


BAD_GENERATION = {
    "model": (["--model_name_or_path", "./nowhere", "--prompt", "a"], "no model at './nowhere'"),
    "base": (["--model_name_or_path", "adapter", "--prompt", "a"], "needs its base model, and './gone' is not there"),
    "prompt": (["--model_name_or_path", "adapter"], "no prompt"),
    "file": (["--prompts_file", "nowhere.txt"], "no file 'nowhere.txt'"),
    "option": (["--promt", "a"], "--promt"),
}


@pytest.mark.parametrize("case", BAD_GENERATION)
def test_wrong_input_of_generation(case, trained, tmp_path, monkeypatch, capsys):
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "./gone"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "SHA256SUMS").unlink()
    args, said = BAD_GENERATION[case]
    check_refusal("05_generate.py", args, said, tmp_path, monkeypatch, capsys)
