"""Hub ids in copied scripts: each alone in an empty folder, with a hub imitated on this machine.

Most runs are forks of a process that has imported the libraries; 02 to 06 also run once each as a process of their own.
"""

import contextlib
import hashlib
import json
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch
from conftest import ROOT, Process, run
from helpers import read, read_losses, read_rows, read_weights
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

DOWNLOAD, LORA, FULL, MERGE, GENERATE, PIPELINE = (path.name for path in sorted((ROOT / "scripts").glob("0[1-6]_*.py")))
TOKEN = "hf_PLANTED" + "abcdefgh" * 3
PROMPTS = ["what color is the sky", "red z"]
TRAINING = ["--model_name_or_path", "org/tiny", "--dataset_name", "org/rows", "--dataset_test_split", "test"]
TRAINING += ["--max_steps", "4", "--logging_steps", "1", "--learning_rate", "0.01", "--lora_dropout", "0"]
TRAINING += ["--output_dir", "out"]
# Python that runs before a script. What the library tries again, it tries at once: no variable shortens that.
AT_ONCE = "import time; time.sleep = lambda seconds: None\n"
OFFLINE = "import datasets, huggingface_hub as h; h.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True\n"
SMALL_PIECES = "import huggingface_hub as h; h.constants.DOWNLOAD_CHUNK_SIZE = 1000\n"


class Hub:
    """Models and data sets by kind and id, each with its commits by revision: the last is main, the first is tag v1."""

    def __init__(self):
        self.repositories, self.breaks, self.asked, self.port = {}, {}, [], 0
        # Tokens; the place of a wrong byte by repository; beginnings of addresses with what is answered there once.
        self.refused, self.damaged, self.busy = set(), {}, []
        self.open()

    def open(self):
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                hub.answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self.server.server_port
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @contextlib.contextmanager
    def gone(self):
        """Closes the port until the end of the block."""
        self.close()
        try:
            yield
        finally:
            self.open()

    def add(self, name: str, *versions: dict[str, bytes], kind="models") -> list[str]:
        """Publishes a repository; returns its commits."""
        commits = [hashlib.sha1(f"{name} {number}".encode()).hexdigest() for number in range(len(versions))]
        found = dict(zip(commits, versions, strict=True))
        revisions = {commit: commit for commit in commits} | {"v1": commits[0], "main": commits[-1]}
        self.repositories[kind, name] = {key: (commit, found[commit]) for key, commit in revisions.items()}
        return commits

    def answer(self, request):
        """As the real one: the parts of a path are [api] [resolve-cache] [kind] owner name what revision path."""
        url = urlsplit(request.path)
        self.asked.append((request.command, url.path, request.headers["Authorization"], request.headers["Range"]))
        parts = unquote(url.path).strip("/").split("/")
        prefixes = [parts.pop(0) for name in ("api", "resolve-cache") if parts[0] == name]
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        parts[2:2] = ["file"] if "resolve-cache" in prefixes else []
        name, what, revision, path = "/".join(parts[:2]), *(*parts[2:4], "", "")[:2], "/".join(parts[4:])
        known = request.headers["Authorization"] is not None
        if self.busy and request.path.startswith(self.busy[0][0]):
            return self.send(request, 429, self.busy.pop(0)[1])
        if request.headers["Authorization"] in self.refused:
            said = {
                "X-Error-Message": "Invalid credentials in Authorization header",
                "Content-Type": "application/json",
            }
            return self.send(request, 401, said, b'{"error": "Invalid username or password."}')
        repository = self.repositories.get((kind, name))
        if repository is None:
            said = {"X-Error-Code": "RepoNotFound", "Content-Type": "application/json"}
            return self.send(request, 404 if known else 401, said, b'{"error": "Invalid username or password."}')
        card = path == "README.md" and repository.get(revision, ("", {}))[1].get(path)
        if "gated" in name and what in ("auth-check", "resolve", "file") and not card:  # what is there everyone may see
            said = {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not in the authorized list."}
            return self.send(request, 403 if known else 401, said)
        if what == "auth-check":
            return self.send(request, 200)
        if what == "refs":
            commits = {key: commit for key, (commit, _) in repository.items() if key != commit}
            refs = {
                kind: [{"name": key, "ref": key, "targetCommit": commits[key]} for key in commits if key in names]
                for kind, names in {"branches": ["main"], "tags": ["v1"], "converts": []}.items()
            }
            return self.send(request, 200, {"Content-Type": "application/json"}, json.dumps(refs).encode())
        if (revision or "main") not in repository:
            return self.send(request, 404, {"X-Error-Code": "RevisionNotFound"})
        commit, files = repository[revision or "main"]
        if what in ("resolve", "file"):
            return self.send_file(request, kind, name, commit, path, files.get(path), "resolve-cache" in prefixes)
        if what in ("tree", "paths-info"):
            wanted = [path]
            if request.command == "POST":
                wanted = parse_qs(request.rfile.read(int(request.headers["Content-Length"])).decode())["paths"]
            answer = self.list_files(
                files, what, wanted, "true" in parse_qs(url.query).get("recursive", [""])[0].lower()
            )
            if what == "tree" and path and not answer:
                return self.send(request, 404, {"X-Error-Code": "EntryNotFound"})
        elif what in ("", "revision"):
            siblings = [{"rfilename": name} for name in files]
            answer = {"id": name, "sha": commit, "siblings": siblings, "cardData": {"license": "mit"}}
        else:
            return self.send(request, 404)
        return self.send(request, 200, {"Content-Type": "application/json"}, json.dumps(answer).encode())

    def list_files(self, files, what, wanted, recursive) -> list[dict]:
        folders = {str(parent) for name in files for parent in list(Path(name).parents)[:-1]}
        names = wanted
        if what == "tree":
            prefix = f"{wanted[0]}/" if wanted[0] else ""
            names = [name for name in (*folders, *files) if name.startswith(prefix)]
            names = [name for name in names if recursive or "/" not in name[len(prefix) :]]
        found = [{"type": "file", "path": name, "size": len(files[name])} for name in names if name in files]
        found += [{"type": "directory", "path": name} for name in names if name in folders]
        return [entry | {"oid": "0" * 40} for entry in found]

    def send_file(self, request, kind, name, commit, path, content, direct):
        """A file, or where it is: what is large on another host, what is small at its commit."""
        headers = {"X-Repo-Commit": commit}
        if content is None:
            return self.send(request, 404, headers | {"X-Error-Code": "EntryNotFound"})
        headers["ETag"] = f'"{hashlib.sha256(content).hexdigest()}"'
        if not direct:
            location = {"Location": f"/api/resolve-cache/{kind}/{name}/{commit}/{path}"}
            if not path.endswith((".safetensors", ".parquet")):
                return self.send(request, 307, headers | location)
            headers |= {"X-Linked-Etag": headers["ETag"], "X-Linked-Size": len(content)}
            return self.send(
                request, 302, headers | {"Location": f"http://localhost:{self.port}{location['Location']}"}
            )
        first = int((request.headers["Range"] or "bytes=0-").removeprefix("bytes=").split("-")[0])
        if first:
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        end = len(content)
        if name in self.damaged and path.endswith((".safetensors", ".jsonl")):
            content = bytearray(content)
            content[self.damaged[name]] ^= 1
        if path.endswith(".safetensors") and request.command == "GET" and self.breaks.get(name):
            self.breaks[name], end = self.breaks[name] - 1, (first + end) // 2
        return self.send(request, 206 if first else 200, headers, content[first:], end - first)

    def send(self, request, status, headers=(), content=b"", length=None):
        request.send_response(status)
        for key, value in ({"Content-Length": len(content)} | dict(headers)).items():
            request.send_header(key, str(value))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content[:length])


def read_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def template(mark: str) -> str:
    """A chat template that makes other answers than the tiny model's own."""
    return "{% for message in messages %}{{ bos_token + message['content'] + ' MARK ' }}{% endfor %}".replace(
        "MARK", mark
    )


@pytest.fixture(scope="module")
def hub(tiny_model, question_rows, tmp_path_factory):
    """A hub with org/tiny in two commits of other weights and templates, and org/rows; what is begun here asks it."""
    hub = Hub()
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    torch.manual_seed(1)
    hub.newer = tmp_path_factory.mktemp("newer") / "model"
    shutil.copytree(tiny_model, hub.newer)
    LlamaForCausalLM(model.config).save_pretrained(hub.newer)
    (hub.newer / "chat_template.jinja").write_text(template("b"))
    hub.older = tiny_model
    versions = [read_files(tiny_model), read_files(hub.newer)]
    hub.commits = dict(zip(("v1", "main"), hub.add("org/tiny", *versions), strict=True))
    hub.pinned = {"name": "org/pinned", "revision": hub.add("org/pinned", *versions)[0]}
    rows = {"train": "train", "test": "validation"}
    rows = {
        f"data/{key}-00000-of-00001.jsonl": (question_rows / f"{name}.jsonl").read_bytes() for key, name in rows.items()
    }
    hub.add("org/rows", rows, kind="datasets")
    hub.add("org/gated-rows", rows | {"README.md": b"what this is"}, kind="datasets")
    hub.add("org/gated", versions[0] | {"README.md": b"what this is"})
    hub.environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}"}
    hub.cache = tmp_path_factory.mktemp("cache")
    before, Process.zygote = Process.zygote, None
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (hub.environment | {"HF_HOME": str(hub.cache)}).items():
            patch.setenv(key, value)
        yield hub
    if Process.zygote:
        Process.zygote.stdin.close()
        Process.zygote.wait()
    Process.zygote = before
    hub.close()


def order(script: str, folder: Path, *args, **faults) -> Callable[[], Process]:
    """What starts a script that is alone in its folder, as a fork."""
    folder.mkdir(parents=True, exist_ok=True)
    return partial(Process, Path(shutil.copy(ROOT / "scripts" / script, folder)), args, folder, **faults)


def order_step(script: str, folder: Path, *args, **faults) -> Callable[[], Process]:
    """The same through the runner, which gives --output_dir."""
    order(script, folder)
    args, result = list(args), []
    if "--output_dir" in args:
        _, *result = args[-2:]
        del args[-2:]
    return partial(Process, ROOT / "scripts/chain/run_step.py", [*result, "--", script, *args], folder, **faults)


def wait(*orders: Callable[[], Process]) -> list[subprocess.CompletedProcess]:
    """Runs two at a time."""
    running, results = [], []
    for begin in orders:
        if len(running) == 2:
            results.append(running.pop(0).wait())
        running.append(begin())
    return results + [process.wait() for process in running]


def finish(*orders: Callable[[], Process]) -> list[subprocess.CompletedProcess]:
    results = wait(*orders)
    for result in results:
        assert result.returncode == 0, f"{result.args}\n{result.stderr}"
    return results


def run_alone(orders: dict[Path, tuple], **environment) -> None:
    """Runs scripts as processes of their own, two at a time; each folder has its name and its cache."""

    def run_one(folder: Path):
        script, *args = orders[folder]
        path = order(script, folder).args[0]
        return run(path, *args, cwd=folder, **environment, HF_HOME=str(folder / "cache"))

    with ThreadPoolExecutor(2) as pool:
        for result in pool.map(run_one, orders):
            assert result.returncode == 0, f"{result.args}\n{result.stderr}"


def check_error(result: subprocess.CompletedProcess, *said: str, lines=1) -> None:
    """Asserts that a script ended with one line, or some, that begins with error and says something."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, f"{result.args}\n{result.stderr}"
    message = result.stderr[result.stderr.rindex("error: ") :].strip()
    assert all(part in message for part in said) and message.count("\n") < lines, f"{result.args}\n{message}"


# Training -------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def trained(hub, tmp_path_factory):
    """Folder with the results of 02 and 03 on both revisions, each made alone in a folder: lora-v1/out and so on."""
    folder = tmp_path_factory.mktemp("trained")
    pinned = ("--model_revision", hub.commits["v1"])
    run_alone(
        {folder / "lora-main": (LORA, *TRAINING), folder / "full-v1": (FULL, *TRAINING, "--model_revision", "v1")},
        **hub.environment,
    )
    finish(order(LORA, folder / "lora-v1", *TRAINING, *pinned), order(FULL, folder / "full-main", *TRAINING))
    return folder


@pytest.mark.parametrize("revision", ["main", "v1"])
def test_a_training_records_the_hub_id_and_the_commit_of_what_it_trained(revision, hub, trained):
    origin = {"name": "org/tiny", "revision": hub.commits[revision]}
    for kind in ("lora", "full"):
        record = read(trained / f"{kind}-{revision}/out/run.json")
        assert record["base_model"] == origin
        assert record["dataset"] == {"name": "org/rows", "rows": 28}
        assert record["metrics"]["eval_loss"] > 0
    adapter = read(trained / f"lora-{revision}/out/adapter/adapter_config.json")
    assert {"name": adapter["base_model_name_or_path"], "revision": adapter["revision"]} == origin
    # Before the first step an adapter changes nothing: both began with the same weights, those of that revision.
    losses = {kind: read_losses(trained / f"{kind}-{revision}/out") for kind in ("lora", "full")}
    assert losses["lora"][0] == losses["full"][0] and losses["lora"][1:] != losses["full"][1:]
    weights = {key: read_weights(place) for key, place in (("v1", hub.older), ("main", hub.newer))}
    model = trained / f"full-{revision}/out/model"
    template = read_files(hub.older if revision == "v1" else hub.newer)["chat_template.jinja"].decode()
    assert AutoTokenizer.from_pretrained(model).chat_template == template
    saved = AutoModelForCausalLM.from_pretrained(model).state_dict()
    distances = {key: max((saved[name] - value[name]).abs().max() for name in value) for key, value in weights.items()}
    assert 0 < distances[revision] < 0.1 < min(value for key, value in distances.items() if key != revision)


def test_a_training_of_a_hub_model_goes_on_after_sigterm_as_if_nothing_had_been(hub, trained, tmp_path):
    args = [*TRAINING, "--model_revision", hub.commits["v1"]]
    (result,) = wait(order(LORA, tmp_path, *args, step=[signal.SIGTERM, 3]))
    said = "To go on: --resume_from_checkpoint out/checkpoints/checkpoint-3"
    assert result.returncode == 143 and said in result.stdout, result
    assert not (tmp_path / "out/run.json").exists() and not (tmp_path / "out/adapter").exists()
    finish(order(LORA, tmp_path, *args, *said.split()[-2:]))
    for name in ("adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja"):
        expected = (trained / "lora-v1/out/adapter" / name).read_bytes()
        if name == "adapter_config.json":  # it lists the layers in an order of chance
            expected, found = (json.loads(text) for text in (expected, (tmp_path / "out/adapter" / name).read_bytes()))
            assert {key for key in expected if expected[key] != found[key]} <= {"target_modules"}
        else:
            assert (tmp_path / "out/adapter" / name).read_bytes() == expected
    assert read_losses(tmp_path / "out") == read_losses(trained / "lora-v1/out")


def test_a_training_without_a_hub_reads_the_tutorials_file_and_names_one_that_is_not_there(tiny_model, hub, tmp_path):
    file = ROOT.parent / "shared/data/guanaco-llama2-1k.parquet"
    args = ["--model_name_or_path", tiny_model, "--output_dir", "out", "--max_steps", "2", "--logging_steps", "1"]
    asked = len(hub.asked)
    missing = ["missing.parquet", "data/missing.jsonl", str(tmp_path / "missing.csv")]
    for name, result in zip(
        missing, wait(*(order(LORA, tmp_path, *args, "--dataset_name", name) for name in missing)), strict=True
    ):
        check_error(result, "no data set at", name)
    assert not [path for _, path, *_ in hub.asked[asked:] if "tiny" in path or "org/rows" in path]
    if not file.exists():
        pytest.skip(f"{file.name} is not there")
    finish(order(LORA, tmp_path, *args, "--dataset_name", file))
    record = read(tmp_path / "out/run.json")
    assert record["dataset"] == {"name": str(file), "rows": 1000} and record["base_model"] == {"name": str(tiny_model)}
    losses = read_losses(tmp_path / "out")
    assert len(losses) == 2 and all(0 < loss < 10 for loss in losses)


def rename_base(adapter: Path, folder: Path, base: str, revision: str | None = None) -> Path:
    """A copy of an adapter that names another base."""
    shutil.copytree(adapter, folder)
    config = read(folder / "adapter_config.json") | {"base_model_name_or_path": base, "revision": revision}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


# Answers --------------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def adapters(hub, trained, tmp_path_factory):
    """Folders of an adapter whose template is its own, and of one without tokenizer whose base is read at one commit
    alone; both are also on the hub.
    """
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(trained / "lora-v1/out/adapter", folder / "adapter")
    (folder / "adapter/chat_template.jinja").write_text(template("c"))
    bare = rename_base(folder / "adapter", folder / "bare", "org/pinned", hub.pinned["revision"])
    for file in (*bare.glob("*token*"), *bare.glob("*.jinja")):
        file.unlink()
    for name in ("adapter", "bare"):
        hub.add(f"org/{name}", read_files(folder / name))
    return folder


def ask(script: str, folder: Path, model, *more, **faults) -> Callable[[], Process]:
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    if script == PIPELINE:
        prompts = ["--prompt", *PROMPTS]
    args = ["--model_name_or_path", model, *prompts, "--max_new_tokens", "12", "--output", "answers.jsonl", *more]
    return order(script, folder, *args, **faults)


def merge(folder: Path, model, *more, **faults) -> Callable[[], Process]:
    args = ["--model_name_or_path", model, "--output_dir", "merged", "--max_new_tokens", "4", "--prompts", *PROMPTS]
    return order(MERGE, folder, *args, *more, **faults)


def read_answers(folder: Path) -> list[str]:
    return [row["answer"].strip() for row in read_rows(folder / "answers.jsonl")]


def test_a_model_and_an_adapter_answer_the_same_from_a_hub_as_from_folders(hub, adapters, tmp_path):
    """Also merged, through the pipeline, and without the hub; folders with all that is needed say what is right."""
    models = {"tiny": hub.newer, "adapter": adapters / "adapter", "bare": adapters / "bare"}
    orders, again = [], []
    for name, place in models.items():
        base = [] if name == "tiny" else ["--base_model", hub.older]
        orders.append(ask(GENERATE, tmp_path / f"right-{name}", place, *base))
        for script in (GENERATE, PIPELINE):
            orders.append(ask(script, tmp_path / f"hub-{name}-{script}", f"org/{name}"))
            orders += [ask(script, tmp_path / f"folder-{name}-{script}", place)] if base else []
            again.append(ask(script, tmp_path / f"offline-{name}-{script}", f"org/{name}", code=OFFLINE))
        if base:
            orders += [merge(tmp_path / f"hub-{name}", f"org/{name}"), merge(tmp_path / f"folder-{name}", place)]
            again.append(merge(tmp_path / f"offline-{name}", f"org/{name}", code=OFFLINE))
    finish(*orders)
    with hub.gone():
        # Without HF_HUB_OFFLINE the cache does for a base; of an adapter on a hub PEFT asks the hub.
        finish(*again, ask(GENERATE, tmp_path / "gone-adapter", adapters / "adapter", code=AT_ONCE))
    merged = [(where, name) for where in ("folder", "hub", "offline") for name in ("adapter", "bare")]
    for where, name in merged:
        record = read(tmp_path / f"{where}-{name}/merged/run.json")
        base = {"name": "org/tiny", "revision": hub.commits["v1"]} if name == "adapter" else hub.pinned
        assert record["base_model"] == base
        assert record["adapter"] == {"name": str(models[name]) if where == "folder" else f"org/{name}"}
        weights, expected = (read_weights(tmp_path / f"{at}-{name}/merged/model") for at in (where, "folder"))
        assert all(torch.equal(weights[key], expected[key]) for key in expected)
    finish(
        *(ask(script, tmp_path / f"merged_{where}-{name}-{script}", tmp_path / f"{where}-{name}/merged/model")
          for script, (where, name) in zip([GENERATE, PIPELINE] * 2, merged[:4], strict=True))
    )  # fmt: skip
    answers = {path.name: read_answers(path) for path in tmp_path.iterdir() if (path / "answers.jsonl").exists()}
    right = {name: answers[f"right-{name}"] for name in models}
    assert len({tuple(texts) for texts in right.values()}) == 3
    assert answers == {key: right[key.split("-")[1]] for key in answers} and len(answers) == 24
    assert not [path for _, path, *_ in hub.asked if path.startswith("/org/pinned/resolve/main")]


def test_scripts_run_as_processes_with_an_empty_cache_and_again_offline(hub, trained, adapters, tmp_path):
    answer = ("--model_name_or_path", "org/adapter", "--max_new_tokens", "4", "--prompt", PROMPTS[0])
    answer += ("--output", "answers.jsonl")
    merging = (MERGE, "--model_name_or_path", "org/bare", "--max_new_tokens", "4", "--output_dir", "merged")
    places = {tmp_path / script: (script, *answer) for script in (GENERATE, PIPELINE)}
    run_alone(places | {tmp_path / MERGE: merging}, **hub.environment)
    found = read_answers(tmp_path / GENERATE)
    assert found == read_answers(tmp_path / PIPELINE)
    template = (tmp_path / MERGE / "merged/model/chat_template.jinja").read_bytes()
    assert template == (hub.older / "chat_template.jinja").read_bytes()
    (tmp_path / GENERATE / "answers.jsonl").unlink()
    shutil.move(trained / "lora-main/cache", tmp_path / LORA / "cache")
    asked = len(hub.asked)
    again = {tmp_path / LORA: (LORA, *TRAINING), tmp_path / GENERATE: (GENERATE, *answer)}
    run_alone(again, **hub.environment | {"HF_HUB_OFFLINE": "1"})
    assert read_answers(tmp_path / GENERATE) == found
    assert read_losses(tmp_path / LORA / "out") == read_losses(trained / "lora-main/out")
    assert len(hub.asked) == asked


# What goes wrong ------------------------------------------------------------------------------------------------------
def list_orders(model: str, data: str, adapter: Path) -> list[tuple[str, list, str]]:
    """Scripts with options to read a model, a data set, or an adapter's base; what is the matter with."""
    good = ["--model_name_or_path", "org/tiny", "--dataset_name", "org/rows"]
    orders = [(script, [*good, "--model_name_or_path", model], model) for script in (LORA, FULL)]
    orders += [(script, [*good, "--dataset_name", data], f"datasets/{data}") for script in (LORA, FULL)]
    orders = [(script, [*args, "--output_dir", "out"], name) for script, args, name in orders]
    for place in (model, adapter):
        orders.append((MERGE, ["--model_name_or_path", place, "--output_dir", "out"], model))
        orders += [(script, ["--model_name_or_path", place, "--prompt", "a"], model) for script in (GENERATE, PIPELINE)]
    return orders


def test_what_is_gated_is_answered_by_three_steps_and_no_token_is_shown(hub, adapters, tmp_path):
    orders = list_orders("org/gated", "org/gated-rows", rename_base(adapters / "adapter", tmp_path / "a", "org/gated"))
    orders.append(
        (DOWNLOAD, ["--model_name_or_path", "org/gated", "--only", "model", "--output_dir", "out"], "org/gated")
    )
    data = ["--dataset_name", "org/gated-rows", "--only", "dataset", "--output_dir", "out"]
    orders.append((DOWNLOAD, data, "datasets/org/gated-rows"))
    asked = len(hub.asked)
    runs = []
    for number, (script, args, name) in enumerate(orders):
        runs.append((name, order(script, tmp_path / f"{number}", *args)))
        runs.append((name, order(script, tmp_path / f"{number}-env", *args)))
        (tmp_path / f"{number}-env/.env").write_text(f"HF_TOKEN={TOKEN}{number}\n")
        code = f"import os; os.environ['HF_TOKEN'] = '{TOKEN}{number}step'"
        runs.append((name, order_step(script, tmp_path / f"{number}-step", *args, code=code)))
    for (name, _), result in zip(runs, wait(*(begin for _, begin in runs)), strict=True):
        check_error(
            result,
            f"https://huggingface.co/{name}",
            "https://huggingface.co/settings/tokens",
            "HF_TOKEN=",
            ".env",
            lines=1 + 3 * ("is gated, and this" in result.stderr),
        )
        assert TOKEN not in result.stdout + result.stderr
    for path in [*tmp_path.rglob("*"), *hub.cache.rglob("*")]:
        assert path.name == ".env" or not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    tokens = {token for _, path, token, _ in hub.asked[asked:] if "gated" in path}
    assert tokens == {None} | {f"Bearer {TOKEN}{n}{end}" for n in range(len(orders)) for end in ("", "step")}


def test_what_is_not_on_a_hub_or_a_hub_that_is_not_reached_is_an_error_of_one_line(hub, adapters, tmp_path):
    finish(ask(GENERATE, tmp_path / "before", "org/tiny"))  # org/tiny is in the cache
    orders = list_orders(
        "org/absent", "org/absent-rows", rename_base(adapters / "adapter", tmp_path / "a", "org/absent")
    )
    for gone in (False, True):
        with hub.gone() if gone else contextlib.nullcontext():
            results = wait(
                *(order(script, tmp_path / f"{gone}-{number}", *args, code=AT_ONCE)
                  for number, (script, args, _) in enumerate(orders))
            )  # fmt: skip
        for (_, _, name), result in zip(orders, results, strict=True):
            kind, name = "data set" if "datasets" in name else "model", name.removeprefix("datasets/")
            check_error(result, f"no {kind} at", name)


def test_a_transfer_that_breaks_off_once_goes_on_where_it_was(hub, adapters, trained, tmp_path):
    """In the middle of the weights; the library waits a second and asks for the rest."""
    model = read_files(hub.older)
    orders = {}
    for script in (LORA, FULL, MERGE, GENERATE, PIPELINE):
        name = f"org/breaks-{script[:2]}"
        hub.add(name, model)
        hub.breaks[name], folder = 1, tmp_path / script
        if script in (LORA, FULL):
            start = order(script, folder, *TRAINING, "--model_name_or_path", name, code=SMALL_PIECES + AT_ONCE)
        else:
            base = rename_base(adapters / "adapter", tmp_path / f"adapter-{script}", name)
            start = (merge if script == MERGE else partial(ask, script))(folder, base, code=SMALL_PIECES + AT_ONCE)
        orders[name] = start
    asked = len(hub.asked)
    results = finish(*orders.values())
    for name, result in zip(orders, results, strict=True):
        fetched = [entry[3] for entry in hub.asked[asked:] if f"{name}/" in entry[1] and entry[0] == "GET"
                   and entry[1].endswith(".safetensors")]  # fmt: skip
        assert len(fetched) == 2 and fetched[0] is None and fetched[1].startswith("bytes="), fetched
        assert 0 < int(fetched[1][6:-1]) < len(model["model.safetensors"])
        assert "Trying to resume download" in result.stderr
    for kind, script in (("lora", LORA), ("full", FULL)):
        assert read_losses(tmp_path / script / "out") == read_losses(trained / f"{kind}-v1/out")
    assert read_answers(tmp_path / GENERATE) == read_answers(tmp_path / PIPELINE)


def test_a_transfer_that_breaks_off_for_good_is_explained_and_the_same_command_goes_on(hub, trained, tmp_path):
    """By the runner; a script alone ends with the library's own error."""
    hub.add("org/breaks", read_files(hub.older))
    hub.breaks["org/breaks"] = 100
    args = ("--model_name_or_path", "org/breaks", *TRAINING[2:])
    orders = [make(LORA, tmp_path / make.__name__, *args, code=AT_ONCE) for make in (order, order_step)]
    alone, step = wait(*orders)
    assert alone.returncode == step.returncode == 1
    assert "Traceback" not in step.stderr and "See to the network, and type the same command again" in step.stderr
    hub.breaks["org/breaks"] = 0
    finish(*orders)
    for place in ("order/out", "order_step/out"):
        assert read_losses(tmp_path / place) == read_losses(trained / "lora-v1/out")


# Downloads as make begins them ----------------------------------------------------------------------------------------
RUNNER, READER = ROOT / "scripts/chain/run_step.py", ROOT / "scripts/chain/read_rows.py"
ROW = b'{"prompt": "a", "completion": "b"}\n'
BOTH = {"model": "org/tiny", "dataset": "org/rows"}
PLACES = {"model": "base-model", "dataset": "dataset"}


def fetch(kind: str, name: str, folder: Path, *args, **faults) -> Callable[[], Process]:
    folder.mkdir(parents=True, exist_ok=True)
    step = [ROOT / "scripts" / DOWNLOAD, "--only", "model", "--model_name_or_path"]
    step = step if kind == "model" else [READER, "--dataset_name"]
    return partial(Process, RUNNER, [PLACES[kind], "--", *step, name, *args], folder, **faults)


def read_origin(kind: str, folder: Path) -> dict:
    return read(folder / PLACES[kind] / "run.json")[PLACES[kind].replace("-", "_")]


def test_a_second_download_asks_for_no_file_again_and_takes_no_room(hub, tmp_path):
    orders = [fetch(kind, name, tmp_path / "first") for kind, name in BOTH.items()]
    finish(*orders)
    asked = len(hub.asked)
    finish(*(fetch(kind, name, tmp_path / "second") for kind, name in BOTH.items()))
    assert not [path for command, path, *_ in hub.asked[asked:] if command == "GET" and "/resolve" in path]
    for kind in BOTH:
        assert read_origin(kind, tmp_path / "first") == read_origin(kind, tmp_path / "second")
    weights = [tmp_path / f"{name}/base-model/model.safetensors" for name in ("first", "second")]
    assert all(file.is_symlink() for file in weights) and weights[0].samefile(weights[1])


def test_without_a_hub_a_cache_does_that_has_what_is_asked_for(hub, tmp_path):
    """Offline, and where the hub is not reached; with a card and without; each revision, and never another's rows."""
    card = {"README.md": b"---\nlicense: mit\n---\n"}
    hub.add("org/offline", read_files(hub.older), read_files(hub.newer) | card)
    more = {".gitattributes": b"*.parquet lfs", "notes.pdf": b"x"}  # which is not fetched
    hub.add("org/offline", {"a.jsonl": ROW} | more, {"a.jsonl": ROW * 2} | card | more, kind="datasets")
    everything = [("dataset", "v1"), ("model", "v1"), ("model", "main"), ("dataset", "main")]

    def order_all(place: str, **faults):
        folders = [tmp_path / f"{place}-{revision}" for _, revision in everything]
        options = [(f"--{kind}_revision", revision) for kind, revision in everything]
        each = zip(everything, folders, options, strict=True)
        return [fetch(kind, "org/offline", folder, *option, **faults) for (kind, _), folder, option in each]

    finish(*order_all("online"))
    asked = len(hub.asked)
    finish(*order_all("offline", code=OFFLINE))
    assert len(hub.asked) == asked
    with hub.gone():
        finish(*order_all("gone", code=AT_ONCE)[2:])
    for kind, revision in everything:
        origin = read_origin(kind, tmp_path / f"online-{revision}")
        assert origin["license"] == ("mit" if revision == "main" else None)
        for place in ("offline", "gone")[: 1 + (revision == "main")]:
            assert read_origin(kind, tmp_path / f"{place}-{revision}") == origin
    commit = read_origin("dataset", tmp_path / "online-v1")["revision"]
    shutil.rmtree(hub.cache / f"hub/datasets--org--offline/snapshots/{commit}")
    (result,) = wait(fetch("dataset", "org/offline", tmp_path / "other", "--dataset_revision", "v1", code=OFFLINE))
    check_error(result, "'org/offline'", "type the same command online, without HF_HUB_OFFLINE=1", lines=2)


def test_without_a_hub_what_is_in_no_cache_is_named(hub, tmp_path):
    hub.add("org/unfetched", read_files(hub.older))
    for kind in BOTH:
        (result,) = wait(fetch(kind, "org/unfetched", tmp_path, code=OFFLINE))
        check_error(result, "'org/unfetched'", "no matching entry was found in the local cache", lines=2)
        assert result.stderr.endswith("type the same command online, without HF_HUB_OFFLINE=1.\n")
    with hub.gone():
        (result,) = wait(fetch("model", "org/unfetched", tmp_path, code=AT_ONCE))
    address = hub.environment["HF_ENDPOINT"]
    check_error(result, f"of {address}: ", "See to the network, and type the same command again", lines=2)


def test_what_came_damaged_is_refused_and_fetched_again_by_the_same_command(hub, tmp_path):
    hub.add("org/damaged-model", read_files(hub.older))
    for name in ("org/damaged-rows", "org/unreadable-rows"):
        hub.add(name, {"train.jsonl": ROW[:-1] + b" " * 9 + ROW[-1:]}, kind="datasets")
    names = {"org/damaged-model": "model", "org/damaged-rows": "dataset", "org/unreadable-rows": "dataset"}
    orders = [fetch(kind, name, tmp_path / name) for name, kind in names.items()]
    hub.damaged |= {"org/damaged-model": -1, "org/damaged-rows": ROW.index(b"b"), "org/unreadable-rows": 1}
    for result in wait(*orders):
        check_error(result, "came damaged: the hub states another sha256. It is removed: type the same command again")
    assert not [path for place in PLACES.values() for path in tmp_path.glob(f"org/*/{place}")]
    hub.damaged.clear()
    finish(*orders)
    model = tmp_path / "org/damaged-model/base-model/model.safetensors"
    assert model.read_bytes() == (hub.older / model.name).read_bytes()
    for name in ("damaged-rows", "unreadable-rows"):
        assert read_rows(tmp_path / f"org/{name}/dataset/train.jsonl") == [json.loads(ROW)]


def test_a_hub_that_has_too_much_to_do_is_waited_for_as_it_says_and_not_for_ever(hub, tmp_path):
    card = {"README.md": b""}
    hub.add("org/busy", read_files(hub.older) | card)
    limit = {"RateLimit": '"resolvers";r=0;t=7', "RateLimit-Policy": '"fixed window";"resolvers";q=500;w=300'}
    # The library asks once without and then with patience.
    hub.busy += [("/org/busy/resolve", {"Retry-After": "3"})] * 2 + [("/api/models/org/busy/tree", limit)]
    order = fetch("model", "org/busy", tmp_path, code="import time; time.sleep = lambda s: print('slept', s)")
    (result,) = finish(order)
    assert [line for line in result.stdout.splitlines() if line.startswith("slept")] == ["slept 4.0", "slept 8.0"]
    assert "Rate limited. Waiting 4.0s" in result.stderr and "Rate limited. Waiting 8.0s" in result.stderr
    hub.busy += [("/", {"Retry-After": "1"})] * 99
    results = wait(*(fetch(kind, f"org/busy-{kind}", tmp_path, code=AT_ONCE) for kind in BOTH))
    hub.busy.clear()
    for result in results:
        check_error(result, "429 Too Many Requests", "Wait some minutes, and type the same command again", lines=2)


def test_a_name_a_revision_or_a_token_that_a_hub_does_not_take_is_answered_by_what_helps(hub, tmp_path):
    token = f"{TOKEN}refused"
    hub.refused.add(f"Bearer {token}")
    hub.add("org/script", {"script.py": b"", "README.md": b""}, kind="datasets")
    configs = [f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in ("main", "socratic")]
    card = f"---\nconfigs:\n{''.join(configs)}---\n".encode()
    hub.add("org/configs", {"README.md": card, "main.jsonl": ROW, "socratic.jsonl": ROW}, kind="datasets")
    cases = []
    for kind, name in BOTH.items():
        revision = f"--{kind}_revision"
        said = [f"{name!r} has no 'v9', but main, v1.", f"Give one: {revision}"]
        cases.append((1, said, fetch(kind, name, tmp_path / "revision", revision, "v9")))
        said = ["Check the name and the revision; if it is private, put HF_TOKEN=<token> into .env."]
        cases.append((2, said, fetch(kind, "org/absent", tmp_path / "absent")))
        said = [
            "HF_TOKEN of .env, or else the token of hf auth login, is not accepted",
            "https://huggingface.co/settings",
        ]
        code = f"import os; os.environ['HF_TOKEN'] = '{token}'"
        cases.append((2, said, fetch(kind, f"{name}-unseen", tmp_path / "token", code=code)))
    said = ['make download ARGS="--dataset_revision refs/convert/parquet"', "no file of rows, but .md, .py"]
    cases.append((1, said, fetch("dataset", "org/script", tmp_path / "script")))
    said = ["has the configs main, socratic. Name one: --dataset_config (make: DATASET_CONFIG=)"]
    cases.append((1, said, fetch("dataset", "org/configs", tmp_path / "configs")))
    for (lines, said, _), result in zip(cases, wait(*(begin for *_, begin in cases)), strict=True):
        check_error(result, *said, lines=lines)
        assert TOKEN not in result.stdout + result.stderr


def test_a_mirror_and_a_cache_may_stand_in_env(hub, tmp_path, monkeypatch):
    monkeypatch.delenv("HF_ENDPOINT")
    monkeypatch.delenv("HF_HOME")
    (tmp_path / ".env").write_text(f"HF_ENDPOINT={hub.environment['HF_ENDPOINT']}\nHF_HOME={tmp_path}/cache\n")
    result = run(RUNNER, "dataset", "--", READER, "--dataset_name", "org/rows", cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0, result.stderr
    assert [*(tmp_path / "cache").glob("hub/datasets--org--rows/snapshots/*/data/*.jsonl")]
