"""01_download.py: from a folder, from a hub (a small server of this test's own), gated and wrong; data with row 11."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote

import pytest
from conftest import run, serve, write_rows

COMMIT = "c0ffee" * 6 + "beef"


@pytest.fixture
def hub(tiny_model):
    """Address and log of a hub with the models org/tiny, org/pickled (.bin only), org/gated and the data org/rows."""
    model = {file.name: file.read_bytes() for file in tiny_model.iterdir()} | {"pytorch_model.bin": b"pickle"}
    repositories = {
        "org/tiny": model | {"original/model.safetensors": b"twice"},
        "org/pickled": {name: content for name, content in model.items() if "safetensors" not in name},
        "org/rows": {
            f"data/{split}-00000-of-00001.jsonl": f'{{"text": "{split}"}}\n'.encode() for split in ("train", "test")
        },
    }
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            parts = unquote(self.path).strip("/").split("?")[0].split("/")
            api = parts[0] == "api"
            parts = [part for part in parts if part not in ("api", "models", "datasets")]
            repository, rest = "/".join(parts[:2]), parts[2:]
            if repository == "org/gated":
                return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
            if repository not in repositories:
                return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            files = repositories[repository]
            if not api:
                content = files.get("/".join(rest[2:]))
                if content is None:
                    return self.answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self.answer(200, content, {"ETag": etag, "X-Repo-Commit": COMMIT})
            if rest[:1] in (["tree"], ["paths-info"]):
                wanted = "/".join(rest[2:])
                if self.command == "POST":
                    body = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                    names = [name for name in files if name in body["paths"]]
                else:
                    names = [name for name in files if name.startswith(wanted)]
                folders = {"data"} if repository == "org/rows" and not wanted and self.command == "GET" else set()
                answer = [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
                answer += [{"type": "file", "path": n, "size": len(files[n]), "oid": "0" * 40} for n in names]
            else:
                answer = {"id": repository, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
                answer["cardData"] = {"license": "mit"}
            return self.answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        do_HEAD = do_POST = do_GET

        def answer(self, status, body, headers):
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *args):
            pass

    with serve(Hub) as address:
        yield address, asked


def hub_environment(folder, address):
    return {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(folder / "cache")}


def download_model(name, folder, address="http://127.0.0.1:9", **environment):
    args = ("--only", "model", "--model_name_or_path", name, "--output_dir", "out")
    return run("01_download.py", *args, cwd=folder, **hub_environment(folder, address), **environment)


def test_a_hub_model_comes_once_with_its_commit(hub, tiny_model, tmp_path):
    address, asked = hub
    result = download_model("org/tiny", tmp_path, address)
    assert result.returncode == 0, result.stderr
    model = tmp_path / "out/base-model"
    origin = {"name": "org/tiny", "revision": COMMIT, "license": "mit"}
    assert json.loads((model / "run.json").read_text()) == {"base_model": origin}
    assert {file.name for file in model.iterdir()} == {file.name for file in tiny_model.iterdir()} | {
        "run.json",
        "SHA256SUMS",
    }
    assert (model / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert (model / "model.safetensors").is_symlink()
    assert not [path for path in asked if ".bin" in path or "original" in path.split("?")[0]]


@pytest.mark.parametrize(("only", "option"), [("model", "--model_name_or_path"), ("dataset", "--dataset_name")])
def test_a_hub_that_is_not_reached_is_named(only, option, tmp_path):
    environment = hub_environment(tmp_path, "http://127.0.0.1:9")
    args = ("--only", only, option, "org/rows", "--output_dir", "out")
    result = run("01_download.py", *args, cwd=tmp_path, **environment)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: cannot " in result.stderr and "'org/rows'" in result.stderr


def test_a_gated_model_is_answered_by_three_steps_and_a_substitute(hub, tmp_path):
    result = download_model("org/gated", tmp_path, hub[0], HF_TOKEN="hf_" + "secret" * 5)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    for said in ("https://huggingface.co/org/gated", "settings/tokens", "HF_TOKEN=", "NousResearch/Llama-2-7b-chat-hf"):
        assert said in result.stderr
    assert "secret" not in result.stderr + result.stdout
    assert not (tmp_path / "out/base-model").exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("org/absent", "there is no model 'org/absent'"),
        ("org/pickled", "no safetensors weights"),
        ("nowhere", "no model at 'nowhere'"),
        ("bin-only", "no safetensors weights"),
    ],
)
def test_models_that_cannot_be_had_are_named(name, said, hub, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "bin-only", ignore=shutil.ignore_patterns("*.safetensors"))
    result = download_model(name, tmp_path, hub[0])
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert said in result.stderr


def test_a_local_model_is_linked_and_the_old_one_stays_until_the_new_is_whole(tiny_model, tmp_path):
    assert download_model(tiny_model, tmp_path).returncode == 0
    model = tmp_path / "out/base-model"
    record = json.loads((model / "run.json").read_text())["base_model"]
    assert record["name"] == str(tiny_model)
    assert record["sha256"] == hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    assert (model / "model.safetensors").resolve() == tiny_model / "model.safetensors"
    assert download_model("nowhere", tmp_path).returncode == 1
    assert (model / "run.json").exists()


def test_a_model_is_not_linked_to_itself(tiny_model, tmp_path):
    assert download_model(tiny_model, tmp_path).returncode == 0
    result = download_model("out/base-model", tmp_path)
    assert result.returncode == 1 and "is where the base model goes" in result.stderr
    assert (tmp_path / "out/base-model/config.json").read_bytes()


def fetch_data(folder, data, *args):
    return run("01_download.py", "--only", "dataset", "--dataset_name", data, "--output_dir", "out", *args, cwd=folder)


def test_data_is_shown_as_the_tutorial_shows_it(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}", "more": 1} for number in range(30)])
    result = fetch_data(tmp_path, data)
    assert result.returncode == 0, result.stderr
    assert "num_rows: 30" in result.stdout and "{'text': 'row 11'}" in result.stdout
    lines = (tmp_path / "out/dataset/train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"text": f"row {number}"} for number in range(30)]
    assert not (tmp_path / "out/dataset/validation.jsonl").exists()
    record = json.loads((tmp_path / "out/dataset/run.json").read_text())["dataset"]
    assert record["train"]["rows"] == 30 and record["name"] == str(data)


def test_a_set_with_fewer_rows_shows_its_last_and_validation_rows_can_be_held_out(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(5)])
    result = fetch_data(tmp_path, data, "--validation_rows", "2")
    assert "{'text': 'row 2'}" in result.stdout
    assert (tmp_path / "out/dataset/validation.jsonl").read_text() == '{"text": "row 3"}\n{"text": "row 4"}\n'
    result = fetch_data(tmp_path, data, "--validation_rows", "5")
    assert result.returncode == 1 and "--validation_rows 5" in result.stderr
    assert (tmp_path / "out/dataset/run.json").exists()


def test_a_folder_brings_its_validation_rows(question_rows, tmp_path):
    assert fetch_data(tmp_path, question_rows).returncode == 0
    for split in ("train", "validation"):
        fetched, given = (folder / f"{split}.jsonl" for folder in (tmp_path / "out/dataset", question_rows))
        assert [json.loads(line) for line in fetched.open()] == [json.loads(line) for line in given.open()]


def test_a_hub_data_set_comes_with_its_commit_and_its_test_rows(hub, tmp_path):
    args = ("--only", "dataset", "--dataset_name", "org/rows", "--output_dir", "out")
    result = run("01_download.py", *args, cwd=tmp_path, **hub_environment(tmp_path, hub[0]))
    assert result.returncode == 0, result.stderr
    record = json.loads((tmp_path / "out/dataset/run.json").read_text())["dataset"]
    assert (record["name"], record["revision"], record["license"]) == ("org/rows", COMMIT, "mit")
    assert (tmp_path / "out/dataset/train.jsonl").read_text() == '{"text": "train"}\n'
    assert (tmp_path / "out/dataset/validation.jsonl").read_text() == '{"text": "test"}\n'


def test_a_folder_laid_out_as_on_a_hub_brings_its_validation_rows(tmp_path):
    (tmp_path / "given/data").mkdir(parents=True)
    for split in ("train", "validation"):
        write_rows(tmp_path / f"given/data/{split}-00000-of-00001.jsonl", [{"text": split}])
    (tmp_path / "given/README.md").write_text("---\nlicense: cc-by-4.0\n---\nA card.\n")
    result = fetch_data(tmp_path, "given")
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "out/dataset/run.json").read_text())["dataset"]["license"] == "cc-by-4.0"
    assert (tmp_path / "out/dataset/validation.jsonl").read_text() == '{"text": "validation"}\n'
