"""predict_memory.py against what PyTorch keeps, counts and takes."""

import contextlib
import json
import os

import pytest
import torch
from conftest import ROOT, load, run, write_rows
from fake_machine import Machine, torch_for
from peft import LoraConfig, get_peft_model
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

script = load("chain/predict_memory.py")
SIZES = dict(hidden_size=64, intermediate_size=160, num_attention_heads=4, num_key_value_heads=2, vocab_size=200)
QUERY_VALUE, ALL = ["q_proj", "v_proj"], ["all-linear"]


def settings(**others) -> dict:
    return script.SETTINGS | others


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(), (6_738_415_616, 33_554_432)),  # its defaults are Llama-2-7B
        (LlamaConfig(**SIZES, num_hidden_layers=3, tie_word_embeddings=True), None),
        (LlamaConfig(**SIZES, num_hidden_layers=3, head_dim=24), None),
        (Qwen2Config(**SIZES, num_hidden_layers=3, tie_word_embeddings=True), None),
        (Qwen3Config(**SIZES, num_hidden_layers=3, head_dim=24), None),
    ],
)
def test_parameters_are_those_of_the_model(config, expected):
    counts = script.count_weights(config.to_dict(), QUERY_VALUE, 64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        adapter, _ = get_peft_model(model, LoraConfig(r=64, task_type="CAUSAL_LM")).get_nb_trainable_parameters()
    found = (model.num_parameters() - adapter, adapter)
    assert (counts["total"], counts["adapter"]) == found
    assert expected in (None, found)


def kept_by_autograd(layers, batch, length, inputs, method, dtype, autocast, dropout, targets) -> int:
    """Bytes that autograd keeps for the backward pass of a batch, weights not counted; inputs: beside the tokens."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, num_hidden_layers=layers)).to(dtype)
    if method == "lora":
        names = "all-linear" if targets == ALL else targets
        model = get_peft_model(
            model, LoraConfig(r=8, lora_dropout=dropout, target_modules=names, task_type="CAUSAL_LM")
        )
        for layer in model.modules():
            layer.cast_input_dtype_enabled = not autocast  # as 02_train_lora.py sets it
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage  # held, so that no other takes its place
        return tensor

    cast = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), cast:
        ids = torch.randint(3, 100, (batch, length))
        model.train()(input_ids=ids, use_cache=False, **inputs)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("token_metrics", [False, True])
@pytest.mark.parametrize("targets", [QUERY_VALUE, ALL], ids=["q, v", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize(
    ("method", "dtype", "autocast"),
    [
        ("lora", "float32", False),
        ("lora", "float32", True),
        ("lora", "bfloat16", False),
        ("lora", "bfloat16", True),
        ("full", "float32", False),
        ("full", "float32", True),
    ],
)
def test_activations_are_what_autograd_keeps(method, dtype, autocast, dropout, targets, token_metrics):
    batch, length = 4, 40
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[0, -3:] = 0
    inputs = {"attention_mask": mask} if token_metrics else {}
    arguments = (batch, length, inputs, method, getattr(torch, dtype), autocast, dropout, targets)
    kept = kept_by_autograd(3, *arguments) - kept_by_autograd(2, *arguments)  # of one layer
    config = LlamaConfig(**SIZES, num_hidden_layers=1).to_dict()
    options = settings(
        dtype=dtype, bf16=autocast, lora_r=8, lora_dropout=dropout, lora_target_modules=targets,
        per_device_train_batch_size=batch, token_metrics=token_metrics,
    )  # fmt: skip
    parts = script.predict_memory(config, method, options, length, "cpu")
    predicted = parts["activations"]
    if autocast:  # autograd keeps the bf16 copies of the weights too, which are predicted as weights
        counts = script.count_weights(config, targets, 8)
        predicted += 2 * (counts["adapter"] if method == "lora" else 0)
        predicted += 2 * counts["quantizable"] if dtype == "float32" else 0
    assert predicted == pytest.approx(kept, rel=0.005)


def test_where_heads_share_keys_an_accelerator_keeps_the_scores_in_float32():
    batch, length = 4, 40
    arguments = (batch, length, {}, "full", torch.float32, False, 0.0, ALL)
    with sdpa_kernel(SDPBackend.MATH):  # all that ROCm has for that
        kept = kept_by_autograd(3, *arguments) - kept_by_autograd(2, *arguments)
    shared, own = (
        script.predict_memory(
            LlamaConfig(**SIZES | heads, num_hidden_layers=1).to_dict(), "full",
            settings(per_device_train_batch_size=batch), length, "gpu",
        )["activations"]
        for heads in ({}, {"num_key_value_heads": 4})
    )  # fmt: skip
    assert shared == pytest.approx(kept, rel=0.01) and own < 0.95 * shared


def test_packed_rows_are_counted_as_the_one_row_that_they_become(tmp_path):
    batch, length = 4, 40
    options = settings(packing=True, lora_r=8, per_device_train_batch_size=batch)
    config = LlamaConfig(**SIZES, num_hidden_layers=1).to_dict()
    predicted = script.predict_memory(config, "lora", options, length, "cpu")["activations"]
    positions = torch.arange(length).repeat(batch)[None]
    sizes = (1, batch * length, {"position_ids": positions}, "lora", torch.float32, False, 0.1, QUERY_VALUE)
    assert predicted == pytest.approx(kept_by_autograd(3, *sizes) - kept_by_autograd(2, *sizes), rel=0.005)
    (tmp_path / "audit.json").write_text('{"longest_row": 5}')
    model = save_config(tmp_path / "model", **SIZES)
    command = [
        "--model",
        model,
        "--memory",
        "24",
        "--method",
        "lora",
        "--audit",
        "audit.json",
        "--output",
        "m.json",
        "--",
    ]
    for packing, tokens in (("true", 30), ("false", 5)):
        command_line = [*command, "--packing", packing, "--max_length", "30", "--optim", "adamw_torch"]
        assert run("chain/predict_memory.py", *command_line, cwd=tmp_path).returncode == 0
        (row,) = json.loads((tmp_path / "m.json").read_text())["predictions"]
        assert row["tokens"] == tokens


def test_four_bit_weights_take_what_bitsandbytes_takes():
    from bitsandbytes.functional import quantize_4bit

    weight = torch.randn(2048, 2048)
    for nested, bits in ((False, 4.5), (True, 4.127)):
        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
        taken = packed.nbytes + state.absmax.nbytes + (state.state2.absmax.nbytes if nested else 0)
        assert 8 * taken / weight.numel() == pytest.approx(bits, abs=0.001)
    config = LlamaConfig().to_dict()
    options = settings(load_in_4bit=True, use_bnb_nested_quant=True, dtype="bfloat16")
    weights = script.predict_memory(config, "lora", options, 512, "gpu")["weights"]
    rest = 2 * 32000 * 4096 + 65 * 4096  # embeddings, head and norms
    assert weights == int((6_738_415_616 - rest) * 4.127 / 8 + 2 * rest + 4 * 33_554_432)


def test_the_parts_of_llama_2_7b_on_an_accelerator():
    parts = script.predict_memory(LlamaConfig().to_dict(), "full", settings(), 512, "gpu")
    assert parts["weights"] == parts["gradients"] == 4 * 6_738_415_616 and parts["optimizer"] == 8 * 6_738_415_616
    assert parts["peak"] == 16 * 6_738_415_616 > parts["weights"] + parts["optimizer"] + parts["activations"]
    longer = script.predict_memory(LlamaConfig().to_dict(), "full", settings(), 2048, "gpu")
    assert longer["peak"] == sum(longer[name] for name in ("weights", "optimizer", "activations", "logits"))
    fewer = script.predict_memory(LlamaConfig().to_dict(), "full", settings(gradient_checkpointing=True), 2048, "gpu")
    assert fewer["activations"] < longer["activations"] / 10
    plain = script.predict_memory(LlamaConfig().to_dict(), "lora", settings(token_metrics=False), 512, "gpu")
    assert plain["logits"] == 12 * 4 * 512 * 32000


def save_config(folder, **sizes) -> str:
    LlamaConfig(**sizes).save_pretrained(folder)
    return str(folder)


def test_the_table_marks_what_fits(tmp_path):
    llama = save_config(tmp_path / "llama")
    result = run("chain/predict_memory.py", "--model", llama, "--memory", "80", "--output", "fits.json", cwd=tmp_path)
    assert result.returncode == 0 and "6,738,415,616 parameters" in result.stdout
    predictions = json.loads((tmp_path / "fits.json").read_text())["predictions"]
    assert len(predictions) == len(script.METHODS) * 2 * 3
    for row in predictions:
        assert row["fits"] == (row["bytes"]["peak"] * 1.05 + 2**30 <= 80 * 2**30)
        assert f"{row['bytes']['peak'] / 2**30:.2f}  {'fits' if row['fits'] else 'does not fit'}\n" in result.stdout
    fit = {
        (row["method"], row["settings"]["per_device_train_batch_size"], row["tokens"]): row["fits"]
        for row in predictions
    }
    assert fit["LoRA, fp32 (the tutorial)", 4, 1024] and not fit["LoRA, fp32 (the tutorial)", 4, 2048]
    assert fit["LoRA, bf16", 4, 2048] and not any(value for key, value in fit.items() if key[0].startswith("full"))


def small_memory(root, gib: float) -> Machine:
    machine = Machine(root, torch_for())
    machine.write("proc/meminfo", f"MemTotal: 99999999 kB\nMemAvailable:   {int(gib * 2**20)} kB\n")
    return machine


def test_a_training_that_cannot_fit_is_refused_with_what_would_fit(tmp_path):
    machine = small_memory(tmp_path / "machine", 12)
    llama = save_config(tmp_path / "llama", num_hidden_layers=4)
    write_rows(tmp_path / "audit.json", [{"longest_row": 700}])
    command = ["--root", machine.root, "--model", llama, "--method", "lora", "--audit", "audit.json"]
    options = ["--", "--optim", "adamw_torch_fused", "--learning_rate", "1", "--run_name", "x"]
    result = run("chain/predict_memory.py", *command, "--output", "memory.json", *options, cwd=tmp_path)
    assert result.returncode == 3 and not (tmp_path / "memory.json").exists()
    cause, mend = result.stderr.splitlines()
    assert cause.startswith("error: lora needs ") and "there are 12.0 (the CPU)" in cause
    assert mend.startswith("    type: add the option --gradient_checkpointing true   (all the same: FORCE=1 with Make")
    advice = ["--gradient_checkpointing", "true"]
    assert run("chain/predict_memory.py", *command, *options, *advice, cwd=tmp_path).returncode == 0
    result = run("chain/predict_memory.py", *command, "--force", "--output", "memory.json", *options, cwd=tmp_path)
    assert result.returncode == 0 and "error: lora needs" in result.stderr
    (row,) = json.loads((tmp_path / "memory.json").read_text())["predictions"]
    assert row["tokens"] == 700 and row["fits"] is False


@pytest.mark.parametrize(
    ("hip", "method", "optim", "said"),
    [
        (
            "7.2",
            "full",
            "paged_adamw_32bit",
            "8.0 GiB of state, which AMD's driver may leave in the memory of the host",
        ),
        ("7.2", "full", "adamw_torch_fused", None),
        ("7.2", "lora", "paged_adamw_32bit", None),  # a few MB
        (None, "full", "paged_adamw_32bit", None),
    ],
)
def test_a_paged_optimizer_of_all_weights_is_no_bargain_on_amd(hip, method, optim, said, tmp_path, monkeypatch, capsys):
    gpus = [{"name": "AMD Instinct MI300X", "memory_bytes": 192 * 2**30, "free_bytes": 191 * 2**30, "arch": "gfx942"}]
    gpus[0]["integrated"] = False
    facts = {"available": True, "hip": hip, "gpus": gpus}
    passed = {"status": "passed", "facts": facts}
    monkeypatch.setattr(script.doctor, "run_probe", lambda *args: passed)
    model = save_config(tmp_path / "llama", num_hidden_layers=4)
    monkeypatch.setattr("sys.argv", ["p", "--model", model, "--method", method, "--", "--optim", optim])
    script.main()
    printed = capsys.readouterr().out
    if said:
        assert said in printed and "On the accelerator, which fits: --optim adamw_torch_fused" in printed
    else:
        assert "PCIe" not in printed


def test_the_prediction_is_what_was_measured_on_a_card():
    """On an NVIDIA H100, Llama-2-7B's width in 16 layers, batches of 4 x 1024, PyTorch counted 15.45 GiB with Liger's
    kernels and 17.79 without, 57.56 without LoRA, 6.12 with QLoRA (docs/performance.md)."""
    config = LlamaConfig(num_hidden_layers=16).to_dict()
    fast = settings(bf16=True, optim="adamw_torch_fused")
    measured = (
        ("lora", fast | {"dtype": "bfloat16"}, 17.79),
        ("lora", fast | {"dtype": "bfloat16", "use_liger_kernel": True}, 15.45),
        ("full", fast | {"use_liger_kernel": True}, 57.56),
        ("lora", settings(), 31.20),
        ("lora", settings(**script.QLORA | {"bf16": False, "dtype": "float32"}), 6.12),  # as QLoRA was then
    )
    for method, options, gib in measured:
        predicted = script.predict_memory(config, method, options, 1024, "gpu")["allocated"] / 2**30
        assert predicted == pytest.approx(gib, rel=0.015)


def test_on_an_accelerator_the_loss_in_chunks_is_offered_before_what_takes_more_time(tmp_path):
    qwen = save_config(tmp_path / "qwen", hidden_size=1024, intermediate_size=3072, vocab_size=151936)
    command = ["--model", qwen, "--method", "lora", "--memory", "17", "--", "--optim", "adamw_torch", "--bf16", "true"]
    result = run("chain/predict_memory.py", *command, cwd=tmp_path)
    assert result.returncode == 3 and "type: add the option --token_metrics true   (" in result.stderr
    assert run("chain/predict_memory.py", *command, "--token_metrics", "true", cwd=tmp_path).returncode == 0


def test_options_of_the_training_and_its_recipe_decide(tmp_path):
    (tmp_path / "recipe.yaml").write_text("lora_r: 16\nlora_target_modules: [all-linear]\nbf16: true\nseed: 3\n")
    given = ["--config", str(tmp_path / "recipe.yaml"), "--lora_r", "4", "--max_length=256", "--gradient_checkpointing"]
    read, others = script.read_settings([*given, "--lora", "9", "--save_steps", "7"], {"dtype": "bfloat16"})
    assert others == ["--lora", "9", "--save_steps", "7"]
    assert read == settings(
        dtype="bfloat16", bf16=True, lora_r=4, lora_target_modules=["all-linear"], max_length=256,
        gradient_checkpointing=True,
    )  # fmt: skip


def test_a_bitsandbytes_without_its_library_stops_what_needs_it(tmp_path):
    site = "import ctypes\nload = ctypes.cdll.LoadLibrary\n\ndef less(name):\n    if 'libbitsandbytes' in name:\n"
    site += "        raise OSError('no library')\n    return load(name)\n\nctypes.cdll.LoadLibrary = less\n"
    (tmp_path / "sitecustomize.py").write_text(site)
    command = ["--model", save_config(tmp_path / "model", **SIZES), "--memory", "24", "--method", "lora"]
    result = run("chain/predict_memory.py", *command, cwd=tmp_path, PYTHONPATH=str(tmp_path))
    cause = "error: paged_adamw_32bit needs bitsandbytes, bitsandbytes: RuntimeError: no native library"
    assert result.returncode == 1 and result.stderr.startswith(cause)
    assert "type: make bitsandbytes   (or add to ARGS: --optim adamw_torch_fused)" in result.stderr


@pytest.mark.parametrize(
    ("options", "probes", "needs"),
    [
        ({}, ["bitsandbytes", "optimizer"], "paged_adamw_32bit needs bitsandbytes, optimizer: broken"),
        (
            {"optim": "adamw_torch", "load_in_4bit": True},
            ["bitsandbytes", "quantize", "decode_4bit"],
            "quantized weights need bitsandbytes, decode_4bit: broken",
        ),
        ({"optim": "adamw_torch", "load_in_8bit": True}, ["bitsandbytes"], "quantized weights need bitsandbytes, bits"),
        ({"optim": "lion_32bit"}, ["bitsandbytes", "optimizer"], "lion_32bit needs bitsandbytes, optimizer: broken"),
        ({"optim": "adamw_torch_8bit"}, [], None),
        ({"optim": "adamw_torch_fused"}, [], None),
    ],
)
def test_what_a_training_takes_from_bitsandbytes_is_tried(options, probes, needs, monkeypatch):
    tried = []

    def run_probe(name, timeout):
        tried.append(name)
        return {"status": "failed" if name == probes[-1] else "passed", "error": "broken"}

    monkeypatch.setattr(script.doctor, "run_probe", run_probe)
    found = script.judge_needs(settings(**options), 1)
    assert tried == probes
    assert found[0].startswith(needs) if needs else found is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "nowhere"], "no model at 'nowhere'"),
        (["--model", "model", "--method", "lora", "--", "--lora_r", "many"], "cannot read the options of the training"),
        (["--model", "model", "--method", "lora", "--", "--config", "no.yaml"], "No such file or directory: 'no.yaml'"),
        (["--model", "model", "--method", "lora", "--", "--max_length", "0"], "are at least 1"),
        (["--model", "model", "--method", "lora", "--", "--dtype", "float17"], "is none of float32"),
        (["--model", "model", "--method", "full", "--", "--load_in_4bit"], "quantized weights are not trained in full"),
        (["--model", "model", "--", "--lora_r", "8"], "only with --method"),
        (["--memory", "24"], "arguments are required: --model"),
        (["--model", "model", "--memory", "0"], "in GiB, above 0"),
    ],
)
def test_bad_input_is_named(arguments, said, tmp_path):
    save_config(tmp_path / "model", **SIZES)
    result = run("chain/predict_memory.py", *arguments, cwd=tmp_path)
    assert result.returncode == 1 and said in result.stderr and len(result.stderr.splitlines()) <= 2


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"model_type": "gpt2", "n_embd": 768}, [], "its config has no hidden_size"),
        ({**LlamaConfig(**SIZES).to_dict(), "num_local_experts": 8}, [], "it is a mixture of experts"),
        (LlamaConfig(**SIZES).to_dict(), ["--lora_target_modules", "c_attn"], "LoRA on c_attn is not counted"),
    ],
)
def test_a_model_that_the_formulas_do_not_know_is_trained_without_a_prediction(config, options, said, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    command = ["--model", tmp_path, "--memory", "24", "--method", "lora", "--output", "memory.json", "--"]
    result = run("chain/predict_memory.py", *command, "--optim", "adamw_torch", *options, cwd=tmp_path)
    assert result.returncode == 0 and said in result.stdout
    assert json.loads((tmp_path / "memory.json").read_text())["predictions"] == []


def test_the_checkpoints_own_type_is_taken_where_asked_for(tmp_path):
    model = save_config(tmp_path / "model", **SIZES, dtype="bfloat16")
    command = ["--model", model, "--memory", "24", "--method", "lora", "--output", "memory.json", "--"]
    command += ["--optim", "adamw_torch"]
    assert run("chain/predict_memory.py", *command, "--dtype", "auto", cwd=tmp_path).returncode == 0
    (row,) = json.loads((tmp_path / "memory.json").read_text())["predictions"]
    assert row["settings"]["dtype"] == "bfloat16"


def test_qlora_is_predicted_as_its_recipe_says():
    read, _ = script.read_settings(["--config", str(ROOT / "env/recipes/qlora.yaml")], {})
    assert read == settings(**script.QLORA)


@pytest.mark.parametrize(
    ("optimizer", "bytes_each"),
    [("adamw_torch_fused", 8), ("paged_adamw_8bit", 2), ("adamw_torch_4bit", 1), ("lion_32bit", 4), ("sgd", 0)],
)
def test_the_state_of_an_optimizer_is_its_moments(optimizer, bytes_each):
    parts = script.predict_memory(LlamaConfig().to_dict(), "full", settings(optim=optimizer), 512, "gpu")
    assert parts["optimizer"] == bytes_each * 6_738_415_616


def test_the_state_of_a_paged_optimizer_is_not_pytorchs():
    llama = LlamaConfig().to_dict()
    paged = script.predict_memory(llama, "full", settings(), 512, "gpu")
    assert paged["peak"] - paged["allocated"] == 8 * 6_738_415_616
    plain = script.predict_memory(llama, "full", settings(optim="adamw_torch_fused"), 512, "gpu")
    assert plain["allocated"] == plain["peak"] == paged["peak"]


def test_run_json_keeps_predicted_beside_measured(tiny_model, question_rows, tmp_path):
    recipe = ["--optim", "adamw_torch_fused", "--max_steps", "2"]
    check = ["--model", tiny_model, "--method", "full", "--output", "memory.json", "--", *recipe]
    assert run("chain/predict_memory.py", *check, cwd=tmp_path).returncode == 0
    train = [ROOT / "scripts/03_train_full.py", "--model_name_or_path", tiny_model, "--dataset_name", question_rows]
    result = run("chain/run_step.py", "out", "--prediction", "memory.json", "--", *train, *recipe, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    metrics = json.loads((tmp_path / "out/run.json").read_text())["metrics"]
    (row,) = json.loads((tmp_path / "memory.json").read_text())["predictions"]
    assert metrics["predicted_memory_bytes"] == row["bytes"]["peak"]


@pytest.mark.skipif("MALLOC_MMAP_THRESHOLD_" in os.environ, reason="malloc is set up otherwise")
def test_malloc_set_up_otherwise_keeps_nothing(monkeypatch):
    config = LlamaConfig(**SIZES).to_dict()
    kept = script.predict_memory(config, "lora", settings(), 512, "cpu")
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1000000")
    without = script.predict_memory(config, "lora", settings(), 512, "cpu")
    assert without["overhead"] == int(0.53 * 2**30)
    short = script.predict_memory(config, "lora", settings(bf16=True), 512, "cpu")
    assert short["overhead"] == int((0.53 + 0.75) * 2**30)  # kernels for each length of a batch
    assert kept["overhead"] - without["overhead"] == pytest.approx(
        0.4 * (kept["activations"] + kept["logits"]), rel=0.01
    )
