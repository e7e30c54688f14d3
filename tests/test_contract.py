"""Each script stands alone: pins, imports, help."""

import ast
import os
import re
import shutil
import sys

import pytest
from conftest import ROOT, SCRIPTS, load, run

if sys.version_info >= (3, 11):
    import tomllib

SCRIPT_IDS = [script.name for script in SCRIPTS]
# The package that an import needs, where its name is another.
PACKAGES = {"dotenv": "python-dotenv", "huggingface_hub": "huggingface-hub", "yaml": "pyyaml"}
# numpy comes with the packages that are pinned; 00_check_gpu.py probes what it imports.
FREE = {"numpy"}
CHOICE = 'os.environ["CUDA_VISIBLE_DEVICES"] = "0"'
DEVICE_SCRIPTS = [script.name for script in SCRIPTS if CHOICE in script.read_text(encoding="utf-8")]


def pins() -> set[str]:
    lines = []
    for file in ("requirements.txt", "requirements-torch.txt"):
        lines += (ROOT / "env" / file).read_text().splitlines()
    return {line.replace('"', "'") for line in lines if "==" in line}


def header(script) -> dict:
    text = script.read_text(encoding="utf-8")
    block = re.match(r"# /// script\n((?:#.*\n)+?)# ///\n", text)
    assert block, f"{script.name} has no PEP 723 header"
    return tomllib.loads(re.sub(r"(?m)^# ?", "", block[1]))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib is in Python 3.11 and newer")
@pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPT_IDS)
def test_header_has_the_pins_of_env_for_all_that_is_imported(script):
    stated = header(script)
    assert stated["requires-python"] == ">=3.10"
    assert set(stated["dependencies"]) <= pins()
    tree = ast.parse(script.read_text(encoding="utf-8"))
    imported = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.split(".")[0])
    foreign = {PACKAGES.get(name, name) for name in imported - set(sys.stdlib_module_names)} - FREE
    named = {re.match(r"[\w-]+", dependency)[0] for dependency in stated["dependencies"]}
    assert foreign <= named


def test_every_direct_dependency_is_pinned_exactly():
    for file in (ROOT / "env").glob("requirements*.txt"):
        for line in file.read_text().splitlines():
            if line and not line.startswith(("#", "-r ")):
                assert re.match(r"[\w-]+==[\d.]+(; python_version .*)?$", line), f"{file.name}: {line}"


@pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPT_IDS)
def test_runs_alone_and_says_what_to_type(script, tmp_path):
    shutil.copy(script, tmp_path)
    result = run(tmp_path / script.name, "--help", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert f"python {script.name} " in result.stdout


def test_all_options_have_their_help_too(tmp_path):
    for script in ("audit_tokens.py", "02_train_lora.py", "03_train_full.py"):
        said = run(script, "--help_all", cwd=tmp_path).stdout
        assert all(f"--{option}" in said for option in ("dataset_name", "learning_rate")), script
        short = run(script, "--help", cwd=tmp_path).stdout
        assert all(f"--{option}" in short for option in ("dataset_name", *load(script).PARAMETERS))


@pytest.mark.parametrize("script", SCRIPTS, ids=SCRIPT_IDS)
def test_help_and_wrong_options_are_answered_before_what_takes_seconds_is_imported(script, tmp_path):
    for option in ("--help", "--nonsense"):
        if option == "--nonsense" and "parse_arguments()" not in script.read_text():
            continue
        (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
        result = run(script, option, cwd=tmp_path, PYTHONPATH=str(tmp_path))
        assert "torch was imported" not in result.stderr, option
        assert (result.returncode == 0) is (option == "--help")


def test_the_audit_assumes_what_the_training_sets():
    for script in ("02_train_lora.py", "03_train_full.py"):
        assert load("audit_tokens.py").PARAMETERS.items() <= load(script).PARAMETERS.items()


def test_what_loads_a_model_chooses_one_accelerator():
    assert len(DEVICE_SCRIPTS) == 6  # two trainings, merge, generate, pipeline, evaluate


@pytest.mark.parametrize(
    ("given", "seen"), [({}, "0"), ({"HIP_VISIBLE_DEVICES": "2"}, None), ({"LOCAL_RANK": "0"}, None)]
)
@pytest.mark.parametrize("script", DEVICE_SCRIPTS)
def test_one_accelerator_is_made_visible_unless_the_user_or_a_launcher_chose(
    script, given, seen, tmp_path, monkeypatch
):
    for variable in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES", "LOCAL_RANK"):
        monkeypatch.delenv(variable, raising=False)
    for variable, value in given.items():
        monkeypatch.setenv(variable, value)
    monkeypatch.chdir(tmp_path)
    source = (ROOT / "scripts" / script).read_text(encoding="utf-8")
    exec(source[source.index("import argparse") : source.index("gc.disable()")], {"__name__": script})
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == seen
