"""The recipe fast: what is chosen where, that it learns the same, and that packed rows do not see each other."""

import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from conftest import ROOT, Process, load, run, write_rows
from datasets import Dataset
from helpers import call, read
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    BloomForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
)

script = load("chain/choose_fast.py")
# Exit status 0 where a recipe has a setting that is true, else 3.
SPARING = "import sys, yaml\nsys.exit(0 if yaml.safe_load(open(sys.argv[1])).get(sys.argv[2]) else 3)"


def machine(monkeypatch, gpu: bool, bf16: bool, packages: tuple = ()) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": bf16})
    monkeypatch.setattr(script, "find_spec", lambda name: name in packages or None)
    monkeypatch.setattr(script, "distributions", lambda name: [name] * (name in packages))


def chosen(method: str) -> dict:
    return {name: value for name, (value, reason) in script.choose(method, {}).items()}


def test_what_is_chosen_on_which_machine(monkeypatch):
    fused = {"optim": "adamw_torch_fused"}
    machine(monkeypatch, gpu=False, bf16=False)
    assert chosen("lora") == chosen("full") == fused
    machine(monkeypatch, gpu=False, bf16=True)
    on_cpu = fused | {"bf16": True, "use_cpu": True}
    assert chosen("lora") == on_cpu | {"dtype": "bfloat16"}
    assert chosen("full") == on_cpu  # the weights that are trained stay float32
    machine(monkeypatch, gpu=True, bf16=True)
    assert chosen("lora") == fused | {"bf16": True, "dtype": "bfloat16"}
    machine(monkeypatch, gpu=True, bf16=True, packages=("flash-attn", "liger_kernel", "triton"))
    flash = {"attn_implementation": "flash_attention_2", "use_liger_kernel": True}
    assert chosen("full") == fused | {"bf16": True} | flash
    machine(monkeypatch, gpu=True, bf16=False, packages=("flash-attn", "liger_kernel", "triton"))
    assert chosen("lora") == fused | {"use_liger_kernel": True}  # FlashAttention has no float32
    machine(monkeypatch, gpu=True, bf16=False, packages=("liger_kernel",))
    assert chosen("lora") == fused


def test_the_other_settings_of_the_recipe_stay(tmp_path):
    for recipe, method in (("embedded.yaml", "lora"), ("embedded-full.yaml", "full")):
        base = ROOT / "env/recipes" / recipe
        result = run(
            "chain/choose_fast.py", "--method", method, "--config", base, "--output", "out/fast.yaml", cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        written = yaml.safe_load((tmp_path / "out/fast.yaml").read_text())
        expected = {name: value for name, (value, _) in script.choose(method, {}).items()}
        assert written == yaml.safe_load(base.read_text()) | expected
        assert all(f"{name} {value}" in result.stdout for name, value in expected.items())


def test_an_optimizer_of_another_kind_and_kernels_that_the_recipe_names_stay(tmp_path, monkeypatch):
    machine(monkeypatch, gpu=True, bf16=True, packages=("liger_kernel", "triton"))
    for own in ({"optim": "lion_32bit"}, {"optim": "paged_adamw_8bit"}, {"use_liger_kernel": False}):
        assert script.keep_own(own, script.choose("full", {})).keys() == script.choose("full", {}).keys() - own.keys()
    for same in ("paged_adamw_32bit", "adamw_torch"):
        assert script.keep_own({"optim": same}, script.choose("full", {})) == script.choose("full", {})
    # However the recipe is written, what is written from it is one.
    (tmp_path / "base.yaml").write_text("{lora_r: 8, optim: paged_adamw_32bit, learning_rate: 1.0e-5}")
    command = ["--method", "lora", "--config", "base.yaml", "--output", "fast.yaml"]
    assert run("chain/choose_fast.py", *command, cwd=tmp_path).returncode == 0
    written = yaml.safe_load((tmp_path / "fast.yaml").read_text())
    assert (written["lora_r"], written["optim"], written["learning_rate"]) == (8, "adamw_torch_fused", 1e-5)


@pytest.mark.parametrize("bf16", [True, False])
def test_what_would_contradict_the_recipe_is_not_chosen(bf16, tmp_path, monkeypatch, capsys):
    machine(monkeypatch, gpu=True, bf16=bf16, packages=("flash-attn",))
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("fp16: true\nattn_implementation: eager\nlora_r: 8\n")
    command = ["choose_fast.py", "--method", "full", "--config", "base.yaml", "--output", "fast.yaml"]
    monkeypatch.setattr("sys.argv", command)
    with pytest.raises(SystemExit) as stop:
        script.main()
    assert stop.value.code == 0 and "attn_implementation" not in capsys.readouterr().out
    expected = {"attn_implementation": "eager", "lora_r": 8, "optim": "adamw_torch_fused"}
    # The trainer refuses bf16 and fp16 at once.
    assert yaml.safe_load(Path("fast.yaml").read_text()) == expected | ({"bf16": True} if bf16 else {"fp16": True})


def test_less_memory_is_taken_where_the_command_fails(tmp_path, monkeypatch):
    command = [sys.executable, "-c", SPARING, "fast.yaml", "gradient_checkpointing"]
    result = run("chain/choose_fast.py", "--method", "lora", "--output", "fast.yaml", "--", *command, cwd=tmp_path)
    assert result.returncode == 0 and "That does not fit." in result.stdout
    written = yaml.safe_load((tmp_path / "fast.yaml").read_text())
    assert written["gradient_checkpointing"] is True and written["optim"] == "adamw_torch_fused"
    machine(monkeypatch, gpu=True, bf16=True)
    assert [sorted(less) for less in script.list_attempts({}, [])] == [
        [], ["token_metrics"], ["gradient_checkpointing"], ["gradient_checkpointing", "token_metrics"]
    ]  # fmt: skip


def test_the_rows_of_a_step_stay_together_where_the_memory_does_not_suffice_for_all_at_once(monkeypatch):
    machine(monkeypatch, gpu=True, bf16=True)
    recipe = yaml.safe_load((ROOT / "env/recipes/throughput.yaml").read_text())
    attempts = [{name: value for name, (value, _) in less.items()} for less in script.list_attempts(recipe, [])]
    sizes = [recipe | less for less in attempts]
    rows = [(each["per_device_train_batch_size"], each.get("gradient_accumulation_steps", 1)) for each in sizes]
    assert rows == [(16, 1), (8, 2), *[(4, 4)] * 4]
    for option in ("--per_device_train_batch_size", "--gradient-accumulation-steps=1"):  # which goes before a recipe
        assert not any("gradient_accumulation_steps" in less for less in script.list_attempts(recipe, ["x", option]))
    sparing = {"token_metrics", "gradient_checkpointing"}
    assert [len(sparing & less.keys()) for less in attempts] == [0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(("status", "saves"), [(3, True), (5, False)])
def test_the_status_of_the_command_is_passed_on_and_only_3_is_about_memory(status, saves, tmp_path):
    command = [sys.executable, "-c", f"raise SystemExit({status})"]
    result = run("chain/choose_fast.py", "--method", "lora", "--output", "fast.yaml", "--", *command, cwd=tmp_path)
    assert result.returncode == status
    assert ("gradient_checkpointing" in yaml.safe_load((tmp_path / "fast.yaml").read_text())) == saves


def test_what_was_chosen_is_kept_if_it_may_be_chosen_still(tmp_path):
    command = ["chain/choose_fast.py", "--method", "lora", "--output", "fast.yaml"]
    sparing = [sys.executable, "-c", SPARING, "fast.yaml", "gradient_checkpointing"]
    assert run(*command, "--", *sparing, cwd=tmp_path).returncode == 0
    sparing_recipe = (tmp_path / "fast.yaml").read_text()
    for options, kept in ((["--keep"], True), ([], False)):  # now that all would fit
        assert run(*command, *options, "--", sys.executable, "-c", "", cwd=tmp_path).returncode == 0
        assert ((tmp_path / "fast.yaml").read_text() == sparing_recipe) == kept
    (tmp_path / "fast.yaml").write_text("bf16: false\n")
    assert run(*command, "--keep", cwd=tmp_path).returncode == 0
    assert yaml.safe_load((tmp_path / "fast.yaml").read_text())["optim"] == "adamw_torch_fused"


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        (None, "cannot read base.yaml: "),
        ("optim: [", "cannot read base.yaml: "),
        ("- optim", "base.yaml has no settings"),
    ],
)
def test_a_recipe_that_is_none_is_named(recipe, said, tmp_path):
    if recipe:
        (tmp_path / "base.yaml").write_text(recipe)
    result = run(
        "chain/choose_fast.py", "--method", "lora", "--config", "base.yaml", "--output", "f.yaml", cwd=tmp_path
    )
    assert result.returncode == 1 and result.stderr.startswith(f"error: {said}") and result.stderr.count("\n") == 1
    assert not (tmp_path / "f.yaml").exists()


@pytest.mark.parametrize(("trainer", "method"), [("02_train_lora.py", "lora"), ("03_train_full.py", "full")])
def test_fast_learns_the_same(trainer, method, tiny_model, question_rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        call("chain/choose_fast.py", "--method", method, "--output", "fast.yaml")
    common = ["--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--dataset_test_split", "validation"]
    common += ["--learning_rate", "0.003", "--num_train_epochs", "2", "--save_strategy", "no"]
    losses = {}
    for name, options in (("plain", ["--optim", "adamw_torch_fused"]), ("fast", ["--config", "fast.yaml"])):
        call(trainer, *common, *options, "--output_dir", name)
        record = read(tmp_path / name / "run.json")
        losses[name] = record["metrics"]["eval_loss"]
        if name == "fast":
            written = yaml.safe_load((tmp_path / "fast.yaml").read_text())
            assert written.items() <= record["arguments"].items()
    # So small a model feels the rounding; a real one stays within 1 % (docs/performance.md).
    assert losses["fast"] == pytest.approx(losses["plain"], rel=0.05) and losses["fast"] < 2.5


def packed_batch(tiny_model, question_rows, tmp_path, monkeypatch) -> dict:
    """The first batch of 02_train_lora.py --packing true."""
    module, batches = load("02_train_lora.py"), []

    class Trainer(module.TokenLossTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.append({key: value.clone() if torch.is_tensor(value) else value for key, value in inputs.items()})
            return super().compute_loss(model, inputs, *args, **kwargs)

    monkeypatch.setattr(module, "TokenLossTrainer", Trainer)
    monkeypatch.chdir(tmp_path)
    command = ["--model_name_or_path", tiny_model, "--dataset_name", question_rows, "--output_dir", "packed"]
    command += ["--packing", "true", "--max_length", "64", "--max_steps", "1", "--per_device_train_batch_size", "2"]
    call("02_train_lora.py", *command)
    return batches[0]


def loss_and_gradients(model, inputs: dict, labels: torch.Tensor) -> tuple[torch.Tensor, list, list]:
    """Logits [1, L, V], and the gradients of the sum of the loss over the labels [1, L]."""
    logits = model(**inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    return logits.detach(), torch.autograd.grad(loss, list(model.parameters()))


def largest_difference(gradients: list, others: list) -> float:
    """Of two lists of tensors, as a share of the largest value in each of the second."""
    return max(
        ((one - other).abs().max() / other.abs().max()).item() for one, other in zip(gradients, others, strict=True)
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_rows_give_the_logits_and_gradients_of_the_rows_alone(
    attention, tiny_model, question_rows, tmp_path, monkeypatch
):
    batch = packed_batch(tiny_model, question_rows, tmp_path, monkeypatch)
    ids, labels, positions = (batch[key] for key in ("input_ids", "labels", "position_ids"))
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    assert ids.shape[0] == 1 and len(starts) >= 4 and "attention_mask" not in batch
    assert (labels[0, starts] == -100).all()  # no row is continued by the next one
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention, dtype="float32").eval()
    names = {"labels", "num_items_in_batch"}
    packed = {key: value for key, value in batch.items() if key not in names}
    logits, gradients = loss_and_gradients(model, packed, labels)

    alone, sums = [], [torch.zeros_like(gradient) for gradient in gradients]
    for start, end in zip(starts, [*starts[1:], ids.shape[1]], strict=True):
        part, found = loss_and_gradients(model, {"input_ids": ids[:, start:end]}, labels[:, start:end])
        alone.append(part)
        sums = [total + gradient for total, gradient in zip(sums, found, strict=True)]
    assert torch.allclose(logits, torch.cat(alone, dim=1), atol=1e-5)
    assert largest_difference(gradients, sums) < 1e-4

    # Without the positions that begin anew each row sees those before it, and the same comparison fails.
    broken = {"input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None]}
    logits, gradients = loss_and_gradients(model, broken, labels)
    assert not torch.allclose(logits, torch.cat(alone, dim=1), atol=1e-3)
    assert largest_difference(gradients, sums) > 1e-2


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("trainer", ["02_train_lora.py", "03_train_full.py"])
def test_padded_rows_without_a_mask_give_the_loss_and_gradients_with_it(trainer, attention, tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, attn_implementation=attention, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = Dataset.from_dict({"text": ["what color is a", "what color is a" + " b" * 20]})
    settings = load(trainer).Config(str(tmp_path), per_device_train_batch_size=2, report_to="none", bf16=False)
    trainer = load(trainer).TokenLossTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    (batch,) = trainer.get_train_dataloader()
    assert sorted(batch["attention_mask"].sum(1).tolist())[0] < batch["attention_mask"].shape[1]  # one is padded
    seen = []
    hook = model.register_forward_pre_hook(lambda model, args, inputs: seen.append(set(inputs)), with_kwargs=True)

    def measure(compute_loss, batch) -> tuple[float, list]:
        loss = compute_loss(trainer, model.train(), dict(batch))
        return loss.item(), torch.autograd.grad(loss, list(model.parameters()))

    ours, gradients = measure(type(trainer).compute_loss, batch)
    masked, expected = measure(Trainer.compute_loss, batch)
    hook.remove()
    assert ["attention_mask" in names for names in seen] == [False, True]
    assert ours == pytest.approx(masked, rel=1e-5) and largest_difference(gradients, expected) < 1e-4

    # Were the rows padded on the left, each token would see the padding, and the same comparison fails.
    left = {name: value.flip(1) for name, value in batch.items() if torch.is_tensor(value)}
    ours, masked = (measure(compute, left)[0] for compute in (type(trainer).compute_loss, Trainer.compute_loss))
    assert ours != pytest.approx(masked, rel=1e-4)


@pytest.mark.parametrize(
    ("device", "bf16", "masked"),
    [("cpu", False, False), ("cpu", True, False), ("cuda", True, False), ("cuda", False, True)],
)
@pytest.mark.parametrize("trainer", ["02_train_lora.py", "03_train_full.py"])
def test_the_mask_is_left_out_where_attention_has_a_fast_kernel_without(
    trainer, device, bf16, masked, tiny_model, tmp_path, monkeypatch
):
    model, tokenizer = (kind.from_pretrained(tiny_model) for kind in (AutoModelForCausalLM, AutoTokenizer))
    rows = Dataset.from_dict({"text": ["what color is a", "what color is a b"]})
    settings = load(trainer).Config(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=bf16)
    trainer = load(trainer).TokenLossTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    (batch,), seen = trainer.get_train_dataloader(), []
    monkeypatch.setattr(type(trainer.args), "device", torch.device(device))
    model.register_forward_pre_hook(lambda model, args, inputs: seen.append(set(inputs)), with_kwargs=True)
    trainer.compute_loss(model.train(), dict(batch))
    assert seen == [{"input_ids", "use_cache"} | ({"attention_mask"} if masked else set())]


def test_the_peak_memory_is_that_of_the_process_and_not_of_its_parent():
    source = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts/chain')!r}); import run_step; "
    source += "held = b'1' * 2**25; print(run_step.peak_memory())"
    parent = "import subprocess, sys; held = b'1' * 2**29; subprocess.run([sys.executable, '-c', sys.argv[1]])"
    result = subprocess.run([sys.executable, "-c", parent, source], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert 2**25 < int(result.stdout) < 2**28


@pytest.mark.parametrize("trainer", ["02_train_lora.py", "03_train_full.py"])
def test_an_attention_that_the_model_has_not_is_answered_by_one_that_it_has(trainer, tiny_model, tmp_path):
    bloom = BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=2)
    BloomForCausalLM(bloom).save_pretrained(tmp_path / "bloom")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "bloom")
    write_rows(tmp_path / "rows.jsonl", [{"text": "a b c"}])
    options = ["--model_name_or_path", "bloom", "--dataset_name", "rows.jsonl"]
    options += ["--attn_implementation", "flash_attention_2"]
    step = ["out", "--reads", "bloom", "rows.jsonl", "--", ROOT / "scripts" / trainer, *options]
    result = run("chain/run_step.py", *step, cwd=tmp_path)
    assert result.returncode == 1 and "does not support Flash Attention 2" in result.stderr
    assert result.stderr.strip().endswith("Give another --attn_implementation: sdpa or eager.")


@pytest.mark.parametrize("trainer", ["02_train_lora.py", "03_train_full.py"])
def test_another_loss_is_computed_by_trl(trainer, tiny_model, tmp_path):
    rows = Dataset.from_dict({"text": ["what color is a", "what color is a" + " b" * 20]})
    config = MixtralConfig(
        vocab_size=200, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=2, router_aux_loss_coef=0.5,
    )  # fmt: skip
    dense, experts = AutoModelForCausalLM.from_pretrained(tiny_model), MixtralForCausalLM(config)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    script = load(trainer)
    for model, options, same in ((dense, {}, False), (dense, {"loss_type": "dft"}, True), (experts, {}, True)):
        settings = script.Config(output_dir=str(tmp_path), report_to="none", bf16=False, **options)
        trainer = script.TokenLossTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
        (batch,) = trainer.get_train_dataloader()
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # as a training sets it
        trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=torch.tensor(20))
        assert ("mean_token_accuracy" in trainer._metrics["train"]) == same  # TRL counts it with its own loss


# The bench ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def bench(monkeypatch, tmp_path) -> dict:
    """What bench/train_speed.py defines; its processes have imported their libraries already."""

    def fork(command, cwd=tmp_path, **options) -> subprocess.CompletedProcess:
        return Process(Path(command[1]), command[2:], cwd).wait()

    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    monkeypatch.chdir(tmp_path)
    defined = runpy.run_path(str(ROOT / "bench/train_speed.py"))
    names = defined["main"].__globals__
    monkeypatch.setitem(names, "subprocess", SimpleNamespace(run=fork))
    monkeypatch.setitem(names, "measure_matmul", lambda dtype: 1e12)  # which takes ten seconds
    return defined


def timed(steps: list[float]) -> dict:
    """What timed.py would write."""
    found = {"step_seconds": steps, "first_step_at": 1.0, "losses": [1.0] * len(steps)}
    return found | {"peak_memory_bytes": 2**30, "reserved_memory_bytes": 2**31}


def fake_accelerator(bench: dict, monkeypatch, device: str) -> None:
    monkeypatch.setitem(bench["main"].__globals__, "GPU", True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)


def run_bench(bench: dict, monkeypatch, *args) -> None:
    monkeypatch.setattr("sys.argv", ["train_speed.py", *map(str, args)])
    bench["main"]()


def test_the_bench_measures_what_it_names(bench, tiny_model, tmp_path, monkeypatch):
    texts = ["what color is a" + " b" * number for number in range(30, 42)]
    write_rows(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    names = ["bare loop", "script, fast", "trl sft", "tutorial", "Trainer"]
    command = ["--model", tiny_model, "--data", "rows.jsonl", "--rows", "12", "--max_length", "40", "--rounds", "1"]
    command += ["--output_dir", "bench", *(part for name in names for part in ("--only", name))]
    run_bench(bench, monkeypatch, *command)
    report = read(tmp_path / "bench/speed.json")
    table = {row["what"]: row for row in report["table"]}
    assert list(table) == names and (tmp_path / "bench/speed.png").is_file()
    tokens = report["machine"]["real_tokens"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokens == sum(min(len(tokenizer(text).input_ids) + 1, 40) for text in texts)  # with EOS, without padding
    for name, row in table.items():
        (once,) = report["runs"][name]
        assert len(once["step_seconds"]) == len(once["losses"]) == 3
        assert row["tokens_per_second"] == pytest.approx(tokens / sum(once["step_seconds"]))
        assert once["packages"]["torch"] == report["machine"]["packages"]["torch"]
        assert 0 < row["mfu"] < 1 and once["first_step_at"] > 0 and once["peak_memory_bytes"] > 2**27
    for name, difference in (("script, fast", 0.01), ("tutorial", 1e-4), ("Trainer", 1e-4)):  # the same arithmetic
        assert table[name]["mean_loss"] == pytest.approx(table["trl sft"]["mean_loss"], rel=difference)
    assert Path(tmp_path / "bench/speed.md").read_text().count("\n| ") >= len(names)


@pytest.mark.parametrize("method", ["lora", "full", "qlora"])
def test_the_operations_that_are_counted_are_those_that_pytorch_counts(method, bench, tmp_path):
    config = LlamaConfig(
        vocab_size=500, hidden_size=64, intermediate_size=160, num_hidden_layers=12, num_attention_heads=4,
        num_key_value_heads=2, head_dim=24, attn_implementation="eager", tie_word_embeddings=True,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    model = LlamaForCausalLM(config)
    if method != "full":
        targets = "all-linear" if method == "qlora" else None
        model = get_peft_model(model, LoraConfig(r=64, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM"))
    length = 48
    ids = torch.arange(length).view(1, length)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    # Eager attention computes the half that is masked too. Into the first layer no gradient flows back.
    masked = 3 * 12 * 2 * 4 * 24 * length**2
    counted = bench["count_flops"](tmp_path, [length], method == "full", method == "qlora")
    assert counted + masked == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "missing.parquet"], "error: no rows in missing.parquet: "),
        (["--data", "folder.v2"], "error: no rows in folder.v2: "),
        (
            ["--data", "numbers.jsonl"],
            "error: numbers.jsonl has fewer than 4 rows (--rows, --batch_size), or neither text",
        ),
        (["--rounds", "0"], "error: --rows, --max_length, --batch_size and --rounds are at least 1."),
        (["--model", "none"], "error: no model in none. Type: make bench, or give a folder: --model FOLDER"),
        (
            ["--device", "gpu", "--rounds", "0"],
            "error: PyTorch finds no accelerator. Type: make check-gpu, or leave DEVICE=gpu out.",
        ),
        (
            ["--price", "0", "--data", "missing"],
            "error: the price of an hour is above 0: --price DOLLARS, or PRICE=DOLLARS",
        ),
        (["--price", "inf", "--data", "missing"], "error: the price of an hour is above 0"),
    ],
)
def test_what_the_bench_cannot_measure_is_named(options, said, bench, tiny_model, tmp_path, monkeypatch):
    (tmp_path / "folder.v2").mkdir()
    write_rows(tmp_path / "numbers.jsonl", [{"number": number} for number in range(8)])
    with pytest.raises(SystemExit) as stop:
        run_bench(bench, monkeypatch, "--model", tiny_model, *options)
    assert stop.value.code.startswith(said) and "\n" not in stop.value.code


def test_a_run_that_stops_short_is_no_measurement(bench, tiny_model, tmp_path, monkeypatch, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"text": "what color is a"}] * 8)
    names, asked = bench["main"].__globals__, []

    def measure(command, python, folder):
        asked.append(Path(command[0]).stem)
        # Two steps are due; the second round is in reverse.
        steps = [1.0] if len(asked) == 3 else [1.0, 1.0]
        return timed(steps)

    monkeypatch.setitem(names, "measure", measure)
    scripts = {"bare loop": (["bare_loop.py"], False), "Trainer": (["plain_trainer.py"], False)}
    monkeypatch.setitem(names, "list_commands", lambda *args: scripts)
    with pytest.raises(SystemExit) as stop:
        run_bench(bench, monkeypatch, "--model", tiny_model, "--data", "rows.jsonl", "--output_dir", "bench")
    assert asked == ["bare_loop", "plain_trainer", "plain_trainer", "bare_loop"]
    assert stop.value.code == "error: Trainer failed, for the reason above."
    assert "failed: Trainer made 1 steps, not 2" in capsys.readouterr().err
    table = read(tmp_path / "bench/speed.json")["table"]
    assert [len(row["each_round"]) for row in table] == [2, 1]


def test_the_bench_makes_a_model_of_a_size_from_nothing_but_a_config(bench, tiny_model, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"text": "what color is a" + " b" * number} for number in range(8)])
    command = ["--size", "tiny", "--model", tiny_model, "--data", "rows.jsonl", "--max_length", "40", "--rounds", "1"]
    command += ["--output_dir", "bench", "--only", "bare loop", "--dtype", "bfloat16"]
    run_bench(bench, monkeypatch, *command)
    (row,) = read(tmp_path / "bench/speed.json")["table"]
    assert row["tokens_per_second"] > 0 and 0 < row["mean_loss"] < 10
    with pytest.raises(SystemExit) as stop:
        run_bench(bench, monkeypatch, *command, "--only", "no such")
    assert "there is no 'no such', but: 'bare loop', 'bare loop, fast', " in stop.value.code


def test_the_short_bench_of_an_accelerator_needs_nothing_but_data(bench, tmp_path, monkeypatch):
    fake_accelerator(bench, monkeypatch, "a card")
    command = ["--device", "gpu", "--size", "tiny", "--max_length", "64", "--rows", "20", "--output_dir", "bench"]
    with pytest.raises(SystemExit) as stop:
        run_bench(bench, monkeypatch, *command, "--size", "embedded")
    assert stop.value.code.startswith("error: --size embedded takes the weights of a model.")
    run_bench(bench, monkeypatch, *command, "--only", "bare loop, fast")
    report = read(tmp_path / "bench/speed.json")
    (row,) = report["table"]
    assert row["tokens_per_second"] > 0 and report["machine"]["rows"] == 20
    names = bench["main"].__globals__
    lengths = [length * 64 // 1024 for length in names["synthetic"].LENGTHS]
    assert sum(lengths) - 20 <= report["machine"]["real_tokens"] <= sum(lengths)
    assert {path.name for path in tmp_path.iterdir()} == {"bench"}

    asked = []
    monkeypatch.setitem(names, "measure", lambda command, python, folder: asked.append(command) or timed([1.0] * 5))
    run_bench(bench, monkeypatch, *command)
    assert [row["what"] for row in read(tmp_path / "bench/speed.json")["table"]] == [
        "bare loop, fast", "script", "script, fast", "trl sft", "trl sft, bfloat16", "script, qlora"
    ]  # fmt: skip
    assert any("qlora.yaml" in str(part) for part in asked[-1]) and "bfloat16" not in asked[3]
    assert asked[4][-2:] == ["--dtype", "bfloat16"]


def test_the_columns_are_those_of_the_machine(bench, monkeypatch):
    runs = {"script": [timed([1.0, 3.0])], "script, fast": [timed([0.5, 0.5])]}
    commands, flops = {"script": ([], False), "script, fast": ([], True)}, dict.fromkeys(runs, 200e12)
    peaks = {"float32": 100e12, "bfloat16": 800e12}

    def columns(price=None) -> tuple[str, list[str]]:
        table = bench["summarize"](SimpleNamespace(price=price), runs, commands, [100, 300], flops, peaks)
        header, _, *lines = bench["write_table"](table).splitlines()
        return header, [line.strip("| ").split(" | ") for line in lines]

    header, _ = columns()
    own = "peak memory, GiB | MFU"
    assert header == (
        f"| what | real tokens/s | each round | samples/s | step, s: median (10 to 90 %) | {own} | mean loss | "
        "first step after, s |"
    )
    header, rows = columns(price=3.6)  # a tenth of a cent each second: 4 and 1 of them for 400 tokens
    assert header.endswith(" | first step after, s | $ a million tokens |")
    assert [row[-1] for row in rows] == ["10.0000", "2.5000"]
    fake_accelerator(bench, monkeypatch, "NVIDIA H100 80GB HBM3")
    header, rows = columns()
    own = "allocated, GiB | reserved, GiB | TFLOP/s | MFU | of the data sheet"
    assert f" | {own} | mean loss | " in header and "peak memory" not in header
    assert [row[5:10] for row in rows] == [
        ["1.00", "2.00", "50.0", "0.50", f"{50 / 67:.2f}"], ["1.00", "2.00", "200.0", "0.25", f"{200 / 989:.2f}"]
    ]  # fmt: skip
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert [row[8:10] for row in columns()[1]] == [["0.50", ""], ["0.25", ""]]


@pytest.mark.parametrize(
    ("ending", "found"),
    [
        ("raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 172.00 MiB.')", True),
        ("raise RuntimeError('HIP out of memory')", True),
        ("bytearray(2**62)", True),
        ("torch.empty(2**60)", True),  # DefaultCPUAllocator: can't allocate memory
        ("os.kill(os.getpid(), 9)", True),
        ("os.kill(os.getpid(), 15)", False),
        ("raise ValueError('another')", False),
    ],
)
def test_what_runs_out_of_memory_is_told_from_what_fails(ending, found, bench, tmp_path, capsys):
    (tmp_path / "contender.py").write_text(f"import os, torch\n{ending}\n")
    run = bench["measure"]([tmp_path / "contender.py"], sys.executable, tmp_path)
    assert (run or {}).get("out_of_memory", False) == found
    assert ("failed: " in capsys.readouterr().err) != found
    if "Error" in ending and found:
        assert run["peak_memory_bytes"] > 2**20


def test_what_runs_out_of_memory_stays_in_the_table(bench, tiny_model, tmp_path, monkeypatch):
    write_rows(tmp_path / "rows.jsonl", [{"text": "what color is a"}] * 8)
    names, asked = bench["main"].__globals__, []
    ends = {"first.py": {"peak_memory_bytes": 2**31, "out_of_memory": True}, "second.py": {"out_of_memory": True}}

    def measure(command, python, folder):
        asked.append(command[0])
        return ends.get(command[0]) or timed([1.0, 1.0])

    monkeypatch.setitem(names, "measure", measure)
    commands = {file.removesuffix(".py"): ([file], False) for file in ("first.py", "second.py", "third.py")}
    monkeypatch.setitem(names, "list_commands", lambda *args: commands)
    command = ["--model", tiny_model, "--data", "rows.jsonl", "--output_dir", "bench"]
    run_bench(bench, monkeypatch, *command)
    assert asked == ["first.py", "second.py", "third.py", "third.py"]
    header, _, first, second, third = (tmp_path / "bench/speed.md").read_text().splitlines()[3:]
    assert first == "| first | out of memory |  |  |  | 2.00 |  |  |  |"
    assert second == "| second | out of memory |  |  |  |  |  |  |  |" and header.count("|") == second.count("|")
    assert third.startswith("| third | ") and (tmp_path / "bench/speed.png").is_file()
    del commands["third"]
    run_bench(bench, monkeypatch, *command)  # though none is left
    assert "| second | out of memory |" in (tmp_path / "bench/speed.md").read_text()
