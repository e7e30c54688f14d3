"""02_train_lora.py and 05_generate.py on a tiny model: what they learn, leave and say."""

import json
import runpy
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, check_refusal, load, run, start, write_rows
from datasets import Dataset
from helpers import OPTIONS, call, measure, read, read_losses, read_rows
from peft import PromptTuningConfig, get_peft_model
from peft.tuners.lora import LoraLayer, LoraModel
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

FAST = ["--learning_rate", "0.01", "--optim", "adamw_torch", "--logging_steps", "5", "--lora_dropout", "0"]
ADAPTER = "adapter/adapter_model.safetensors"


def train(model, data, output, *args):
    command = ("--model_name_or_path", model, "--dataset_name", data, "--output_dir", output)
    call("02_train_lora.py", *command, *FAST, *args)


@pytest.fixture(scope="module")
def trained(tiny_model, question_rows, tmp_path_factory):
    """Output folder of 15 epochs on the color questions, by a script that was copied out."""
    folder = tmp_path_factory.mktemp("trained")
    script = shutil.copy(ROOT / "scripts/02_train_lora.py", folder)
    command = ("--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", "lora", *FAST)
    args = ("--num_train_epochs", 15, "--lora_target_modules", "all-linear", "--dataset_test_split", "validation")
    result = run(script, *command, *args, cwd=folder)
    assert result.returncode == 0, result.stderr
    counts = read(folder / "lora/run.json")["parameters"]
    assert f"trainable params: {counts['trainable']:,} || all params: {counts['total']:,} || " in result.stdout
    assert "'loss': " in result.stderr + result.stdout
    return folder / "lora"


@pytest.fixture
def uneven_rows(question_rows, tmp_path):
    """Folder with the training rows, and held-out rows whose prompts and completions are of many lengths."""
    folder = shutil.copytree(question_rows, tmp_path / "uneven")
    rows = [
        {
            "prompt": [{"role": "user", "content": "what color is the" + " x" * number}],
            "completion": [{"role": "assistant", "content": " ".join(["red", *"abcdef"[: number % 5]])}],
        }
        for number in range(11)
    ]
    write_rows(folder / "validation.jsonl", rows)
    return folder


def test_the_result_is_what_the_tutorial_lists_and_a_record(trained, tiny_model, question_rows):
    assert {path.name for path in trained.iterdir()} == {"adapter", "checkpoints", "run.json"}
    adapter = {file.name for file in (trained / "adapter").iterdir()}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= adapter
    assert list((trained / "checkpoints").glob("runs/*/events.out.tfevents.*"))
    record = read(trained / "run.json")
    assert record["base_model"] == {"name": str(tiny_model)}
    assert record["dataset"] == {"name": str(question_rows), "rows": 28}
    assert record["arguments"]["lora_r"] == 64 and record["arguments"]["seed"] == 42
    assert 0 < record["parameters"]["trainable"] < record["parameters"]["total"]
    assert record["quantization"] is None
    assert record["arguments"]["per_device_eval_batch_size"] == 4  # takes no more memory than the training
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    chats = [row["prompt"] + row["completion"] for row in read_rows(question_rows / "train.jsonl")]
    tokens = sum(len(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)) for chat in chats)
    assert record["history"][-1]["num_input_tokens_seen"] == 15 * tokens  # padding is not counted


def test_the_loss_falls_and_the_answers_become_right(trained, tiny_model, question_rows):
    losses = read_losses(trained)
    assert losses[-1] < 0.2 * losses[0]
    generate = load("05_generate.py")
    model, tokenizer = generate.load_model(str(trained / "adapter"), None, "float32")
    questions = [row["prompt"] for row in read_rows(question_rows / "validation.jsonl")]
    answers = generate.generate(model, tokenizer, questions, False, max_new_tokens=4, do_sample=False)
    assert [answer.strip() for answer in answers] == ["blue", "green", "red", "red"]

    metrics = read(trained / "run.json")["metrics"]
    loss, tokens = measure(model, tokenizer, question_rows / "validation.jsonl")
    assert metrics["eval_loss"] == pytest.approx(loss, abs=1e-6)
    assert metrics["eval_tokens"] == tokens == 8  # the color and the EOS of four answers
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert loss < 0.5 * measure(base, tokenizer, question_rows / "validation.jsonl")[0]


def test_a_held_out_loss_is_that_of_all_tokens_whatever_the_batches(tiny_model, uneven_rows, tmp_path):
    evaluate = ("--max_steps", 2, "--dataset_test_split", "validation", "--eval_strategy", "steps", "--eval_steps", 1)
    found = {}
    for options in ("1", "3", "16", "3 --token_metrics true"):
        size, *others = options.split()
        train(tiny_model, uneven_rows, tmp_path / "lora", *evaluate, "--per_device_eval_batch_size", size, *others)
        history = read(tmp_path / "lora/run.json")["history"]
        found[options] = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        assert len(found[options]) == 3
        assert found[options] == pytest.approx(found["1"], rel=1e-6)
    model, tokenizer = load("05_generate.py").load_model(str(tmp_path / "lora/adapter"), None, "float32")
    loss, tokens = measure(model, tokenizer, uneven_rows / "validation.jsonl")
    assert found["1"][1:] == pytest.approx([loss, loss], rel=1e-6)
    assert read(tmp_path / "lora/run.json")["metrics"]["eval_tokens"] == tokens

    # Of a text all tokens count but the first.
    texts = tmp_path / "texts"
    texts.mkdir()
    rows = [{"text": " ".join("abcdefgh"[:number])} for number in range(1, 8)]
    for name in ("train.jsonl", "validation.jsonl"):
        write_rows(texts / name, rows)
    train(tiny_model, texts, tmp_path / "lora", *evaluate[:4], "--per_device_eval_batch_size", 3)
    model, tokenizer = load("05_generate.py").load_model(str(tmp_path / "lora/adapter"), None, "float32")
    loss, tokens = measure(model, tokenizer, texts / "validation.jsonl")
    metrics = read(tmp_path / "lora/run.json")["metrics"]
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-6) and metrics["eval_tokens"] == tokens

    # Where rows are packed for the training, the held-out ones come as one long row, or are packed too.
    for packed in ("false", "true"):
        options = ("--packing", "true", "--max_length", 64, "--per_device_eval_batch_size", 3, "--eval_packing", packed)
        train(tiny_model, uneven_rows, tmp_path / "lora", *evaluate[:4], *options)
        model, tokenizer = load("05_generate.py").load_model(str(tmp_path / "lora/adapter"), None, "float32")
        loss, _ = measure(model, tokenizer, uneven_rows / "validation.jsonl")
        assert read(tmp_path / "lora/run.json")["metrics"]["eval_loss"] == pytest.approx(loss, rel=1e-6)


def test_held_out_rows_without_loss_do_not_cost_the_training(tiny_model, tmp_path):
    write_rows(tmp_path / "train.jsonl", [{"prompt": "a", "completion": "b"}] * 4)
    write_rows(tmp_path / "validation.jsonl", [{"prompt": "a " * 60, "completion": "b"}])  # longer than --max_length
    args = ("--max_steps", 1, "--dataset_test_split", "validation", "--max_length", 30)
    train(tiny_model, tmp_path, tmp_path / "lora", *args)
    assert "eval_loss" not in read(tmp_path / "lora/run.json")["metrics"]


def test_the_seed_alone_orders_the_rows_and_two_runs_are_equal_to_the_bit(
    tiny_model, question_rows, tmp_path, monkeypatch
):
    trainer = load("02_train_lora.py").TokenLossTrainer
    compute_loss, batches = trainer.compute_loss, []

    def note(self, model, inputs, *args, **kwargs):
        batches.append(inputs["input_ids"].tolist())
        torch.rand(noise)  # a resumed process has its generator in another state
        return compute_loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", note)
    orders, weights = [], []
    for seed, noise in ((1, 0), (1, 7), (2, 0)):
        batches.clear()
        train(tiny_model, question_rows, tmp_path / "lora", "--num_train_epochs", 2, "--seed", seed)
        orders.append(list(batches))
        weights.append((tmp_path / "lora" / ADAPTER).read_bytes())
    assert len(orders[0]) == 14 and orders[0][:7] != orders[0][7:]  # each epoch has its own
    assert orders[0] == orders[1] != orders[2]
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.parametrize(
    ("script", "weights", "number"),
    [
        ("02_train_lora.py", ADAPTER, signal.SIGTERM),
        ("03_train_full.py", "model/model.safetensors", signal.SIGINT),
    ],
)
def test_a_script_copied_out_goes_on_after_a_signal_and_ends_as_if_nothing_had_been(
    script, weights, number, tiny_model, question_rows, tmp_path
):
    script = shutil.copy(ROOT / "scripts" / script, tmp_path)
    command = ["--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--learning_rate", "0.01"]
    command += ["--num_train_epochs", 3, "--save_steps", 5, "--logging_steps", 1]
    whole = run(script, *command, "--output_dir", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr

    # While step 5 is saved: it ends after the step that follows, in the middle of an epoch.
    at = [number, "open .*checkpoint-5/trainer_state.json"]
    stopped = start(script, *command, "--output_dir", "parts", cwd=tmp_path, signal=at).wait()
    assert stopped.returncode == 128 + number, stopped.stderr
    option = "--resume_from_checkpoint parts/checkpoints/checkpoint-6"
    assert stopped.stdout.rstrip().endswith(f"To go on: {option}")
    assert not (tmp_path / "parts/run.json").exists()
    resumed = run(script, *command, "--output_dir", "parts", *option.split(), cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert resumed.stdout.count("'loss': ") == 15  # it did not begin anew

    assert (tmp_path / "parts" / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    losses = [read_losses(tmp_path / name) for name in ("whole", "parts")]
    assert losses[0] == losses[1] and len(losses[0]) == 21
    steps = [entry["step"] for entry in read(tmp_path / "parts/run.json")["history"] if "loss" in entry]
    assert steps == list(range(1, 22))


def test_a_second_signal_stops_at_once_and_one_after_the_last_step_costs_nothing(tiny_model, question_rows, tmp_path):
    command = ["--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--max_steps", 2]
    often = [signal.SIGTERM, "open .*checkpoint-1/"]
    stopped = start("02_train_lora.py", *command, "--save_steps", 1, cwd=tmp_path, signal=often).wait()
    assert stopped.returncode == -signal.SIGTERM
    late = [signal.SIGTERM, "open .*checkpoint-2/trainer_state.json"]
    ended = start("02_train_lora.py", *command, "--output_dir", "late", cwd=tmp_path, signal=late).wait()
    assert ended.returncode == 0, ended.stderr
    assert (tmp_path / "late/run.json").exists()


def test_plain_loss_is_the_same_loss(tiny_model, question_rows, tmp_path):
    losses = []
    for setting in ("true", "false"):
        args = ("--max_steps", 4, "--logging_steps", 1, "--token_metrics", setting)
        train(tiny_model, question_rows, tmp_path / setting, *args)
        losses.append(read_losses(tmp_path / setting))
        assert ("entropy" in read(tmp_path / setting / "run.json")["history"][0]) == (setting == "true")
    assert len(losses[0]) == 4 and losses[0] == pytest.approx(losses[1], rel=1e-4)


QUESTION, ANSWER = ({"role": role, "content": text} for role, text in (("user", "a b"), ("assistant", "blue")))
# Rows, what is trained on, and how much of it carries loss.
FORMS = {
    "text": ({"text": "<s>[INST] a b [/INST] blue </s>"}, "<s> [INST] a b [/INST] blue </s>", 8),
    "text without BOS": ({"text": "a b"}, "<s> a b </s>", 4),
    "messages": ({"messages": [QUESTION, ANSWER]}, "<s> [INST] a b [/INST] blue </s>", 7),
    "chat": ({"prompt": [QUESTION], "completion": [ANSWER]}, "<s> [INST] a b [/INST] blue </s>", 2),
    "strings": ({"prompt": "a b", "completion": "blue"}, "<s> [INST] a b [/INST] blue </s>", 2),
    "strings without template": ({"prompt": "<s>a b", "completion": " blue"}, "<s> a b blue </s>", 2),
}
WRITERS = {
    ".jsonl": lambda rows, file: rows.to_json(file),
    ".json": lambda rows, file: file.write_text(json.dumps(rows.to_list())),
    ".csv": lambda rows, file: rows.to_csv(file),
    ".parquet": lambda rows, file: rows.to_parquet(file),
}


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_of_every_form_from_every_kind_of_file(form, suffix, model, tiny_model, tmp_path):
    row, expected, learned = FORMS[form]
    if suffix == ".csv" and form in ("messages", "chat"):
        pytest.skip("a CSV file has no lists")
    file = tmp_path / f"rows{suffix}"
    WRITERS[suffix](Dataset.from_list([row | {"note": "left out"}] * 3), file)
    write_rows(tmp_path / "other.jsonl", [{"else": 1}])  # in the same folder, and not read
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if form == "strings without template":
        tokenizer.chat_template = None
    rows = load("02_train_lora.py").load_rows(str(file), "train", tokenizer, OPTIONS)
    assert len(rows) == 3 and set(rows.column_names) == set(row)
    config = SFTConfig(str(tmp_path / "out"), bf16=False, report_to=[])
    trainer = SFTTrainer(model=model, args=config, train_dataset=rows, processing_class=tokenizer)
    tokens = trainer.train_dataset[0]
    assert tokenizer.decode(tokens["input_ids"]) == expected
    labels = [label for label in tokens["labels"] if label != -100]
    assert labels == tokens["input_ids"][-learned:]


def test_rows_keep_their_tools_their_own_column_and_a_bos_that_no_tokenizer_adds(tiny_model, tmp_path):
    load_rows, tokenizer = load("02_train_lora.py").load_rows, AutoTokenizer.from_pretrained(tiny_model)
    file = str(write_rows(tmp_path / "rows.jsonl", [{"messages": [QUESTION], "tools": ["x"], "source": "y"}]))
    assert load_rows(file, "train", tokenizer, OPTIONS).column_names == ["messages", "tools"]
    line = SimpleNamespace(dataset_text_field="line", chat_template_path=None, eos_token=None)
    file = str(write_rows(tmp_path / "own.jsonl", [{"line": "<s>a", "source": "y"}]))
    assert load_rows(file, "train", tokenizer, line)[0] == {"line": "a"}
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    assert load_rows(file, "train", tokenizer, line)[0] == {"line": "<s>a"}


def test_an_adapter_of_a_hub_model_names_the_hub_id(tiny_model, question_rows, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "run.json").write_text('{"base_model": {"name": "org/base", "revision": "abc"}}')
    train(model, question_rows, tmp_path / "lora", "--max_steps", 1)
    config = read(tmp_path / "lora/adapter/adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == ("org/base", "abc")
    assert read(tmp_path / "lora/run.json")["base_model"] == {"name": "org/base", "revision": "abc"}


def test_config_file_sets_and_command_line_overrides(tiny_model, question_rows, tmp_path):
    (tmp_path / "recipe.yaml").write_text("lora_r: 4\nmax_steps: 3\nuse_dora: true\n")
    train(tiny_model, question_rows, tmp_path / "lora", "--config", tmp_path / "recipe.yaml", "--max_steps", 1)
    record = read(tmp_path / "lora/run.json")
    assert (record["arguments"]["lora_r"], record["arguments"]["max_steps"]) == (4, 1)
    assert record["history"][-1]["step"] == 1
    assert read(tmp_path / "lora/adapter/adapter_config.json")["use_dora"]


def test_a_batch_of_prompts_answers_as_one_at_a_time(trained, tmp_path, capsys):
    prompts = ["what color is the sky", "a", "what color is the sea x x x x", "b"]
    (tmp_path / "prompts.txt").write_text("\n\n".join(prompts) + "\n", encoding="utf-8-sig")
    base = ("--model_name_or_path", trained / "adapter", "--max_new_tokens", 6)
    call("05_generate.py", *base, "--prompts_file", tmp_path / "prompts.txt", "--output", tmp_path / "batch.jsonl")
    batch = read_rows(tmp_path / "batch.jsonl")
    assert [row["prompt"] for row in batch] == prompts
    shown = capsys.readouterr().out
    assert all(f"> {row['prompt']}\n{row['answer'].strip()}\n" in shown for row in batch)
    generate = load("05_generate.py")
    model, tokenizer = generate.load_model(str(trained / "adapter"), None, "float32")
    options = {"max_new_tokens": 6, "do_sample": False}
    single = [generate.generate(model, tokenizer, [prompt], False, **options)[0] for prompt in prompts]
    assert [row["answer"] for row in batch] == single
    tokenizer.padding_side = "right"
    assert generate.generate(model, tokenizer, prompts, False, **options) != single


def test_a_single_prompt_streams_raw_or_as_a_chat(trained, tmp_path):
    script = shutil.copy(ROOT / "scripts/05_generate.py", tmp_path)
    base = ("--model_name_or_path", trained / "adapter", "--max_new_tokens", 4)
    chat = run(script, *base, "--prompt", "what color is the sky", cwd=tmp_path)
    raw = run(script, *base, "--raw", "--prompt", "[INST] what color is the sky [/INST]", cwd=tmp_path)
    assert (chat.stdout.strip(), raw.stdout.strip()) == ("blue", "blue"), chat.stderr


def test_prompts_may_be_repeated_and_sampling_is_seeded(tiny_model, capsys):
    base = ("--model_name_or_path", tiny_model, "--max_new_tokens", 8, "--do_sample", "--temperature", "5")
    answers = []
    for seed in (1, 1, 2):
        call("05_generate.py", *base, "--seed", seed, "--prompt", "a", "b", "--prompt", "c")
        answers.append(capsys.readouterr().out)
    assert answers[0].count("> ") == 3
    assert answers[0] == answers[1] != answers[2]


def test_an_adapter_without_a_tokenizer_takes_that_of_its_base(trained, tmp_path):
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    (adapter / "tokenizer_config.json").unlink()
    (adapter / "tokenizer.json").unlink()
    generate = load("05_generate.py")
    model, tokenizer = generate.load_model(str(adapter), None, "float32")
    question = ["what color is the sky"]
    assert generate.generate(model, tokenizer, question, False, max_new_tokens=4, do_sample=False)[0].strip() == "blue"


@pytest.mark.parametrize("name", ["05_generate.py", "06_pipeline_infer.py"])
def test_weights_are_float32_on_the_cpu_and_else_as_stored(name, trained, tmp_path, monkeypatch):
    assert load(name).DTYPE == "float32"
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    assert runpy.run_path(str(ROOT / "scripts" / name))["DTYPE"] == "auto"
    merged, merge = [], LoraModel.merge_and_unload
    monkeypatch.setattr(LoraModel, "merge_and_unload", lambda model: merged.append(name) or merge(model))
    question = ["--prompt", "what color is the sky", "--max_new_tokens", 4, "--output", tmp_path / "answer.jsonl"]
    for dtype in ("float32", "bfloat16"):  # in float32 alone is the adapter merged, and by 05 alone
        call(name, "--model_name_or_path", trained / "adapter", *question, "--dtype", dtype)
        assert read_rows(tmp_path / "answer.jsonl")[0]["answer"].strip() == "blue"
        assert merged == ["05_generate.py"] * (name == "05_generate.py")


def test_an_adapter_that_cannot_be_merged_stays_beside_its_base(tiny_model, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(base, config).save_pretrained(tmp_path / "adapter")
    generate = load("05_generate.py")
    model, tokenizer = generate.load_model(str(tmp_path / "adapter"), str(tiny_model), "float32", merge=True)
    assert generate.generate(model, tokenizer, ["what"], False, max_new_tokens=1, do_sample=False)
    merged, _ = generate.load_model(str(tmp_path / "adapter"), str(tiny_model), "float32")
    assert type(model) is type(merged)


@pytest.mark.parametrize("script", ["02_train_lora.py", "03_train_full.py"])
def test_weights_go_straight_to_the_device_of_the_training(script, tiny_model, question_rows, tmp_path, monkeypatch):
    module, given = load(script), []

    def stop(name, **options):
        given.append(options["device_map"])
        raise InterruptedError

    monkeypatch.setattr(module.AutoModelForCausalLM, "from_pretrained", stop)
    monkeypatch.setattr(module.Config, "device", torch.device("cuda:0"))
    with pytest.raises(InterruptedError):
        call(script, "--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", tmp_path)
    assert given == [torch.device("cuda:0")]


@pytest.mark.parametrize("bf16", [False, True])
def test_peft_casts_nothing_where_autocast_does(bf16, tiny_model, question_rows, tmp_path, monkeypatch):
    module, seen = load("02_train_lora.py"), []

    class Trainer(module.TokenLossTrainer):
        def compute_loss(self, model, *args, **kwargs):
            seen.extend(layer.cast_input_dtype_enabled for layer in model.modules() if isinstance(layer, LoraLayer))
            return super().compute_loss(model, *args, **kwargs)

    monkeypatch.setattr(module, "TokenLossTrainer", Trainer)
    command = ["--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", tmp_path / "out"]
    call("02_train_lora.py", *command, "--max_steps", 1, "--bf16", bf16, *(["--use_cpu", "true"] if bf16 else []))
    assert set(seen) == {not bf16}


BAD_TRAINING = {
    "model folder": (["--model_name_or_path", "./nowhere"], "no model at './nowhere'"),
    "data set": (["--dataset_name", "nowhere.jsonl"], "no data set at 'nowhere.jsonl'"),
    "held-out rows of a file": (
        ["--dataset_name", "rows.jsonl", "--dataset_test_split", "validation"],
        "Unknown split \"validation\". Should be one of ['train']",
    ),
    "all weights": (["--use_peft", "false"], "all weights: 03_train_full.py"),
    "an adapter": (["--model_name_or_path", "adapter"], "an adapter first: 04_merge_adapter.py"),
    "columns": (
        ["--dataset_name", "columns.jsonl"],
        "has {'question': Value('string')}: no words in row 1 as text, messages, or prompt",
    ),
}


@pytest.mark.parametrize("case", BAD_TRAINING)
def test_a_likely_mistake_is_answered_in_a_line(case, tiny_model, question_rows, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "columns.jsonl", [{"question": "a"}])
    write_rows(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    args, said = BAD_TRAINING[case]
    command = ["--model_name_or_path", str(tiny_model), "--dataset_name", str(question_rows), "--output_dir", "out"]
    check_refusal("02_train_lora.py", [*command, *args], said, tmp_path, monkeypatch, capsys)
    assert not (tmp_path / "out/run.json").exists()


BAD_GENERATION = {
    "model": (["--model_name_or_path", "./nowhere", "--prompt", "a"], "no model at './nowhere'"),
    "base": (["--model_name_or_path", "adapter", "--prompt", "a"], "no model at './gone'"),
    "prompt": (["--model_name_or_path", "adapter"], 'no prompt. Give --prompt "What is LoRA?"'),
    "template": (["--model_name_or_path", "plain", "--prompt", "a"], "has no chat template. Add --raw"),
}


@pytest.mark.parametrize("case", BAD_GENERATION)
def test_a_likely_mistake_in_generation(case, trained, tiny_model, tmp_path, monkeypatch, capsys):
    adapter = shutil.copytree(trained / "adapter", tmp_path / "adapter")
    config = read(adapter / "adapter_config.json") | {"base_model_name_or_path": "./gone"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (shutil.copytree(tiny_model, tmp_path / "plain") / "chat_template.jinja").unlink()
    args, said = BAD_GENERATION[case]
    check_refusal("05_generate.py", args, said, tmp_path, monkeypatch, capsys)
