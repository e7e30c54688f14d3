"""No token is shown or kept, nothing of a model, a checkpoint or a variable is executed: the threat model in docs/."""

import json
import os
import pickle
import shlex
import shutil
import signal
import subprocess
import threading
import time
from pathlib import Path

import folders
import pytest
import torch
from conftest import ROOT, Process, run
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from test_download import COMMIT, hub  # noqa: F401
from test_makefile import Project, act
from test_resume import RUNNER, interrupt, order
from transformers import AutoModelForCausalLM

FULL = os.environ.get("FAULTS") == "full"
SCRIPTS = {file.name: file for file in sorted((ROOT / "scripts").rglob("*.py"))}
MODULES = {"figures.py", "folders.py", "memory.py", "records.py"}  # these are imported, the others run
TRAINING = ("audit_tokens.py", "02_train_lora.py", "03_train_full.py")

TOKEN = "hf_PLANTED" + "x7" * 12
# As they get into an environment by mistake; the part before the mark is looked for too.
MALFORMED = [f"{TOKEN}\r", f" {TOKEN} ", f"{TOKEN}é", f"{TOKEN}\x0bEND", f"{TOKEN}\tEND", "hf_é" + TOKEN]


def call(command: str, cwd: Path, **faults) -> subprocess.CompletedProcess:
    """Runs a command, in which scripts have their names alone. Faults: see zygote.py."""
    script, *words = [SCRIPTS.get(word, word) for word in shlex.split(command)]
    return Process(script, words, cwd, **faults).wait()


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
            time.sleep(0.05)

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
    trains = "--model_name_or_path base-model --dataset_name dataset --optim adamw_torch"
    trains += " --max_steps 2 --save_steps 1 --logging_steps 1"
    reads = "--reads base-model dataset"
    asks = "--model_name_or_path lora/adapter --base_model base-model"
    steps = [
        "run_step.py base-model -- 01_download.py --only model --model_name_or_path org/tiny",
        f"run_step.py dataset -- 01_download.py --only dataset --dataset_name {question_rows}",
        f"run_step.py {reads} -- audit_tokens.py --output audit.json {trains}",
        "predict_memory.py --model org/tiny --output memory.json",
        f"run_step.py lora {reads} -- 02_train_lora.py {trains} --dataset_test_split validation",
        f"run_step.py full {reads} -- 03_train_full.py {trains}",
        "choose_fast.py --method lora --output fast.yaml",
        "compare_runs.py lora/run.json full/run.json --output_dir report",
        "plot_loss.py lora/run.json --output loss.png",
        f"run_step.py merged --reads base-model lora -- 04_merge_adapter.py {asks}",
        f"run_step.py --reads lora -- 05_generate.py {asks} --prompt a --output answers.jsonl",
        "run_step.py --reads full -- 06_pipeline_infer.py --model_name_or_path full/model --prompt a --output a.jsonl",
        "run_step.py -- evaluate.py --base_model base-model --models lora/adapter --dataset_name dataset",
        "write_card.py lora/run.json",
        "verify_run.py lora/run.json --record curve.json",
        "reproduce_run.py lora/run.json --output_dir again",
        "run_step.py --reads lora -- push_model.py --folder lora/adapter --repo_id org/gated",
    ]
    if FULL:  # it takes longest
        steps += ["00_check_gpu.py --access org/gated --output check.json"]
    results = {step: search.result(call(step, tmp_path)) for step in steps}
    stop.set()
    watcher.join()
    for step, result in results.items():
        assert (result.returncode != 0) == ("org/gated" in step), (step, result.stderr)
    assert not FULL or SCRIPTS.keys() - MODULES <= {word for step in steps for word in step.split()}
    written = {file.name for file in tmp_path.rglob("*")}
    expected = "training_args.bin optimizer.pt README.md run.json step.json SHA256SUMS .verified adapter_config.json"
    assert written >= {*expected.split()}
    assert any(name.startswith("events.out.tfevents") for name in written)
    search.folder(tmp_path)
    search.end(capsys)


def test_no_error_shows_a_token_of_env_file_or_options_however_malformed(online, tmp_path, monkeypatch, capsys):
    online()
    search = Search()
    for number, token in enumerate([TOKEN, *(MALFORMED if FULL else MALFORMED[3:4])]):
        folder = tmp_path / f"project-{number}"
        folder.mkdir()
        (folder / ".env").write_text(f'HF_TOKEN="{token}"\n', encoding="utf-8", newline="")
        (folder / "config.json").write_text("{}")
        model = "--model_name_or_path org/gated"
        calls = [
            f"run_step.py out -- 01_download.py --only model {model}",
            "run_step.py -- push_model.py --folder . --repo_id org/gated",
        ]
        if token.endswith("END"):  # a header that is refused, and quoted, by what would send it
            calls += ["predict_memory.py --model org/gated --output check.json"]
            calls += ["run_step.py out -- 01_download.py --only dataset --dataset_name org/absent"]
        if token == f"{TOKEN}\x0bEND":
            calls += [
                f"run_step.py -- 05_generate.py {model} --prompt a",
                f"run_step.py -- 06_pipeline_infer.py {model}",
            ]
            calls += [f"run_step.py out -- {script} {model} --dataset_name org/rows" for script in TRAINING]
        for command in calls:
            result = search.result(call(command, folder))
            assert result.returncode and "Traceback" not in result.stderr, (command, token, result.stderr)
        search.folder(folder)
    search.folder(tmp_path)
    search.end(capsys)


def test_a_token_among_the_options_is_refused_and_not_shown(tmp_path):
    commands = [
        f"run_step.py -- 05_generate.py --prompt {TOKEN}",
        f"run_step.py -- 02_train_lora.py --hub-token {TOKEN}",
    ]
    for script in sorted(SCRIPTS.keys() - MODULES - {"run_step.py"}):
        commands.append(f"run_step.py out -- {script} --hub_token={TOKEN}")
        if SCRIPTS[script].parent.name == "chain" or script == "00_check_gpu.py":  # Make calls some without the runner
            commands.append(f"{script} --hub_token {TOKEN}")
    for command in commands if FULL else commands[:9]:
        result = call(command, tmp_path)
        assert result.returncode == 1 and TOKEN not in result.stdout + result.stderr, (command, result.stderr)
        assert "Traceback" not in result.stderr
        assert "Put HF_TOKEN=<token> into .env" in result.stderr or "run_step.py" not in command
    assert not list(tmp_path.iterdir())


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
    act(project, '[ -z "${HF_TOKEN-}" ] || touch passed')
    for target in ("tutorial", "evaluate", "push", "help"):
        result = search.result(project.make(target, "REPO=user/name", *arguments, **environment))
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "passed").exists() is (place != ".env")  # from there the scripts take it themselves
    search.folder(tmp_path)
    search.end(capsys)


@pytest.mark.parametrize("option", ["--hub_token", "--hub-token"])
def test_make_refuses_a_token_in_args(option, tmp_path):
    project = Project(tmp_path)
    result = project.make("train-lora", f"ARGS={option} {TOKEN}")
    assert result.returncode == 2 and "put HF_TOKEN=<token> into .env" in result.stderr
    assert TOKEN not in result.stdout + result.stderr and not (tmp_path / "outputs").exists()


# Models ---------------------------------------------------------------------------------------------------------------
YES = "import builtins; builtins.input = lambda text: 'y'"  # what is answered where the library asks
CODE = """
import os
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
os.mkdir({file!r})
class Config(LlamaConfig):
    model_type = "unknown"
class Model(LlamaForCausalLM):
    config_class = Config
class Unknown(PreTrainedTokenizerFast):
    pass
"""


def save_adapter(model: Path, folder: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(model)
    get_peft_model(base, LoraConfig(task_type="CAUSAL_LM")).save_pretrained(folder)


def list_loads(model: Path, rows: Path, adapter: Path | None = None) -> list[str]:
    """A command for each script that loads a model, or of those that load an adapter."""
    name = f"--model_name_or_path {adapter} --base_model {model}" if adapter else f"--model_name_or_path {model}"
    commands = [
        f"run_step.py -- 05_generate.py {name} --prompt a --max_new_tokens 1",
        f"run_step.py -- 06_pipeline_infer.py {name} --prompt a --max_new_tokens 1",
        f"run_step.py -- evaluate.py --base_model {model} --models {adapter or model} --dataset_name {rows}",
    ]
    if adapter:
        return [*commands, f"run_step.py merged -- 04_merge_adapter.py {name} --max_new_tokens 1"]
    trains = f"{name} --dataset_name {rows} --max_steps 1 --optim adamw_torch"
    return [*commands, *(f"run_step.py {script[:-3]} -- {script} {trains}" for script in TRAINING)]


@pytest.mark.parametrize("kind", ["unknown", "llama", "adapter"])
def test_code_in_a_model_folder_runs_only_when_asked_by_name(kind, tiny_model, question_rows, tmp_path):
    model, adapter, executed = tmp_path / "model", None, tmp_path / "executed"
    shutil.copytree(tiny_model, model)
    if kind == "adapter":
        adapter = tmp_path / "lora/adapter"
        save_adapter(model, adapter)
        shutil.copy(tiny_model / "tokenizer.json", adapter)
        config, code = {"tokenizer_class": "Unknown", "auto_map": {"AutoTokenizer": ["code.Unknown", None]}}, adapter
        (adapter / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        config, code = json.loads((model / "config.json").read_text()), model
        config |= {"model_type": kind, "auto_map": {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}}
        (model / "config.json").write_text(json.dumps(config))
    (code / "code.py").write_text(CODE.format(file=str(executed)))
    commands = list_loads(model, question_rows, adapter)
    for command in commands:
        result = call(command, tmp_path, code=YES)
        assert not executed.exists(), command
        if kind == "llama":
            assert result.returncode == 0, result.stderr
        else:
            assert result.returncode == 1 and "custom code" in result.stderr, (command, result.stderr)
            assert "with --trust_remote_code true" in result.stderr
    for command in commands[-3:] if kind == "unknown" else []:
        call(f"{command} --trust_remote_code true", tmp_path)
        executed.rmdir()  # it was there


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
        config = {"base_model_name_or_path": str(model), "revision": None, "peft_type": "LORA"}
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"task_type": "CAUSAL_LM"}))
        (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Executed(tmp_path / "executed")))
    for command in list_loads(model, question_rows, adapter if part == "adapter" else None):
        if "audit_tokens.py" not in command:  # it takes the tokenizer alone
            result = call(command, tmp_path)
            assert result.returncode == 1 and "safetensors" in result.stderr, (command, result.stderr)
            assert "Traceback" not in result.stderr
    assert not (tmp_path / "executed").exists()


# Checkpoints ----------------------------------------------------------------------------------------------------------
@pytest.fixture
def interrupted(tiny_model, question_rows, tmp_path):
    """A checkpoint of an interrupted training, and the options of the runner to go on with."""
    args = order("lora", tiny_model, question_rows, tmp_path / "lora")
    assert interrupt(args, signal.SIGTERM, 3, tmp_path).returncode == 128 + signal.SIGTERM
    return tmp_path / "lora.part/checkpoints/checkpoint-3", args


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"])
def test_a_pickle_in_a_checkpoint_is_not_executed_though_its_checksum_is_right(name, interrupted, tmp_path):
    checkpoint, args = interrupted
    torch.save(Executed(tmp_path / "executed"), checkpoint / name)
    folders.seal(checkpoint)
    result = run(RUNNER, *args, cwd=tmp_path)
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
    result = run(RUNNER, *args, cwd=tmp_path)
    assert result.returncode == 1 and "no checkpoint is whole" in result.stderr
    assert f"{checkpoint / name} is not among the files that were written" in result.stdout
    assert checkpoint.exists() and not (tmp_path / "executed").exists()


# Revisions ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("kind", "name"), [("dataset", "org/rows"), ("model", "org/tiny")][: 1 + FULL])
def test_a_pinned_commit_is_what_is_asked_for(kind, name, hub, tmp_path):  # noqa: F811
    option = "--model_name_or_path" if kind == "model" else "--dataset_name"
    environment = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub[0], "HF_HOME": str(tmp_path / "cache")}
    pin = "abad1dea" * 5
    args = ["--only", kind, option, name, f"--{kind}_revision", pin]
    result = run(RUNNER, "out", "--", SCRIPTS["01_download.py"], *args, cwd=tmp_path, **environment)
    assert result.returncode == 0, result.stderr
    assert not any("/main" in path for path in hub[1])
    asked = [path.split("/resolve/")[1].split("/")[0] for path in hub[1] if "/resolve/" in path]
    assert asked[0] == pin and set(asked) == {pin, COMMIT}  # whatever it is asked for, that server has one


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


PLACES = ("command line", "environment", ".env")
TEXTS = [
    (kind, place) for kind in HOSTILE for place in PLACES if (kind, place) != ("lines", ".env")
]  # a line ends there


@pytest.mark.parametrize(("kind", "place"), TEXTS if FULL else TEXTS[::6])
def test_variables_are_just_text(kind, place, trained_once):
    project, text = trained_once, HOSTILE[kind]
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
