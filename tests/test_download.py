"""01_download.py: from a folder, from a hub (a small server of this test's own), gated and wrong; data with row 11."""

import hashlib
import json
import shutil
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs, unquote

import datasets
import pytest
from conftest import ROOT, load, run, serve, write_rows
from helpers import call, read_rows
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertForMaskedLM

COMMIT = "c0ffee" * 6 + "beef"


@pytest.fixture
def hub(tiny_model):
    """Address and log of a hub with the models org/tiny, org/pickled (.bin only), org/gated and the data org/rows."""
    model = {file.name: file.read_bytes() for file in tiny_model.iterdir()} | {"pytorch_model.bin": b"pickle"}
    model["README.md"] = b"---\nlicense: mit\n---\n"
    repositories = {
        "org/tiny": model | {"original/model.safetensors": b"twice"},
        "org/pickled": {name: content for name, content in model.items() if "safetensors" not in name},
        "org/rows": {
            f"data/{split}-00000-of-00001.jsonl": f'{{"text": "{split}"}}\n'.encode() for split in ("train", "test")
        }
        | {"README.md": model["README.md"]},
    }
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            parts = unquote(self.path).strip("/").split("?")[0].split("/")
            api = parts[0] == "api"
            parts = [part for part in parts if part not in ("api", "models", "datasets")]
            repository, rest = "/".join(parts[:2]), parts[2:]
            if repository.startswith("org/gated"):
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


@pytest.fixture
def use(monkeypatch, tmp_path):
    """Lets this process, which has imported the libraries, go to a hub at an address."""

    def use(address: str) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecret")
        for config in (datasets.config, constants):
            monkeypatch.setattr(config, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", address)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))

    return use


@pytest.fixture
def fetch(monkeypatch, tmp_path):
    """Fetches a model or a data set into out/, as a copied script would."""

    def fetch(only: str, name, *args) -> None:
        monkeypatch.chdir(tmp_path)
        option = {"model": "--model_name_or_path", "dataset": "--dataset_name"}[only]
        call("01_download.py", "--only", only, option, name, "--output_dir", "out", *args)

    return fetch


@pytest.fixture
def refuse(fetch, tmp_path):
    """The one line that a model or a data set is refused with; nothing is written then."""

    def refuse(only: str, name, *args) -> str:
        with pytest.raises(SystemExit) as stop:
            fetch(only, name, *args)
        assert stop.value.code.startswith("error: ") and "\n" not in stop.value.code
        assert not (tmp_path / "out").is_dir() or not any((tmp_path / "out").iterdir())
        return stop.value.code

    return refuse


def step(folder, only, name):
    """The same as make does it."""
    option = {"model": "--model_name_or_path", "dataset": "--dataset_name"}[only]
    command = (ROOT / "scripts/01_download.py", "--only", only, option, name)
    return run("chain/run_step.py", "out", "--", *command, cwd=folder)


def read_origin(folder) -> dict:
    (origin,) = json.loads((folder / "run.json").read_text()).values()
    return origin


def test_a_hub_model_comes_once_with_its_commit(hub, tiny_model, tmp_path):
    address, asked = hub
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache")}
    args = ("--only", "model", "--model_name_or_path", "org/tiny", "--output_dir", "out")
    result = run("01_download.py", *args, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    model = tmp_path / "out"
    assert read_origin(model) == {"name": "org/tiny", "revision": COMMIT, "license": "mit"}
    assert {file.name for file in model.iterdir()} == {file.name for file in tiny_model.iterdir()} | {
        "run.json",
        "README.md",
    }
    assert (model / "model.safetensors").read_bytes() == (tiny_model / "model.safetensors").read_bytes()
    assert (model / "model.safetensors").is_symlink()
    assert not [path for path in asked if ".bin" in path or "original" in path.split("?")[0]]


def test_model_and_data_go_into_folders_of_their_own(tiny_model, question_rows, tmp_path):
    sources = ("--model_name_or_path", tiny_model, "--dataset_name", question_rows)
    result = run("01_download.py", *sources, "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert read_origin(tmp_path / "out/base-model")["name"] == str(tiny_model)
    assert read_origin(tmp_path / "out/dataset")["train"]["rows"] == 28
    # What is there is not written over, nor through a link into what was given.
    result = run("01_download.py", *sources, "--output_dir", "out", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.startswith("error: out/base-model is not empty")


@pytest.mark.parametrize("only", ["model", "dataset"])
def test_a_hub_that_is_not_reached_is_named(only, tmp_path):
    result = step(tmp_path, only, "org/rows")  # tests are offline
    assert result.returncode == 1 and result.stderr.startswith("error: ") and "Traceback" not in result.stderr
    assert f"cannot read the {only} 'org/rows': there is no " in result.stderr
    assert "org/rows, and of https://huggingface.co: Cannot resolve revision 'main' for " in result.stderr


@pytest.mark.parametrize(
    ("only", "name", "page"),
    [("model", "org/gated", "org/gated"), ("dataset", "org/gated-rows", "datasets/org/gated-rows")],
)
def test_what_is_gated_is_answered_by_three_steps(only, name, page, hub, use, refuse):
    use(hub[0])
    message = refuse(only, name)
    assert message.startswith(f"error: {name} is gated")
    for said in (f"https://huggingface.co/{page}", "settings/tokens", "HF_TOKEN=<token> into .env"):
        assert said in message
    assert "secret" not in message


@pytest.mark.parametrize(
    ("only", "name", "said"),
    [
        ("model", "org/absent", "org/absent, and of {hub}: 404 Client Error."),
        ("model", "nowhere/at/all", "nowhere/at/all, and of {hub}: Repo id must be in the form"),
        ("model", "org/pickled", "no safetensors weights"),
        ("dataset", "org/absent", "org/absent, and of {hub}: 404 Client Error."),
        ("dataset", "rows/of/nobody.jsonl", "rows/of/nobody.jsonl, and of {hub}: Repo id"),
    ],
)
def test_what_is_not_there_is_named(only, name, said, hub, use, refuse):
    use(hub[0])
    assert said.format(hub=hub[0]) in refuse(only, name)


def test_a_hub_data_set_comes_with_its_commit_and_its_test_rows(hub, use, fetch, tmp_path):
    use(hub[0])
    fetch("dataset", "org/rows")
    record = read_origin(tmp_path / "out")
    assert (record["name"], record["revision"], record["license"]) == ("org/rows", COMMIT, "mit")
    assert (tmp_path / "out/train.jsonl").read_text() == '{"text": "train"}\n'
    assert (tmp_path / "out/validation.jsonl").read_text() == '{"text": "test"}\n'


# Models in folders ----------------------------------------------------------------------------------------------------
def test_a_local_model_is_linked_and_the_old_one_stays_until_the_new_is_whole(tiny_model, tmp_path):
    assert step(tmp_path, "model", tiny_model).returncode == 0
    record = json.loads((tmp_path / "out/run.json").read_text())
    digest = hashlib.sha256((tiny_model / "model.safetensors").read_bytes()).hexdigest()
    assert record["base_model"] == {"name": str(tiny_model), "license": None, "sha256": digest}
    assert record["script"] == "01_download.py" and record["sha256"] == {"model.safetensors": digest}
    assert (tmp_path / "out/model.safetensors").resolve() == tiny_model / "model.safetensors"
    assert (tmp_path / "out/SHA256SUMS").is_file()
    shutil.copytree(tiny_model, tmp_path / "bin-only", ignore=shutil.ignore_patterns("*.safetensors"))
    result = step(tmp_path, "model", "bin-only")
    assert result.returncode == 1 and "no safetensors weights" in result.stderr
    assert json.loads((tmp_path / "out/run.json").read_text()) == record


def test_the_records_of_the_step_that_made_a_model_stay_with_it(tiny_model, fetch, tmp_path):
    given = shutil.copytree(tiny_model, tmp_path / "given")
    for name in ("run.json", "step.json", "SHA256SUMS"):
        (given / name).write_text("{}")
    (given / "README.md").write_text("---\nlicense: mit\n---\nA card.\n")
    fetch("model", "given")
    assert not {"step.json", "SHA256SUMS"} & {file.name for file in (tmp_path / "out").iterdir()}
    assert read_origin(tmp_path / "out")["license"] == "mit" and (given / "run.json").read_text() == "{}"


def change(folder, **settings):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def without_queries(folder):
    file = folder / "model.safetensors"
    save_file({key: value for key, value in load_file(file).items() if "q_proj" not in key}, file, {"format": "pt"})


def as_bert(folder):
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=24)
    BertForMaskedLM(BertConfig(**size)).save_pretrained(folder)


def without_eos(folder):
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    del settings["eos_token"]
    file.write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (without_queries, "'given' lacks 2 weights, model.layers.0.self_attn.q_proj.weight among them"),
        (lambda folder: change(folder, vocab_size=99), "'given' lacks 2 weights, lm_head.weight among them"),
        (as_bert, "'given' is a BertForMaskedLM (no causal language model). Give one of text alone"),
        (without_eos, "the tokenizer of 'given' has no EOS token"),
        (
            lambda folder: (folder / "model.safetensors").write_bytes(b""),
            "cannot read the model 'given': Error while des",
        ),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "cannot read the model 'given': Expecting property name",
        ),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot read the model 'given': "),
    ],
    ids=["weights", "shapes", "kind", "eos", "empty", "config", "tokenizer"],
)
def test_a_model_that_could_not_be_trained_is_refused(spoil, said, tiny_model, refuse, tmp_path):
    spoil(shutil.copytree(tiny_model, tmp_path / "given"))
    assert said in refuse("model", "given")


@pytest.mark.parametrize("auto_map", [{}, {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}])
def test_a_model_of_an_unknown_kind_is_linked_and_its_code_not_run(auto_map, tiny_model, fetch, tmp_path):
    given = shutil.copytree(tiny_model, tmp_path / "given")
    change(given, model_type="nobody_knows", auto_map=auto_map)
    (given / "code.py").write_text("from pathlib import Path\nPath('ran').touch()\n")
    fetch("model", "given")
    assert (tmp_path / "out/code.py").is_symlink() and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("only", ["model", "dataset"])
def test_nothing_is_written_into_the_folder_that_was_given(only, tiny_model, question_rows, fetch, tmp_path):
    source = {"model": tiny_model, "dataset": question_rows}[only]
    given = shutil.copytree(source, tmp_path / "given")
    with pytest.raises(SystemExit) as stop:
        fetch(only, "given", "--output_dir", "given")
    assert stop.value.code.startswith("error: given is not empty")
    assert {file.name: file.read_bytes() for file in given.iterdir()} == {
        file.name: file.read_bytes() for file in source.iterdir()
    }


# Data -----------------------------------------------------------------------------------------------------------------
def test_data_is_shown_as_the_tutorial_shows_it(fetch, tmp_path, capsys):
    data = write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}", "more": 1} for number in range(30)])
    fetch("dataset", data)
    shown = capsys.readouterr().out
    assert "num_rows: 30" in shown and "{'text': 'row 11'}" in shown
    assert read_rows(tmp_path / "out/train.jsonl") == [{"text": f"row {number}"} for number in range(30)]
    assert not (tmp_path / "out/validation.jsonl").exists()
    digest = hashlib.sha256((tmp_path / "out/train.jsonl").read_bytes()).hexdigest()
    expected = {"name": str(data), "license": None, "held_out_rows": 0, "train": {"rows": 30, "sha256": digest}}
    assert read_origin(tmp_path / "out") == expected


def test_a_set_with_fewer_rows_shows_its_last_and_validation_rows_can_be_held_out(fetch, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(5)])
    fetch("dataset", "rows.jsonl", "--validation_rows", 2)
    assert "{'text': 'row 2'}" in capsys.readouterr().out
    assert read_rows(tmp_path / "out/validation.jsonl") == [{"text": "row 3"}, {"text": "row 4"}]
    record = read_origin(tmp_path / "out")
    assert (record["held_out_rows"], record["train"]["rows"], record["validation"]["rows"]) == (2, 3, 2)


@pytest.mark.parametrize("count", [5, -1])
def test_rows_to_hold_out_leave_some_to_train_on(count, refuse, tmp_path):
    write_rows(tmp_path / "rows.jsonl", [{"text": f"row {number}"} for number in range(5)])
    said = refuse("dataset", "rows.jsonl", "--validation_rows", count)
    assert f"test_size={count} should be" in said


def test_a_folder_brings_its_validation_rows(question_rows, fetch, tmp_path):
    fetch("dataset", question_rows)
    for split in ("train", "validation"):
        assert read_rows(tmp_path / f"out/{split}.jsonl") == read_rows(question_rows / f"{split}.jsonl")


def test_a_folder_laid_out_as_on_a_hub_brings_its_validation_rows(fetch, tmp_path):
    (tmp_path / "given/data").mkdir(parents=True)
    for split in ("train", "validation"):
        write_rows(tmp_path / f"given/data/{split}-00000-of-00001.jsonl", [{"text": split}])
    (tmp_path / "given/README.md").write_text("---\nlicense: cc-by-4.0\n---\nA card.\n")
    fetch("dataset", "given")
    assert read_origin(tmp_path / "out")["license"] == "cc-by-4.0"
    assert (tmp_path / "out/validation.jsonl").read_text() == '{"text": "validation"}\n'


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("rows.jsonl", '{"text": "a"}\n\n{"text": "b', "cannot read the dataset 'rows.jsonl': "),
        ("rows.jsonl", '{"text": "a"}\n[1, 2]\n', "cannot read the dataset 'rows.jsonl': "),
        ("rows.jsonl", '{"text": "ä"}\n'.encode("latin-1"), "cannot read the dataset 'rows.jsonl': "),
        ("rows.csv", "text\nNone\n", "'rows.csv', row 1: text is empty, or not text or messages."),
        ("rows.jsonl", '{"text": "a \\ud800 b"}\n', "generating the dataset JSON parse error: The surrogate pair"),
        ("rows.jsonl", "", "cannot read the dataset 'rows.jsonl': it is empty"),
        ("rows.csv", 'text\n"a', "Error tokenizing data"),
        ("rows.csv", "text\n", "cannot read the dataset 'rows.csv': "),
        ("rows.parquet", "PAR1xx", "Parquet"),
        ("rows.jsonl", '{"question": "a"}\n', "'rows.jsonl' has the columns ['question'], not text, messages,"),
        ("rows.jsonl", '{"text": 5}\n', "'rows.jsonl', row 1: text is empty, or not text or messages."),
    ],
)
def test_data_that_cannot_be_read_is_named(name, content, said, refuse, tmp_path):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refuse("dataset", name)


def test_a_byte_order_mark_and_rare_characters_are_read(fetch, tmp_path):
    text = "a \u200b \u0000 😀 \u2028 \x85 \u202e שלום b"
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": text}) + "\r\n", encoding="utf-8-sig")
    fetch("dataset", "rows.jsonl")
    assert (tmp_path / "out/train.jsonl").read_text() == json.dumps({"text": text}, ensure_ascii=False) + "\n"


USER, BLUE = {"role": "user", "content": "what color is the sky"}, {"role": "assistant", "content": "blue"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]}


class Rows(list):
    """A data set of one column or two, without its types."""

    column_names = property(lambda self: list(self[0]))

    def select_columns(self, names):
        return [{name: row[name] for name in names} for row in self]


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "a", "more": 1}],
        [{"prompt": "a", "completion": "b"}],
        [{"prompt": [USER], "completion": [BLUE]}],
        [{"messages": [USER, BLUE], "tools": []}],
        [{"messages": [USER, CALL, {"role": "tool", "content": ""}, BLUE]}],
        [{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, BLUE]}],
    ],
)
def test_rows_are_taken_without_other_columns(rows):
    taken = [{name: value for name, value in row.items() if name != "more"} for row in rows]
    assert load("01_download.py").check_rows("rows", Rows(rows)) == taken


@pytest.mark.parametrize(
    ("rows", "number"),
    [
        ([{"text": "a"}, {"text": ""}], 2),
        ([{"text": "a"}, {"text": None}], 2),
        ([{"text": "a"}, {"text": 5}], 2),
        ([{"text": True}], 1),
        ([{"text": ["a", "b"]}], 1),
        ([{"text": {"a": "b"}}], 1),
        ([{"text": [USER]}], 1),
        ([{"messages": "hi"}], 1),
        ([{"messages": 5}], 1),
        ([{"messages": []}], 1),
        ([{"messages": [1]}], 1),
        ([{"messages": ["a"]}], 1),
        ([{"messages": [{"role": "user"}]}], 1),
        ([{"messages": [{"role": "user", "content": ""}]}], 1),
        ([{"messages": [USER, {"role": "assistant", "content": None}]}], 1),
        ([{"messages": [USER, {"role": None, "content": "blue"}]}], 1),
        ([{"messages": [{"role": "user", "content": 5}]}], 1),
        ([{"messages": [{"from": "human", "value": "a"}]}], 1),
        ([{"prompt": ["a", "b"], "completion": "c"}], 1),
        ([{"prompt": "a", "completion": [BLUE]}], 1),
        ([{"prompt": [USER], "completion": "blue"}], 1),
        ([{"prompt": 5, "completion": 5}], 1),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}], 2),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}], 2),
        ([{"prompt": [USER], "completion": [{"role": "assistant", "content": ""}]}], 1),
        ([{"prompt": "a", "completion": "b"}, {"prompt": [USER], "completion": [BLUE]}], 2),
    ],
)
def test_a_row_with_nothing_to_learn_from_is_named(rows, number):
    with pytest.raises(SystemExit) as stop:
        load("01_download.py").check_rows("rows", Rows(rows))
    assert stop.value.code.startswith(f"error: 'rows', row {number}: ")
