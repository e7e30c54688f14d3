"""Each script stands alone: pins, imports, help, length; and the runner needs Python alone."""

import ast
import difflib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load, run

if sys.version_info >= (3, 11):
    import tomllib

SCRIPTS = sorted((ROOT / "scripts").glob("0*.py"))
CHAIN = sorted((ROOT / "scripts/chain").glob("*.py"))
# What comes after a training: serving, export, benchmarks.
USE = {"probe", "serve", "require_key", "check_serve", "export_gguf", "modelfile", "check_export", "benchmark"}
SCRIPT_IDS = [script.name for script in SCRIPTS]
OURS = {file.stem for file in (ROOT / "scripts").rglob("*.py")}
# The package that an import needs, where its name is another.
PACKAGES = {"dotenv": "python-dotenv", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
MOST_LINES = {"00_check_gpu.py": 550, "06_pipeline_infer.py": 105}


def list_imports(file) -> set[str]:
    """Names of the modules that a file imports, also in its functions; without what is in them."""
    imported = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} imports from its own folder"
            imported.add(node.module.split(".")[0])
    return imported


def count_lines(file) -> int:
    return len(file.read_text(encoding="utf-8").splitlines())


def pins() -> set[str]:
    lines = []
    for file in ("requirements.txt", "requirements-torch.txt"):
        lines += (ROOT / "env" / file).read_text().splitlines()
    return {line.replace('"', "'") for line in lines if "==" in line}


def test_there_are_seven_scripts():
    assert [name[:3] for name in SCRIPT_IDS] == [f"0{number}_" for number in range(7)]
    assert not [file.name for file in (ROOT / "scripts").glob("*.py") if file not in SCRIPTS]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11 and newer")
@pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPT_IDS)
def test_header_has_the_pins_of_env_for_all_that_is_imported(script):
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", script.read_text(encoding="utf-8"))
    assert block, f"{script.name} has no PEP 723 header"
    stated = tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))
    assert stated["requires-python"] == ">=3.10"
    assert set(stated["dependencies"]) <= pins()
    named = {re.match(r"[\w-]+", dependency)[0] for dependency in stated["dependencies"]}
    if "torch" in named:  # uv takes the CPU build, and not PyPI's for CUDA
        index = {"name": "pytorch", "url": "https://download.pytorch.org/whl/cpu", "explicit": True}
        assert stated["tool"]["uv"] == {"index": [index], "sources": {"torch": {"index": "pytorch"}}}
    tree = ast.parse(script.read_text(encoding="utf-8"))
    # What is imported in a function may be missing: a probe of 00_check_gpu.py, readline.
    at_the_top = {alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names}
    at_the_top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    foreign = {name.split(".")[0] for name in at_the_top} - set(sys.stdlib_module_names)
    assert {PACKAGES.get(name, name) for name in foreign} <= named
    if script.name.startswith("00"):
        assert not foreign


def test_every_direct_dependency_is_pinned_exactly():
    for file in (ROOT / "env").glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.match(r"[\w-]+==[\d.]+(; python_version .*)?$", line), f"{file.name}: {line}"


@pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPT_IDS)
def test_a_script_imports_nothing_of_ours_and_nothing_that_only_unix_has(script):
    source = script.read_text(encoding="utf-8")
    assert not list_imports(script) & (OURS | {"fcntl", "resource", "select", "pwd", "grp", "termios"})
    assert not re.search(r"spec_from_file_location|run_path|sys\.path\b", source)
    guarded = set()
    for node in ast.walk(ast.parse(source)):
        suppresses = isinstance(node, ast.With) and "ImportError" in ast.unparse(node.items[0])
        if suppresses or (isinstance(node, ast.Try) and "ImportError" in ast.unparse(node.handlers)):
            guarded |= {child for child in ast.walk(node) if isinstance(child, ast.Import)}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import) and "readline" in ast.unparse(node):
            assert ast.unparse(node) in {ast.unparse(each) for each in guarded}


def test_the_runner_is_two_files_that_need_python_alone():
    found, left = set(), {"run_step"}
    while left:
        name = left.pop()
        found.add(name)
        imported = list_imports(ROOT / f"scripts/chain/{name}.py")
        assert imported - OURS <= set(sys.stdlib_module_names)
        left |= imported & OURS - found
    assert len(found) <= 2, found


@pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPT_IDS)
def test_a_script_is_read_on_a_few_screens(script):
    assert count_lines(script) <= MOST_LINES.get(script.name, 200)


@pytest.mark.parametrize("file", CHAIN, ids=[file.name for file in CHAIN])
def test_so_is_a_file_of_the_chain(file):
    assert count_lines(file) <= 350


def test_the_tutorial_and_what_stands_around_it_are_short():
    assert sum(map(count_lines, SCRIPTS)) <= 1605
    use = [file for file in CHAIN if file.stem in USE]
    assert len(use) == len(USE) and sum(map(count_lines, use)) <= 1485
    assert sum(map(count_lines, set(CHAIN) - set(use))) <= 4120


@pytest.mark.parametrize("file", [*SCRIPTS, *CHAIN], ids=lambda file: file.name)
def test_lines_fit_a_screen(file):
    assert [line for line in file.read_text(encoding="utf-8").splitlines() if len(line) > 120] == []


def test_training_with_and_without_lora_differ_in_what_lora_is():
    lora, full = (
        (ROOT / "scripts" / name).read_text(encoding="utf-8").splitlines()
        for name in ("02_train_lora.py", "03_train_full.py")
    )
    changes = [line for line in difflib.ndiff(lora, full) if line[0] in "+-"]
    assert 0 < len(changes) <= 50, "what is not about LoRA stands in both, word for word"
    if diff := shutil.which("diff"):
        names = ("02_train_lora.py", "03_train_full.py")
        shown = subprocess.run([diff, *names], cwd=ROOT / "scripts", capture_output=True, text=True).stdout
        assert len(shown.splitlines()) <= 60, "the diff fits a screen"


@pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPT_IDS)
def test_a_script_copied_into_an_empty_folder_says_what_to_type(script, tmp_path):
    shutil.copy(script, tmp_path)
    result = run(tmp_path / script.name, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"usage: {script.name} " in result.stdout
    assert f"python {script.name}" in script.read_text(encoding="utf-8").split('"""')[1]  # a command to copy
    assert [file.name for file in tmp_path.iterdir()] == [script.name]
    # The tutorial's values are what the options are without being given.
    options = [" ".join(option.split()) for option in re.split(r"\n  (?=-)", result.stdout)]
    for name, value in getattr(load(script.name), "PARAMETERS", {}).items():
        (option,) = [option for option in options if re.match(rf"--{name}\b", option)]
        assert f"(default: {value})" in option


def run_with(given: dict, name: str, folder) -> str:
    """What a script finds in an environment variable when the runner has started it, with these given."""
    (folder / "script.py").write_text(f"import os\nprint(os.environ.get({name!r}))\n")
    chosen = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_RANK", name)
    environment = {name: value for name, value in os.environ.items() if name not in chosen} | given
    # -S: without the installed packages
    command = [sys.executable, "-S", ROOT / "scripts/chain/run_step.py", "--", folder / "script.py"]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.stderr == ""
    return result.stdout.strip()


@pytest.mark.parametrize(
    ("given", "seen"), [({}, "0"), ({"HIP_VISIBLE_DEVICES": "2"}, "None"), ({"LOCAL_RANK": "0"}, "None")]
)
def test_one_accelerator_is_made_visible_unless_the_user_or_a_launcher_chose(given, seen, tmp_path):
    assert run_with(given, "CUDA_VISIBLE_DEVICES", tmp_path) == seen


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1"),
        ("PYTORCH_ALLOC_CONF", "expandable_segments:True" if Path("/dev/nvidiactl").exists() else "None"),
    ],
)
def test_settings_of_an_accelerator_are_given_unless_the_user_has_others(name, value, tmp_path):
    assert [run_with(given, name, tmp_path) for given in ({}, {name: "0"})] == [value, "0"]
