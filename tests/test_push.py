"""write_card.py and push_model.py: a true card; an upload of the folder and nothing else, to a hub of this test."""

import base64
import json
from http.server import BaseHTTPRequestHandler

import pytest
from conftest import run, serve
from huggingface_hub import ModelCard

DATASET = {"name": "org/rows", "revision": "def", "license": "mit", "train": {"rows": 9, "sha256": "0"}}
RUN = {
    "script": "02_train_lora.py",
    "options": {"config": "mine.yaml (0123abcd)"},
    "inputs": {"dataset": {"sha256": "1", "record": {"dataset": DATASET}}},
    "base_model": {"name": "org/base", "revision": "abc", "license": "llama2"},
    "dataset": {"name": "out/dataset", "rows": 9},
    "arguments": {
        "model_name_or_path": "out/base-model",
        "learning_rate": 1e-3,
        "lr_scheduler_type": "linear",
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "seed": 7,
        "use_peft": True,
        "lora_r": 8,
        "lora_alpha": 32,
        "lora_target_modules": ["all-linear"],
        "dtype": "float32",
    },
    "packages": {"torch": "1.2.3"},
    "accelerator": "A chip",
    "parameters": {"trainable": 1000, "total": 20000},
    "metrics": {
        "epoch": 1.5,
        "step": 2,
        "train_loss": 2.25,
        "train_runtime": 60.0,
        "num_input_tokens_seen": 7404,
        "peak_memory_bytes": 2**31,
        "eval_loss": 1.75,
        "eval_tokens": 99,
    },
}
FULL = RUN | {"script": "03_train_full.py", "arguments": RUN["arguments"] | {"use_peft": False}}
MERGED = {
    "script": "04_merge_adapter.py",
    "inputs": {"base-model": {"sha256": "2", "record": {}}, "lora": {"sha256": "3", "record": RUN}},
    "base_model": RUN["base_model"],
    "adapter": {"name": "out/lora/adapter"},
    "arguments": {"dtype": "bfloat16"},
    "check": {"largest_difference": 0.02, "tolerance": 0.5, "tokens": 9, "same_tokens": 9},
}
CARDS = {
    "adapter": (RUN, "peft", ["PeftModel.from_pretrained(base", 'from_pretrained("org/base", revision="abc"']),
    "model": (FULL, "transformers", ["all of its parameters fine-tuned", 'from_pretrained("FOLDER", dtype="float32")']),
    "merged": (MERGED, "transformers", ["merged into one model", 'dtype="bfloat16"', "saved as bfloat16"]),
}


@pytest.mark.parametrize("kind", CARDS)
def test_the_card_states_base_data_figures_licences_and_how_to_load(kind, tmp_path):
    record, library, said = CARDS[kind]
    folder = tmp_path / ("adapter" if kind == "adapter" else "model")
    folder.mkdir()
    (tmp_path / "run.json").write_text(json.dumps(record))
    result = run("chain/write_card.py", "run.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets, card.data.license) == ("org/base", ["org/rows"], "llama2")
    assert card.data.library_name == library
    figures = [
        "1,000 of 20,000",
        "2.2500",
        "1.7500",
        "60 s, 123 tokens/s",
        "2.00 GiB",
        "A chip",
        "torch 1.2.3",
        "mine.yaml",
    ]
    sources = ["`org/base` (abc)", "9 rows of `org/rows` (def)", "Base model: llama2. Training data: mit."]
    for text in [*figures, *sources, *said, "| rows in a batch | 8 |"]:
        assert text in card.content, text
    assert ("r=8, alpha=32, layers: all-linear" in card.content) == (kind != "model")
    assert "{" not in card.text.replace('{"role": "user", "content"', "").replace("]}]", "")


def test_the_card_claims_no_hub_names_for_what_is_not_on_a_hub(tmp_path):
    (tmp_path / "model").mkdir()
    local = FULL | {
        "base_model": {"name": "/home/me/mine", "sha256": "ab"},
        "dataset": {"name": "/home/me/my.jsonl", "rows": 9},
        "inputs": {"my.jsonl": {"sha256": "cd", "record": {}}},
    }
    (tmp_path / "run.json").write_text(json.dumps(local))
    assert run("chain/write_card.py", "run.json", cwd=tmp_path).returncode == 0
    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.base_model is None and card.data.datasets is None and card.data.license is None
    assert "`mine` (sha256 ab)" in card.content and "9 rows of `my.jsonl` (sha256 cd)" in card.content
    assert "Base model: not recorded" in card.content
    assert "/home" not in card.content


@pytest.fixture
def hub():
    """Address of a hub that takes any upload, what it was sent as (path, body), whether its repository is private."""
    sent, private = [], [True]

    class Hub(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
            sent.append((self.path, body))
            if "/preupload/" in self.path:
                names = [file["path"] for file in json.loads(body)["files"]]
                files = [{"path": name, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for name in names]
                answer = {"files": files}
            elif "/commit/" in self.path:
                answer = {
                    "success": True,
                    "commitOid": "c" * 40,
                    "commitUrl": f"http://{self.headers['Host']}/user/name/commit/c",
                }
            else:
                answer = {
                    "id": "user/name",
                    "url": f"http://{self.headers['Host']}/user/name",
                    "errors": [],
                    "warnings": [],
                }
            self.answer(answer)

        def do_GET(self):
            self.answer({"id": "user/name", "sha": "c" * 40, "siblings": [], "private": private[0]})

        def answer(self, answer):
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def log_message(self, *args):
            pass

    with serve(Hub) as address:
        yield address, sent, private


@pytest.fixture
def adapter(tmp_path):
    folder = tmp_path / "lora/adapter"
    folder.mkdir(parents=True)
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (folder / name).write_text(f"content of {name}")
    (tmp_path / "lora/run.json").write_text("not of the folder")
    return folder


def push(adapter, address, *args, repo="user/name", token="hf_" + "secret" * 5):
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(adapter.parent), "HF_TOKEN": token}
    return run("chain/push_model.py", "--folder", adapter, "--repo_id", repo, *args, cwd=adapter.parent, **environment)


def test_the_folder_is_uploaded_to_a_private_repository_and_nothing_else(adapter, hub):
    address, sent, _ = hub
    result = push(adapter, address)
    assert result.returncode == 0, result.stderr
    assert "secret" not in result.stdout + result.stderr + "".join(body for _, body in sent)
    (created,) = [json.loads(body) for path, body in sent if path == "/api/repos/create"]
    assert (created["name"], created["organization"], created["visibility"]) == ("name", "user", "private")
    (commit,) = [body for path, body in sent if "/commit/" in path]
    lines = [json.loads(line) for line in commit.splitlines()]
    files = {
        line["value"]["path"]: base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"
    }
    assert files == {file.name: file.read_bytes() for file in adapter.iterdir()}


@pytest.mark.parametrize(("args", "token"), [(["--dry_run"], "hf_token"), ([], "")])
def test_without_a_token_or_on_a_dry_run_it_says_what_and_sends_nothing(args, token, adapter, hub):
    result = push(adapter, hub[0], *args, token=token)
    assert result.returncode == 0, result.stderr
    assert "adapter_model.safetensors" in result.stdout and "nothing was uploaded to user/name" in result.stdout
    assert ("put HF_TOKEN=" in result.stdout) == (not token)
    assert hub[1] == []


def test_a_public_repository_is_uploaded_into_only_when_asked(adapter, hub):
    address, sent, private = hub
    private[0] = False
    result = push(adapter, address)
    assert result.returncode == 1 and "--public" in result.stderr
    assert not [path for path, _ in sent if "/commit/" in path]
    assert push(adapter, address, "--public").returncode == 0
    assert [path for path, _ in sent if "/commit/" in path]


def test_what_lies_outside_or_is_no_model_is_not_uploaded(adapter, hub):
    (adapter / "link.json").symlink_to(adapter.parent / "run.json")
    result = push(adapter, hub[0])
    assert result.returncode == 1 and "leads out of" in result.stderr
    assert "no adapter or model at" in push(adapter.parent, hub[0]).stderr
    assert "is not a name on the Hub" in push(adapter, hub[0], repo="name").stderr
    assert hub[1] == []
