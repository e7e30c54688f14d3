"""serve.py with a stand-in for vLLM, check_serve.py; and, where .venv-serve is there, vLLM itself."""

import asyncio
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
from conftest import ROOT, load, write_rows
from helpers import call, read

VLLM = ROOT / ".venv-serve/bin/python"
STAND_IN = """
import http.server, json, os, pathlib, sys, time
option = lambda name: sys.argv[sys.argv.index(name) + 1] if name in sys.argv else None
folder = option("--tokenizer")
seen = {"argv": sys.argv, "key": os.environ.get("VLLM_API_KEY"), "api_key": os.environ.get("API_KEY")}
seen |= {name: os.environ.get(name) for name in ("VLLM_NO_USAGE_STATS", "VLLM_CPU_KVCACHE_SPACE", "HF_HUB_OFFLINE")}
if folder:
    seen["files"] = {file.name: file.read_text() for file in pathlib.Path(folder).glob("*.j*")}
pathlib.Path(os.environ["SEEN"]).write_text(json.dumps(seen))
if word := os.environ.get("FAIL"):
    print("RuntimeError: Engine core initialization failed\\nValueError:", word, flush=True)
    sys.exit(1)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
http.server.HTTPServer((option("--host"), int(option("--port"))), Handler).serve_forever()
"""


started = []


@pytest.fixture
def engine(tmp_path) -> Path:
    """Folder with a module vllm whose server answers /health and notes what it was told in the file `seen`."""
    module = tmp_path / "engine/vllm/entrypoints/openai"
    module.mkdir(parents=True)
    for folder in (module, module.parent, module.parent.parent):
        (folder / "__init__.py").touch()
    (module / "api_server.py").write_text(STAND_IN)
    yield tmp_path / "engine"
    for process in started:  # what a failed test left
        process.kill()
    started.clear()


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Path:
    """An adapter of tiny_model with a template and an EOS of its own; no weights, which only vLLM would read."""
    folder = tmp_path / "lora/adapter"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    config = {"peft_type": "LORA", "r": 12, "bias": "none", "base_model_name_or_path": str(tiny_model)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("trained")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 5]}')
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(*args, python=sys.executable) -> list[str]:
    return [sys.executable, str(ROOT / "scripts/chain/serve.py"), "--python", str(python), *map(str, args)]


def start(engine, *args, **environment) -> subprocess.Popen:
    """serve.py with the stand-in."""
    known = os.environ | {"PYTHONPATH": str(engine), "SEEN": str(engine / "seen")} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    pipes["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # in the background it is ignored
    started.append(subprocess.Popen(command(*args), env=known, cwd=engine, **pipes))
    return started[-1]


def refused(engine, *args, **environment) -> str:
    process = start(engine, *args, *([] if "--port" in args else ["--port", free_port()]), **environment)
    _, words = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in words, words
    return words


def answers(port: int) -> bool:
    try:
        return urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2).status == 200
    except OSError:
        return False


def wait_for(condition) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def test_an_adapter_is_served_with_what_it_was_trained_with(engine, adapter, tiny_model):
    port = free_port()
    process = start(engine, "--model_name_or_path", adapter, "--port", port, "--seed", "3", API_KEY="s3cret")
    wait_for(lambda: answers(port))
    lines = [process.stdout.readline() for _ in range(4)]
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=30)
    assert process.returncode == 0 and errors == "" and "has ended" in rest and not answers(port)
    seen = read(engine / "seen")
    options = dict(zip(seen["argv"], seen["argv"][1:], strict=False))
    assert options["--model"] == str(tiny_model) and options["--served-model-name"] == "base"
    assert options["--lora-modules"] == f"adapter={adapter}" and options["--max-lora-rank"] == "16"
    assert options["--seed"] == "3" and options["--dtype"] == "float32" and options["--host"] == "127.0.0.1"
    assert options["--tokenizer"] == options["--generation-config"] and not Path(options["--tokenizer"]).exists()
    assert seen["files"]["chat_template.jinja"] == "trained" and '"llama"' in seen["files"]["config.json"]
    assert seen["files"]["generation_config.json"] == '{"eos_token_id": [2, 5]}'
    assert options["--middleware"] == "require_key.RequireKey"
    assert seen["key"] == "s3cret" and seen["api_key"] is None and "s3cret" not in json.dumps(seen["argv"])
    assert seen["VLLM_NO_USAGE_STATS"] == seen["HF_HUB_OFFLINE"] == seen["VLLM_CPU_KVCACHE_SPACE"] == "1"
    assert f"http://127.0.0.1:{port}/v1 answers as adapter" in lines[1]
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in lines[2] and "$API_KEY" in lines[2]
    assert json.loads(lines[3].split("'")[1])["model"] == "adapter"


def test_a_model_needs_nothing_gathered_and_without_a_key_anybody_is_named(engine, tiny_model):
    port = free_port()
    process = start(engine, "--model_name_or_path", tiny_model, "--name", "full", "--port", port, "--host", "0.0.0.0")
    wait_for(lambda: answers(port))
    lines = [process.stdout.readline() for _ in range(2)]
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143 and not answers(port)
    seen = read(engine / "seen")
    assert "--tokenizer" not in seen["argv"] and "--enable-lora" not in seen["argv"] and seen["key"] is None
    assert seen["argv"][seen["argv"].index("--served-model-name") + 1] == "full"
    assert "Who reaches 0.0.0.0 may use it" in lines[1]


@pytest.mark.parametrize("killed", ["the server", "serve.py"])
def test_one_that_is_killed_takes_the_other_along(killed, engine, tiny_model):
    port = free_port()
    process = start(engine, "--model_name_or_path", tiny_model, "--port", port)
    wait_for(lambda: answers(port))
    child = int(Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text())
    os.kill(child if killed == "the server" else process.pid, signal.SIGKILL)
    _, words = process.communicate(timeout=30)
    assert process.returncode == (1 if killed == "the server" else -signal.SIGKILL)
    assert ("vLLM was killed, by signal 9" in words) == (killed == "the server")
    wait_for(lambda: not Path(f"/proc/{child}").exists())


CANNOT = [
    {"peft_type": "LOHA"},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"bias": "all"},
    {"r": 1024},
    {"rank_pattern": {"a": 1}},
]


@pytest.mark.parametrize("change", CANNOT, ids=lambda change: next(iter(change)))
def test_an_adapter_that_vllm_would_serve_wrong_is_refused(change, engine, adapter):
    config = read(adapter / "adapter_config.json") | change
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert "Type: make merge serve FROM=merged" in refused(engine, "--model_name_or_path", adapter)
    assert not (engine / "seen").exists()


def test_what_cannot_be_served_is_said_in_a_line(engine, adapter, tiny_model):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        words = refused(engine, "--model_name_or_path", tiny_model, "--port", port)
    assert f"127.0.0.1:{port}: " in words and f"PORT={port + 1}" in words
    assert "no port 80000" in refused(engine, "--model_name_or_path", tiny_model, "--port", 80000)
    assert "no model at none" in refused(engine, "--model_name_or_path", "none")
    words = refused(engine, "--model_name_or_path", tiny_model, "--max-model-len", 10**12)
    assert "are free. End what else runs, or type" in words and "--max-model-len 1024" in words
    words = refused(engine, "--model_name_or_path", tiny_model, "--port", free_port(), FAIL="no such layer")
    assert "status 1: ValueError: no such layer. The log is serve.log" in words and "core init" not in words
    memory = {"FAIL": "Free memory on device cuda:0 (3/80 GiB) is less than asked"}
    words = refused(engine, "--model_name_or_path", tiny_model, "--port", free_port(), **memory)
    assert "is less than asked. End what else uses it, or type: make serve ARGS='--gpu-memory-utilization" in words
    (adapter / "tokenizer_config.json").unlink()
    assert "has no tokenizer" in refused(engine, "--model_name_or_path", adapter)


# check_serve.py -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checks():
    """The module, where the client of OpenAI need not be installed."""
    sys.modules.setdefault("openai", types.ModuleType("openai"))
    return load("chain/check_serve.py")


class Said:
    """An answer of a server as the client gives it."""

    def __init__(self, text: str, ids: list[int], prompt_ids: list[int]):
        self.choices = [self]
        self.message = types.SimpleNamespace(content=text)
        self.whole = {"token_ids": ids, "prompt_token_ids": prompt_ids}

    def model_dump(self):
        return self.whole


@pytest.mark.parametrize(
    ("ids", "prompt_ids", "expected"),
    [
        ([7, 8, 2], [1, 5], {"same_prompt": True}),
        ([7, 9, 2], [1, 5], {"same_prompt": True, "differs_at": 2, "margin": 0.25}),
        ([7, 8], [1, 5], {"same_prompt": True, "differs_at": 3, "margin": 0.75}),
        ([7, 8, 2, 4], [1, 5], {"same_prompt": True, "differs_at": 4, "margin": math.inf}),
        ([7, 8, 2], [1, 1, 5], {"same_prompt": False}),
    ],
)
def test_the_first_token_that_differs_is_found_with_its_margin(ids, prompt_ids, expected, checks):
    each = {"messages": [{"role": "user", "content": "a | b"}], "prompt_ids": [1, 5], "answer": "x y"}
    each |= {"answer_ids": [7, 8, 2], "margins": [0.5, 0.25, 0.75]}
    probe, said = {"prompts": [each], "chat": True}, Said("x y", ids, prompt_ids)
    server = types.SimpleNamespace(probe=probe, ask_probe=lambda *_, **__: said)
    (pair,) = checks.compare(server)
    assert {key: pair[key] for key in ("same_prompt", "differs_at", "margin") if key in pair} == expected
    report = {"name": "adapter", "vllm": "1", "requests": {"streamed": "ok: all"}, "answers": [pair]}
    text = checks.format_report(report)
    assert ("ANOTHER PROMPT" in text) != expected["same_prompt"] and "| a \\| b | x y | x y |" in text
    assert (f"differs from token {expected.get('differs_at')} on" in text) == ("differs_at" in expected)


def test_figures_under_load_stand_beside_our_own(checks):
    vllm = {"requests": 4, "answered": 3, "at_once": 2, "tokens": 60, "seconds": 3.0, "first_token": [0.1, 0.3, 0.2]}
    ours = {"requests": 4, "tokens": 30, "seconds": 3.0, "first_token": [0.5] * 4}
    report = {"name": "full", "vllm": "1", "requests": {}, "answers": [], "load": {"vLLM": vllm, "batches": ours}}
    text = checks.format_report(report)
    assert (
        "| vLLM | 3 of 4 | 20 | 3.0 | 0.20 s | 0.30 s |" in text and "| batches | 4 of 4 | 10 | 3.0 | 0.50 s |" in text
    )


# vLLM itself ----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(not VLLM.exists(), reason="no .venv-serve: make serve makes it")
@pytest.mark.parametrize("kind", ["adapter", "merged"])
def test_vllm_answers_as_was_trained_though_the_base_has_another_template_and_eos(kind, tmp_path):
    make_base(tmp_path / "base")
    (tmp_path / "own.jinja").write_text(OWN_TEMPLATE)
    (tmp_path / "rows").mkdir()
    rows = [{"prompt": f"q{number % 2}", "completion": "blue"} for number in range(8)]
    data = ["--dataset_name", write_rows(tmp_path / "rows/train.jsonl", rows).parent]
    model = ["--model_name_or_path", tmp_path / "base"]
    own = ["--eos_token", "<end>", "--chat_template_path", tmp_path / "own.jinja", "--output_dir", tmp_path / "lora"]
    lora = ["--lora_target_modules", "all-linear", "--lora_r", "8", "--learning_rate", "0.01"]
    call("02_train_lora.py", *model, *data, *lora, "--num_train_epochs", "15", *own)
    model = ["--model_name_or_path", tmp_path / "lora/adapter", "--base_model", tmp_path / "base"]
    probe, report = tmp_path / "probe.json", tmp_path / "serve.json"
    call("chain/probe.py", *model, *data, "--prompt", "q1", "--output", probe)
    if kind == "merged":
        call("04_merge_adapter.py", *model, "--output_dir", tmp_path / "merged")
        model = ["--model_name_or_path", tmp_path / "merged/model"]
    (answer,) = read(probe)["prompts"]
    assert answer["answer"].strip() == "blue" and answer["answer_ids"][-1] == 1, "the EOS that was trained"
    check = [VLLM, ROOT / "scripts/chain/check_serve.py", "--probe", probe, "--output", report]
    check += ["--max-model-len", "400", "--", *command(*model, python=VLLM), "--name", kind]
    result = subprocess.run([*map(str, check)], capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "differs_at" not in read(report)["answers"][0]


OWN_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}ask {{ m['content'] }} then {% else %}{{ m['content'] }} <end>"
    "{% endif %}{% endfor %}"
)


def make_base(folder: Path) -> None:
    """A tiny Llama of heads of 64, which vLLM's kernels know, with EOS <stop> and a template that is not trained."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = ["<stop>", "<end>", "ask", "then", "q0", "q1", "blue", "a", "b", "user", "<unk>"]
    words = Tokenizer(models.WordLevel({word: number for number, word in enumerate(vocabulary)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = "{% for m in messages %}user {{ m['content'] }} {% endfor %}"
    special = dict(eos_token="<stop>", unk_token="<unk>", chat_template=template)
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2)
    more = dict(vocab_size=len(vocabulary), max_position_embeddings=512, initializer_range=0.3, eos_token_id=0)
    LlamaForCausalLM(LlamaConfig(**sizes, **more, tie_word_embeddings=True)).save_pretrained(folder)


@pytest.mark.parametrize(
    ("path", "method", "header", "status"),
    [
        ("/invocations", "POST", b"", 401),
        ("/metrics", "GET", b"Bearer another", 401),
        ("/invocations", "POST", b"Bearer s3cret", 200),
        ("/health", "GET", b"", 200),
        ("/v1/models", "OPTIONS", b"", 200),
    ],
)
def test_with_a_key_all_but_health_needs_it(path, method, header, status, monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "s3cret")
    sent = []

    async def app(scope, receive, send):
        await send({"type": "http.response.start", "status": 200})

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "path": path, "method": method, "headers": [(b"authorization", header)] if header else []}
    asyncio.run(load("chain/require_key.py").RequireKey(app)(scope, None, send))
    assert sent[0]["status"] == status
