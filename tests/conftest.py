"""A tiny Llama with a Llama-like tokenizer, and ways to run and to import the scripts."""

import contextlib
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from http.server import ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
sys.path.insert(0, str(ROOT / "scripts/chain"))  # whose modules import one another

# Hubs are not reached from tests; what would go there must fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["OMP_NUM_THREADS"] = "1"  # models as small as these compute no faster with more
cache = tempfile.TemporaryDirectory(prefix="cache-")  # until the end of the tests
os.environ["HF_HOME"] = cache.name

# The form of Llama-2's template: BOS, [INST] question [/INST] answer, EOS.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + ' ' + eos_token }}{% endif %}{% endfor %}"
)
WORDS = "[INST] [/INST] what color is the sky sea red green blue a b c d e f g h x y z".split()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """Folder with a Llama of two layers whose tokenizer adds BOS and has no pad token, as Llama-2's."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=CHAT_TEMPLATE
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            initializer_range=0.3,  # far enough from zero for a frozen base to have something to adapt
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def question_rows(tmp_path_factory) -> Path:
    """Folder with train.jsonl and validation.jsonl: prompt and completion in chat form."""
    folder = tmp_path_factory.mktemp("rows")
    colors = {"sky": "blue", "sea": "green", "a": "red", "b": "red"}
    rows = [
        {
            "prompt": [{"role": "user", "content": f"what color is the {thing}" + " x" * extra}],
            "completion": [{"role": "assistant", "content": color}],
        }
        for extra in range(8)
        for thing, color in colors.items()
    ]
    write_rows(folder / "train.jsonl", rows[:28])
    write_rows(folder / "validation.jsonl", rows[28:])
    return folder


def write_rows(file: Path, rows: list) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def start(script: str | Path, *args, cwd: Path, file_size=None, signal=None) -> "Process":
    """Starts a script as a process that has imported its libraries already. Faults: see zygote.py."""
    path = script if isinstance(script, Path) else ROOT / "scripts" / script
    return Process(path, args, cwd, file_size=file_size, signal=signal)


def run(script: str | Path, *args, cwd: Path, **environment) -> subprocess.CompletedProcess:
    """Runs a script as a user does; script is a name in scripts/ or a path."""
    if not environment:
        return start(script, *args, cwd=cwd).wait()
    path = script if isinstance(script, Path) else ROOT / "scripts" / script
    return subprocess.run(
        [sys.executable, str(path), *map(str, args)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


class Process:
    """A script that runs in a fork of zygote.py."""

    zygote = None

    def __init__(self, path: Path, args: tuple, cwd: Path, **faults):
        if Process.zygote is None:
            Process.zygote = subprocess.Popen(
                [sys.executable, "-X", "faulthandler", ROOT / "tests/zygote.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        self.folder = Path(tempfile.mkdtemp(prefix="process-"))
        self.args = [str(path), *map(str, args)]
        files = {name: str(self.folder / name) for name in ("out", "err")}
        self.number = self.ask(argv=self.args, cwd=str(cwd), **files, **faults)

    def ask(self, **order) -> int:
        Process.zygote.stdin.write(json.dumps(order) + "\n")
        Process.zygote.stdin.flush()
        return int(Process.zygote.stdout.readline())

    def wait(self) -> subprocess.CompletedProcess:
        status = self.ask(wait=self.number)
        out, err = ((self.folder / name).read_text(encoding="utf-8") for name in ("out", "err"))
        shutil.rmtree(self.folder)
        return subprocess.CompletedProcess(self.args, status, out, err)


def load(script: str):
    """The module of a script, whose name may begin with a digit, or of one of the chain's, such as chain/records.py."""
    if script.startswith("chain/"):
        return importlib.import_module(Path(script).stem)
    return importlib.import_module("records").load_script(script)


def check_refusal(script, args, said, folder, monkeypatch, capsys) -> None:
    """Asserts that a script called in folder says something and exits with an error, in few lines."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr("sys.argv", [str(ROOT / "scripts" / script), *args])
    with pytest.raises(SystemExit) as stop:
        load(script).main()
    message = stop.value.code if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code != 0
    assert said in message and len(message.splitlines()) <= 2


@contextlib.contextmanager
def serve(handler):
    """Address of a server on this machine, which runs until the end of the block."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
