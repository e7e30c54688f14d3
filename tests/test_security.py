"""No token is shown or kept, nothing of a model, a checkpoint or a variable is executed: the threat model in docs/."""

import json
import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
import torch
from conftest import SCRIPTS, Process, load, run
from safetensors.torch import load_file
from test_download import COMMIT, hub  # noqa: F401
from test_makefile import STAND_IN, Project
from test_resume import command, train_until

TOKEN = "hf_PLANTED" + "x7" * 12
# As they get into an environment by mistake; the part before the mark is looked for too.
MALFORMED = [f"{TOKEN}\r", f" {TOKEN} ", f"{TOKEN}é", f"{TOKEN}\x0bEND", f"{TOKEN}\tEND", "hf_é" + TOKEN]


class Executed:
    """Pickles to code that makes a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return (os.mkdir, (str(self.file),))


class Search:
    """Looks for the planted token in what is printed, in files, and in the arguments of all processes."""

    def __init__(self):
        self.places, self.found, self.commands = 0, [], set()

    def look(self, place, content: bytes) -> None:
        self.places += 1
        if TOKEN.encode() in content or TOKEN.encode("utf-16-le") in content:
            self.found.append(str(place))

    def result(self, result: subprocess.CompletedProcess) -> subprocess.CompletedProcess:
        name = Path(result.args[0]).name
        self.look(f"{name} stdout", result.stdout.encode())
        self.look(f"{name} stderr", result.stderr.encode())
        return result

    def folder(self, folder: Path) -> None:
        for file in folder.rglob("*"):
            if file.is_file() and file.name != ".env":
                self.look(file.name, os.fsencode(file) + file.read_bytes())

    def watch(self, stop: threading.Event) -> None:
        while not stop.is_set():
            for file in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    arguments = file.read_bytes()
                except OSError:  # it has ended
                    continue
                if arguments not in self.commands:
                    self.commands.add(arguments)
                    self.look(arguments, arguments)
            time.sleep(0.02)

    def end(self, capsys) -> None:
        with capsys.disabled():
            print(f"\n{self.places} places searched for the token, found in {len(self.found)}", end=" ")
        assert not self.found


@pytest.fixture
def online(hub, tmp_path, monkeypatch):  # noqa: F811
    """Starts processes for the scripts that have the hub of test_download.py and, where one is given, a token."""

    def start(token: str | None = None) -> str:
        monkeypatch.setattr(Process, "zygote", None)
        settings = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache")}
        for key, value in settings.items() | ({"HF_TOKEN": token} if token else {}).items():
            monkeypatch.setenv(key, value)
        return hub[0]

    yield start
    if Process.zygote:
        Process.zygote.stdin.close()
        Process.zygote.wait()


def test_a_token_in_the_environment_is_nowhere_in_what_the_steps_print_and_write(
    online, question_rows, tmp_path, capsys
):
    online(TOKEN)
    search, stop = Search(), threading.Event()
    watcher = threading.Thread(target=search.watch, args=[stop])
    watcher.start()
    short = ["--max_steps", "2", "--save_steps", "1", "--logging_steps", "1", "--optim", "adamw_torch"]
    fetched = ["--model_name_or_path", "base-model", "--dataset_name", "dataset"]
    steps = [
        ["01_download.py", "--model_name_or_path", "org/tiny", "--dataset_name", question_rows, "--output_dir", "."],
        ["audit_tokens.py", *fetched, "--output", "dataset/audit.json"],
        ["02_train_lora.py", *fetched, *short, "--output_dir", "lora", "--dataset_test_split", "validation"],
        ["03_train_full.py", *fetched, *short, "--output_dir", "full"],
        ["00_check_gpu.py", "--model", "org/tiny", "--output", "memory.json"],
        ["00_check_gpu.py", "--access", "org/gated", "--output", "check.json"],
        ["choose_fast.py", "--method", "lora", "--output", "fast.yaml"],
        ["compare_runs.py", "lora/run.json", "full/run.json", "--output_dir", "report"],
        ["plot_loss.py", "lora/run.json", "--output", "loss.png"],
        ["04_merge_adapter.py", "--model_name_or_path", "lora/adapter", "--output_dir", "merged"],
        ["05_generate.py", "--model_name_or_path", "lora/adapter", "--prompt", "a", "--output", "answers.jsonl"],
        ["06_pipeline_infer.py", "--model_name_or_path", "full/model", "--prompt", "a", "--output", "piped.jsonl"],
        ["evaluate.py", "--base_model", "base-model", "--models", "lora/adapter", "--dataset_name", "dataset"],
        ["write_card.py", "lora/run.json"],
        ["verify_run.py", "lora/run.json", "--record", "curve.json"],
        ["reproduce_run.py", "lora/run.json", "--output_dir", "again"],
        ["push_model.py", "--folder", "lora/adapter", "--repo_id", "org/gated"],
    ]  # fmt: skip
    refused = []
    for script, *args in steps:
        if search.result(run(script, *args, cwd=tmp_path)).returncode:
            refused.append(script)
    stop.set()
    watcher.join()
    assert refused == ["00_check_gpu.py", "push_model.py"]  # those that were to be
    assert {script for script, *_ in steps} == {script.name for script in SCRIPTS}
    written = {file.name for file in tmp_path.rglob("*")}
    assert {
        "training_args.bin",
        "optimizer.pt",
        "README.md",
        "run.json",
        "SHA256SUMS",
        "adapter_config.json",
    } <= written
    assert any(name.startswith("events.out.tfevents") for name in written)
    search.folder(tmp_path)
    search.end(capsys)


def test_no_error_shows_a_token_of_env_file_or_options_however_malformed(online, tmp_path, monkeypatch, capsys):
    address = online()
    search = Search()
    for number, token in enumerate([TOKEN, *(MALFORMED if os.environ.get("FAULTS") == "full" else MALFORMED[3:4])]):
        folder = tmp_path / f"project-{number}"
        folder.mkdir()
        (folder / ".env").write_text(f'HF_TOKEN="{token}"\n', encoding="utf-8", newline="")
        (folder / "config.json").write_text("{}")
        calls = [
            ["01_download.py", "--only", "model", "--model_name_or_path", "org/gated"],
            ["push_model.py", "--folder", ".", "--repo_id", "org/gated"],
        ]
        if token.endswith("END"):  # a header that is refused, and quoted, by what would send it
            calls += [["00_check_gpu.py", "--model", "org/gated", "--output", "check.json"]]
            calls += [["01_download.py", "--only", "dataset", "--dataset_name", "org/absent"]]
        if token == f"{TOKEN}\x0bEND":
            asks = ["--model_name_or_path", "org/gated"]
            calls += [[script, *asks] for script in ("05_generate.py", "06_pipeline_infer.py")]
            calls[-2] += ["--prompt", "a"]
            calls += [[script, *asks, "--dataset_name", "org/rows"] for script in TRAINING]
        for script, *args in calls:
            result = search.result(run(script, *args, cwd=folder))
            assert result.returncode and "Traceback" not in result.stderr, (script, token, result.stderr)
        search.folder(folder)
    for script in SCRIPTS:
        result = search.result(run(script, "--hub_token", TOKEN, cwd=tmp_path))
        assert result.returncode and "Traceback" not in result.stderr, result.stderr
    assert address
    search.folder(tmp_path)
    search.end(capsys)


TRAINING = ("audit_tokens.py", "02_train_lora.py", "03_train_full.py")


@pytest.mark.parametrize("place", ["environment", ".env", "command line"])
def test_make_gives_no_token_to_the_arguments_of_a_process(place, tmp_path, capsys):
    project = Project(tmp_path)
    search, environment, arguments = Search(), {}, []
    if place == "environment":
        environment["HF_TOKEN"] = TOKEN
    elif place == ".env":
        (tmp_path / ".env").write_text(f"HF_TOKEN={TOKEN}\n")
    else:
        arguments.append(f"HF_TOKEN={TOKEN}")
    python = tmp_path / ".venv/bin/python"
    python.write_text(STAND_IN + '[ "${HF_TOKEN:-}" ] && touch passed\n:\n')
    for target in ("tutorial", "evaluate", "push", "help"):
        result = search.result(project.make(target, "REPO=user/name", *arguments, **environment))
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "passed").exists() is (place != ".env")  # from there the scripts take it themselves
    search.folder(tmp_path)
    search.end(capsys)


def test_make_refuses_a_token_in_args(tmp_path):
    project = Project(tmp_path)
    result = project.make("train-lora", f"ARGS=--hub_token {TOKEN}")
    assert result.returncode == 2 and "put HF_TOKEN=<token> into .env" in result.stderr
    assert TOKEN not in result.stdout + result.stderr and not (tmp_path / "outputs").exists()


# Models ---------------------------------------------------------------------------------------------------------------
CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM
os.mkdir({file!r})
class Config(LlamaConfig):
    model_type = "unknown"
class Model(LlamaForCausalLM):
    config_class = Config
"""


def loads(model: Path, rows: Path, adapter: Path | None = None) -> list[list]:
    """A command for each script that loads a model, or of those that load an adapter."""
    name = ["--model_name_or_path", adapter or model]
    base = ["--base_model", model] if adapter else []
    commands = [
        ["05_generate.py", *name, *base, "--prompt", "a", "--max_new_tokens", "1"],
        ["06_pipeline_infer.py", *name, *base, "--prompt", "a", "--max_new_tokens", "1"],
        [
            "evaluate.py",
            "--base_model",
            model,
            "--models",
            adapter or model,
            "--dataset_name",
            rows,
            "--output_dir",
            "e",
        ],
    ]
    if adapter:
        return [*commands, ["04_merge_adapter.py", *name, *base, "--output_dir", "merged"]]
    trains = ["--dataset_name", rows, "--max_steps", "1", "--output_dir", "out", "--optim", "adamw_torch"]
    return commands + [[script, *name, *trains] for script in TRAINING]


@pytest.mark.parametrize("kind", ["unknown", "llama"])
def test_code_in_a_model_folder_runs_only_when_asked_by_name(kind, tiny_model, question_rows, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(CODE.format(file=str(tmp_path / "executed")))
    for script, *args in loads(model, question_rows):
        result = run(script, *args, cwd=tmp_path)
        assert not (tmp_path / "executed").exists(), script
        if kind == "llama" or script == "audit_tokens.py":  # which takes the tokenizer alone
            assert result.returncode == 0, result.stderr
        else:
            assert result.returncode == 1 and "custom code" in result.stderr, result.stderr
    trains = loads(model, question_rows)[-2:] if kind == "unknown" else []
    for number, (script, *args) in enumerate(trains):
        run(
            script,
            *args,
            "--trust_remote_code",
            "true",
            cwd=tmp_path,
            HF_MODULES_CACHE=str(tmp_path / f"code-{number}"),
        )
        (tmp_path / "executed").rmdir()  # it was there


@pytest.mark.parametrize("part", ["model", "adapter"])
def test_pickled_weights_are_refused(part, tiny_model, question_rows, tmp_path):
    model, adapter = tmp_path / "model", tmp_path / "adapter"
    shutil.copytree(tiny_model, model)
    if part == "model":
        weights = model / "model.safetensors"
        torch.save(load_file(weights), model / "pytorch_model.bin")  # would load as it is
        weights.unlink()
    else:
        adapter.mkdir()
        config = {
            "base_model_name_or_path": str(model),
            "revision": None,
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
        }
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
    for script, *args in loads(model, question_rows, adapter if part == "adapter" else None):
        if script != "audit_tokens.py":  # it takes the tokenizer alone
            result = run(script, *args, cwd=tmp_path)
            assert result.returncode == 1 and "safetensors" in result.stderr, (script, result.stderr)
            assert "Traceback" not in result.stderr
    assert not (tmp_path / "executed").exists()


# Checkpoints ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def interrupted(tiny_model, question_rows, tmp_path, monkeypatch):
    """A checkpoint of an interrupted training, and the arguments to go on with."""
    args = command(tiny_model, question_rows, tmp_path / "lora")
    assert train_until(3, "lora", args, monkeypatch) == 128 + signal.SIGTERM
    return tmp_path / "lora/checkpoints/checkpoint-3", args


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_executed_though_its_checksum_is_right(name, interrupted, tmp_path):
    checkpoint, args = interrupted
    torch.save(Executed(tmp_path / "executed"), checkpoint / name)
    (checkpoint / "SHA256SUMS").unlink()
    load("02_train_lora.py").seal(checkpoint)
    result = run("02_train_lora.py", *args, cwd=tmp_path)
    assert f"Going on from {checkpoint}" in result.stdout
    assert not (tmp_path / "executed").exists()
    assert (result.returncode == 0) is (name == "training_args.bin")  # which nothing reads
    if name != "training_args.bin":
        assert "Traceback" not in result.stderr and "nothing of it was executed" in result.stderr
        torch.load(checkpoint / name, weights_only=False)
        assert (tmp_path / "executed").exists()  # it would have been


@pytest.mark.parametrize("name", ["pytorch_model.bin", "adapter_model.bin", "other/adapter_model.bin", "scaler.pt"])
def test_a_checkpoint_with_a_file_that_was_not_written_with_it_is_left_out(name, interrupted, tmp_path):
    checkpoint, args = interrupted
    (checkpoint / name).parent.mkdir(exist_ok=True)
    torch.save(Executed(tmp_path / "executed"), checkpoint / name)
    result = run("02_train_lora.py", *args, cwd=tmp_path)
    assert result.returncode == 1 and "no checkpoint is whole" in result.stderr
    assert f"{checkpoint / name.split('/')[0]} is not among the files that were written" in result.stdout
    assert checkpoint.exists() and not (tmp_path / "executed").exists()


# Revisions ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "name"), [("model", "org/tiny"), ("dataset", "org/rows")])
def test_a_pinned_commit_is_what_is_asked_for(kind, name, hub, tmp_path):  # noqa: F811
    option = "--model_name_or_path" if kind == "model" else "--dataset_name"
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache")}
    pin = "abad1dea" * 5
    args = ["--only", kind, option, name, f"--{kind}_revision", pin, "--output_dir", "out"]
    result = run("01_download.py", *args, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert any(f"/revision/{pin}" in path for path in hub[1]) and not any("/main" in path for path in hub[1])
    assert {path.split("/resolve/")[1].split("/")[0] for path in hub[1] if "/resolve/" in path} == {
        "c0ffee" * 6 + "beef"
    }


def test_make_passes_a_pin_on(tmp_path):
    project = Project(tmp_path)
    pins = "--model_revision abad1dea --dataset_revision c0ffee"
    project.make("download", "BASE_MODEL=org/tiny", "DATASET=org/rows", f"ARGS={pins}")
    assert [line for line in project.commands() if line.endswith(pins)] == project.commands()[1:]


# Make -----------------------------------------------------------------------------------------------------------------
HOSTILE = {
    "substitution": "$(touch executed)",
    "backticks": "`touch executed`",
    "list": "a; touch executed",
    "pipe": "a | touch executed &",
    "quotes": "'; touch executed; '\"; touch executed; \"",
    "lines": "a\ntouch executed\n",
    "dashes": "--output=executed",
    "make": "$(shell touch executed)${shell touch executed}",
}
TARGETS = {
    "PROMPT": ["infer", "pipeline"],
    "BASE_MODEL": ["train-lora", "check-gpu", "help"],
    "DATASET": ["train-lora", "help"],
    "VALIDATION_ROWS": ["train-lora", "help"],
    "REPO": ["push", "help"],
    "TORCH_INDEX": ["help"],
    "RUN": ["reproduce"],
}
REFUSED = {
    "RECIPE": "train-lora",
    "FROM": "infer",
    "OUT": "help",
    "VENV": "help",
    "BACKEND": "setup",
    "PYTHON": "setup",
}


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("hostile"))
    assert project.make("train-lora").returncode == 0
    return project


@pytest.mark.parametrize("place", ["command line", "environment", ".env"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_variables_are_just_text(kind, place, trained_once):
    project, text = trained_once, HOSTILE[kind]
    if place == ".env" and "\n" in text:
        pytest.skip("a line of .env ends there")
    for name in [*TARGETS, *REFUSED]:
        for target in TARGETS.get(name, [REFUSED.get(name)]):
            for file in ("executed", "outputs/executed"):
                assert not (project.folder / file).exists()
            (project.folder / ".env").write_text(f"{name}={text}\n" if place == ".env" else "")
            repo = [] if name == "REPO" else ["REPO=user/name"]
            given = {"command line": ([f"{name}={text}"], {}), "environment": ([], {name: text})}.get(place, ([], {}))
            result = project.make(target, *repo, *given[0], **given[1])
            assert not list(project.folder.rglob("executed")), (name, target, result.stderr)
            if name in REFUSED and not (kind == "dashes" and name in ("OUT", "VENV")):
                assert result.returncode == 2, (name, result.stdout)
            elif target == "help":
                assert kind == "lines" or place == ".env" or text in result.stdout, (name, result.stdout)
            elif name in TARGETS and name != "RUN" and place != ".env":
                assert text in project.log.read_text(), (name, target)
