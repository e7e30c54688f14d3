"""make try: what a training would do, without the weights of its model."""

import os
import shlex
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from conftest import ROOT, load, run, write_rows
from datasets import Dataset
from helpers import call, read
from test_hub import hub, read_files  # noqa: F401
from test_makefile import Project
from transformers import AutoTokenizer, BertConfig, Gemma3TextConfig, LlamaConfig, T5Config

RECIPE = ("--lora_dropout", "0", "--optim", "adamw_torch_fused")
HEADS = ["model", "rows", "lengths", "steps", "memory", "disk", "time", "missing", "next"]
CHAT = [{"role": "user", "content": "what color is the sky"}, {"role": "assistant", "content": "blue"}]


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """A machine of 4 GiB without accelerator, which is not asked."""
    monkeypatch.setattr(load("chain/try_out.py"), "find_memory", lambda torch, root: ("cpu", "the CPU", 4 * 2**30))
    monkeypatch.setattr(load("chain/try_out.py").doctor, "run_probe", lambda *args: {"status": "passed", "facts": {}})
    monkeypatch.delenv("MAKEFLAGS", raising=False)


@pytest.fixture
def bare_model(tiny_model, tmp_path):
    """The tiny model without its weights."""
    return shutil.copytree(tiny_model, tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))


@pytest.fixture
def try_out(tmp_path, capsys):
    """Tries a model and a data set; returns what is written of it, and what is printed."""

    def run_script(model, data, *args) -> tuple[dict, str]:
        (report := tmp_path / "out/check/try.json").unlink(missing_ok=True)
        status = 0
        try:
            where = ("--out", tmp_path / "out", "--output", report)
            call("chain/try_out.py", "--model_name_or_path", model, "--dataset_name", data, *where, *RECIPE, *args)
        except SystemExit as stop:
            status = stop.code
        facts, said = read(report), capsys.readouterr().out
        assert status == bool(facts["missing"])
        return facts, said

    return run_script


def make_config(folder, tiny_model, config):
    """A folder with this config and the tiny model's tokenizer."""
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


def list_heads(said: str) -> list[str]:
    return [line.split()[0] for line in said.splitlines() if line.startswith(tuple(HEADS))]


def test_all_is_said_without_weights_and_only_these_are_missing(bare_model, question_rows, try_out):
    facts, said = try_out(bare_model, question_rows)
    assert list_heads(said) == HEADS
    (missing,) = facts["missing"]
    assert "safetensors" in missing and str(bare_model) in missing
    assert "22,240 parameters" in said and "LoRA trains 16,384 more, on q_proj, v_proj" in said
    assert "28: prompt and completion" in said and "held out: 4 of its own" in said
    assert "[INST] what color is the" in said and " [/INST][[" in said  # a row, and what is learned of it
    assert facts["steps"] == 7 and facts["seconds"] > 0
    assert facts["next"] == f"make train-lora BASE_MODEL={bare_model} DATASET={question_rows}"
    assert "\nnext     after that: make train-lora" in said


def test_with_weights_nothing_is_missing_and_nothing_is_left_but_the_report(
    tiny_model, question_rows, tmp_path, try_out
):
    before = read_files(tiny_model)
    facts, said = try_out(tiny_model, question_rows)
    assert facts["missing"] == [] and "\nmissing  nothing\nnext     make train-lora " in said
    assert [path.name for path in (tmp_path / "out").rglob("*")] == ["check", "try.json"]
    assert read_files(tiny_model) == before


def test_lengths_are_those_of_the_rows_and_what_is_cut_is_counted(tiny_model, tmp_path, try_out):
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": " ".join(["a"] * number)} for number in range(1, 101)])
    _, said = try_out(tiny_model, rows, "--max_length", "52")  # with BOS and EOS each has two tokens more
    assert "10 % up to 12, 50 % up to 52, 90 % up to 92, 99 % up to 101, longest 102" in said
    assert "--max_length 52 cuts 50 of 100 rows (50.0%)" in said


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ((), 7),
        (("--num_train_epochs", "1.5"), 11),
        (("--gradient_accumulation_steps", "2"), 4),
        (("--per_device_train_batch_size", "5"), 6),
        (("--max_steps", "3"), 3),
    ],
)
def test_steps_are_those_of_the_training(options, steps, tiny_model, question_rows, tmp_path):
    """The arithmetic against a training."""
    audit = load("chain/audit_tokens.py")
    sources = ("--model_name_or_path", tiny_model, "--dataset_name", question_rows)
    call("02_train_lora.py", *sources, *RECIPE, *options, "--output_dir", tmp_path)
    assert read(tmp_path / "run.json")["history"][-1]["step"] == steps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["audit", *map(str, sources), *options])
        assert load("chain/estimate.py").count_steps(28, 8, audit.read_options()[2]) == steps


def test_what_is_wrong_is_named_and_the_rest_is_said(tiny_model, bare_model, tmp_path, try_out):
    (bare_model / "chat_template.jinja").unlink()
    facts, said = try_out(bare_model, write_rows(tmp_path / "chat.jsonl", [{"messages": CHAT}]))
    assert list_heads(said) == ["model", "rows", "memory", "disk", "missing", "next"]
    assert "no chat template" in facts["missing"][1] and "--chat_template_path" in facts["missing"][1]
    no_end = write_rows(tmp_path / "twice.jsonl", [{"text": "<s> <s> a"}])  # refused, when its tokens are counted
    facts, said = try_out(tiny_model, no_end)
    assert list_heads(said) == HEADS and "longest" in said
    (missing,) = facts["missing"]
    assert "<s> twice" in missing


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--validation_rows", "28"), "VALIDATION_ROWS) is 28: give 0 to 27"),
        (("--lora_target_modules", "wrong"), "model: --lora_target_modules: Target modules wrong not found"),
        (("--model_name_or_path", "no/such/model"), "model: there is no {}/no/such/model. Give a folder, or a hub id"),
        (("--dataset_name", "no.jsonl"), "rows: there is no file {}/no.jsonl. Give one that there is"),
    ],
)
def test_each_mistake_is_a_line(options, said, tiny_model, question_rows, tmp_path, try_out, monkeypatch):
    monkeypatch.chdir(tmp_path)
    facts, printed = try_out(tiny_model, question_rows / "train.jsonl", *options)
    assert len(facts["missing"]) == 1 and said.format(tmp_path) in facts["missing"][0]
    assert "Traceback" not in printed


def test_an_option_that_no_training_has_ends_at_once(tiny_model, question_rows, capsys):
    with pytest.raises(SystemExit) as stop:
        call("chain/try_out.py", "--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--lora_r", "x")
    assert stop.value.code.startswith("error: ") and "--lora_r" in stop.value.code and capsys.readouterr().out == ""


@pytest.mark.parametrize("config", [BertConfig(architectures=["BertModel"]), T5Config(architectures=["T5Model"])])
def test_a_model_of_another_kind_is_refused_by_its_config(config, tiny_model, question_rows, tmp_path, try_out):
    facts, said = try_out(make_config(tmp_path / "model", tiny_model, config), question_rows)
    assert (
        f"is a {config.architectures[0]} (" in facts["missing"][1] and "Give one of text alone" in facts["missing"][1]
    )
    assert list_heads(said) == ["rows", "missing", "next"]


def test_llama_2_is_counted_and_does_not_fit(tiny_model, question_rows, tmp_path, try_out):
    config = LlamaConfig(bos_token_id=1, eos_token_id=2, dtype="float16")
    model = make_config(tmp_path / "llama", tiny_model, config)
    memory = load("chain/memory.py").predict_memory
    facts, said = try_out(model, question_rows, "--max_steps", "250")
    assert "6,738,415,616 parameters in float16" in said and "LoRA trains 33,554,432 more" in said
    settings = load("chain/memory.py").SETTINGS | {"lora_dropout": 0.0, "optim": "adamw_torch_fused"}
    longest = facts["tokens"]["longest_row"]
    for each, method in zip(facts["memory"], ("lora", "lora", "full"), strict=True):
        assert each["bytes"] == memory(config.to_dict(), method, each["settings"], longest, "cpu")
    assert facts["memory"][0]["settings"] == settings and facts["memory"][1]["settings"]["load_in_4bit"]
    lines = [line for line in said.splitlines() if "does not fit" in line]
    assert [line.split()[0] for line in lines] == ["LoRA", "QLoRA", "full"]
    assert "lora needs" in facts["missing"][1] and "--force" not in facts["missing"][1]
    # 250 steps leave three checkpoints for a moment: weights and two values of Adam, and the model itself
    assert facts["disk"]["full"] == 3 * (12 * 6_738_415_616 + 2**25) + 4 * 6_738_415_616
    assert facts["disk"]["LoRA"] == 3 * (12 * 33_554_432 + 2**25) + 4 * 33_554_432
    assert facts["disk"]["merged"] == 2 * 6_738_415_616 and facts["disk"]["base model"] == 0
    assert "not measured: 2 layers take 4.7 GiB, there are 4.0" in said


def test_a_share_of_the_steps_is_as_many_checkpoints(tiny_model, question_rows, try_out):
    facts, _ = try_out(tiny_model, question_rows, "--save_steps", "0.5")  # of 7, after the 4th and at the end
    assert facts["disk"]["LoRA"] == 2 * (12 * 16_384 + 2**25) + 4 * 16_384


def test_a_full_disk_is_missing(tiny_model, question_rows, try_out, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10**6))
    facts, _ = try_out(tiny_model, question_rows)
    assert facts["missing"] == ["disk: base model and LoRA take 0.03 GB. Make room, or take another folder (OUT)"]


@pytest.mark.parametrize("most", [10**9, 4 * 10**6])  # all layers are measured, or some
def test_the_time_is_that_of_all_layers_and_all_tokens_of_a_step(most, tiny_model, tmp_path, try_out, monkeypatch):
    """On a machine where a pass takes a second for each layer and each thousand tokens, and two besides."""
    config = LlamaConfig(
        vocab_size=26, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=4,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=256,
    )  # fmt: skip
    model = make_config(tmp_path / "model", tiny_model, config)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a b" + " x" * 120}] * 32)
    estimate = load("chain/estimate.py")
    monkeypatch.setattr(estimate, "MOST_PARAMETERS", most)
    passes = lambda model, ids, bf16: (2 + model.config.num_hidden_layers) * ids.numel() / 1000  # noqa: E731
    monkeypatch.setattr(estimate, "time_pass", passes)
    facts, said = try_out(model, rows, "--gradient_accumulation_steps", "2", "--num_train_epochs", "1")
    assert f"expected, from {6 if most == 10**9 else 4} of its 6 layers" in said
    tokens = len(AutoTokenizer.from_pretrained(tiny_model)("a b" + " x" * 120).input_ids) + 1  # and EOS
    assert facts["seconds"] == pytest.approx(8 * 32 * tokens / 1000, rel=0.01)


def test_layers_of_several_kinds_are_cut_to_the_first(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=8, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1,
    )  # fmt: skip
    model = load("chain/estimate.py").build(config, 2)
    assert len(model.model.layers) == 2 and len(model.config.layer_types) == 2 and config.num_hidden_layers == 8


@pytest.mark.parametrize(
    ("options", "said", "steps"),
    [
        ((), "90, the first 20 are read here: text", 23),
        (("--rows", "40"), ": 40, the first 20", 10),
        (("--rows", "10"), ": 10: text", 3),
        (("--rows", "20"), ": 20: text", 5),
        (("--validation_rows", "10"), "held out: the last 10", 20),
        (("--validation_rows", "91"), "VALIDATION_ROWS=91 of 90. Give fewer", 0),
    ],
)
def test_the_first_rows_are_read_and_all_are_counted(options, said, steps, tiny_model, tmp_path, try_out, monkeypatch):
    monkeypatch.setattr(load("chain/try_out.py"), "FIRST", 20)
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a b c" + " d" * (number % 3)} for number in range(90)])
    facts, printed = try_out(tiny_model, rows, *options)
    assert said in printed and facts["steps"] == steps and facts["rows"]["read"] in (10, 20)


def count(name, **given) -> tuple[int, str]:
    args = {"dataset_config": None, "dataset_train_split": None, "dataset_test_split": None, "dataset_revision": "main"}
    return load("chain/estimate.py").count_rows(SimpleNamespace(dataset_name=str(name), **(args | given)), 20)


def test_rows_that_are_not_read_are_counted(tmp_path, monkeypatch):
    rows = [{"text": f"row {number}"} for number in range(1500)]
    write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "folder").mkdir()
    for number in range(2):
        Dataset.from_list(rows).to_parquet(tmp_path / f"folder/train-{number}.parquet")
    write_rows(tmp_path / "folder/test.jsonl", rows)
    assert count(tmp_path / "rows.jsonl") == (1500, "") and count(tmp_path / "folder") == (3000, "")
    monkeypatch.setattr(load("chain/estimate.py"), "COUNTING", -1)
    assert count(tmp_path / "rows.jsonl") == (1000, "at least ")


def test_rows_of_a_hub_are_those_that_its_card_counts(monkeypatch):
    infos = [
        {"config_name": name, "splits": [{"name": "test", "num_examples": 9}, {"name": "train", "num_examples": rows}]}
        for name, rows in (("main", 7473), ("socratic", 7000))
    ]
    estimate = load("chain/estimate.py")
    monkeypatch.setattr(estimate.download, "describe", lambda *args: {"revision": "c0ffee"})
    monkeypatch.setattr(estimate, "list_files", lambda *args: (None, [], {"dataset_info": infos}))
    assert count("org/gsm", dataset_config="socratic") == (7000, "")
    assert count("org/gsm", dataset_config="main", dataset_train_split="test") == (9, "")
    monkeypatch.setattr(
        estimate, "list_files", lambda *args: (None, [], {"dataset_info": infos[0] | {"config_name": "default"}})
    )
    assert count("org/gsm") == (7473, "") and count("org/gsm", dataset_train_split="x") == (20, "at least ")
    monkeypatch.setattr(estimate, "list_files", lambda *args: (None, [], None))
    assert count("org/gsm") == (20, "at least ")


def test_a_recipe_that_make_would_choose_is_taken(tiny_model, question_rows, try_out, monkeypatch):
    recipe = ROOT / "env/recipes/embedded.yaml"

    def choose(command, **options):
        assert command[1].endswith("choose_fast.py") and command[command.index("--config") + 1] == str(recipe)
        file = command[command.index("--output") + 1]
        shutil.copy(ROOT / "env/recipes/embedded-throughput.yaml", file)
        return SimpleNamespace(stderr="")

    monkeypatch.setattr("subprocess.run", choose)
    facts, _ = try_out(tiny_model, question_rows, "--fast", "--config", recipe)
    assert facts["steps"] == 3


def test_make_tries_with_the_recipe_of_a_training_and_makes_nothing(tmp_path):
    project = Project(tmp_path / "project")
    project.make(
        "try", "BASE_MODEL=org/my model", "DATASET=my.jsonl", "VALIDATION_ROWS=5", "ARGS=--lora_r 8", "OUT=new"
    )
    (command,) = project.commands()
    assert command == (
        "scripts/chain/try_out.py --model_name_or_path=org/my model --dataset_name=my.jsonl --validation_rows=5 "
        "--out new --output new/check/try.json --lora_r 8"
    )
    assert not (project.folder / "new/base-model").exists() and not (project.folder / "new/dataset").exists()
    project.make("try")
    assert "--model_name_or_path=embedded" in project.commands()[0]
    assert "--config env/recipes/embedded.yaml" in project.commands()[0] and "--fast" not in project.commands()[0]
    project.make("try", "RECIPE=fast")
    assert "--config env/recipes/embedded.yaml --fast" in project.commands()[0]


def test_the_next_command_has_the_variables_of_make(tmp_path, monkeypatch):
    given = ["DATASET=it's a \\file $$1", "OUT=a", "ARGS=--lora_r 8 --eos_token '<|end|>'"]
    (tmp_path / "Makefile").write_text("try:\n\t@printenv MAKEFLAGS\n")
    clean = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    flags = subprocess.run(["make", "-s", *given], cwd=tmp_path, env=clean, capture_output=True, text=True).stdout
    monkeypatch.setenv("MAKEFLAGS", flags.removesuffix("\n"))
    args = SimpleNamespace(model_name_or_path="embedded", dataset_name="it's a \\file $1")
    name_next = load("chain/try_out.py").name_next
    assert shlex.split(name_next(args)) == ["make", "train-lora", *given]
    monkeypatch.delenv("MAKEFLAGS")  # where they come from the environment
    args = SimpleNamespace(model_name_or_path="model", dataset_name="my data")
    assert shlex.split(name_next(args)) == ["make", "train-lora", "BASE_MODEL=model", "DATASET=my data"]
    args = SimpleNamespace(model_name_or_path="embedded", dataset_name="data")
    assert name_next(args) == "make train-lora"
    monkeypatch.setenv("MAKEFLAGS", "s -- ARGS=--model_revision\\ v1\\ --lora_r\\ 8\\ --dataset_revision=v2 OUT=a")
    download = "make download OUT=a ARGS='--model_revision v1 --dataset_revision=v2'"
    assert name_next(args) == f"{download} && make train-lora OUT=a ARGS='--lora_r 8'"


@pytest.mark.parametrize("name", ["org/tiny", "org/gated"])
def test_of_a_hub_no_weights_are_fetched(name, hub, tmp_path):  # noqa: F811
    sources = ("--model_name_or_path", name, "--dataset_name", "org/rows", "--output", "try.json", *RECIPE)
    sources += ("--model_revision", "v1")
    hub.asked.clear()
    result = run(ROOT / "scripts/chain/try_out.py", *sources, cwd=tmp_path)
    assert "Traceback" not in result.stderr
    facts = read(tmp_path / "try.json")
    asked = [path for _, path, *_ in hub.asked]
    assert not [path for path in asked if path.endswith(".safetensors")] and not [*hub.cache.rglob("*.safetensors")]
    if name == "org/tiny":
        assert facts["missing"] == [] and result.returncode == 0
        assert [path for path in asked if path.endswith("/tokenizer.json")]
        assert facts["disk"]["base model"] == 4 * 22_240  # the imitated hub does not state sizes
        assert "org/tiny: llama, 22,240 parameters" in result.stdout
    else:
        (missing,) = facts["missing"]
        assert "org/gated is gated" in missing and "ask for access at https://huggingface.co/org/gated" in missing
        assert "rows     org/rows" in result.stdout and result.returncode == 1
