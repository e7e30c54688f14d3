"""What the documents name is there: tests, lines of code, targets, files."""

import re

import pytest
from conftest import ROOT, load
from test_makefile import Project, change
from transformers import LlamaConfig

DOCUMENTS = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "README.md",
        *(f"docs/{name}.md" for name in ("tutorial", "rocm", "reliability", "performance", "architecture", "use")),
    )
}


def test_each_row_of_the_errata_names_a_test_or_a_command():
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", DOCUMENTS["docs/tutorial.md"], re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 24))
    for _, shown_by in rows:
        tests = re.findall(r"`(test_\w+\.py)::(test_\w+)`", shown_by)
        assert tests or re.fullmatch(r"`make [a-z-]+`", shown_by)
        for file, name in tests:
            assert f"def {name}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), name


def test_quoted_code_stands_in_a_script():
    code = "".join(script.read_text(encoding="utf-8") for script in (ROOT / "scripts").glob("*.py"))
    text = DOCUMENTS["docs/tutorial.md"].split("## Where the tutorial")[0]
    quoted = [line for line in re.findall(r"`([^`]+)`", text) if "(" in line]
    assert len(quoted) >= 8
    for line in quoted:
        assert " ".join(line.split()) in " ".join(code.split()), line


def test_the_table_of_what_fits_is_what_the_script_says():
    script, llama = load("chain/predict_memory.py"), LlamaConfig().to_dict()
    rows = re.findall(r"^\| (.+?) \| (\d) × (\d+) \| (.+) \|$", DOCUMENTS["docs/rocm.md"], re.M)
    assert len(rows) == 4 * len(script.METHODS)
    for label, batch, tokens, stated in rows:
        method, base = script.METHODS[label]
        settings = script.SETTINGS | base | {"per_device_train_batch_size": int(batch)}
        parts = script.predict_memory(llama, method, settings, int(tokens), "gpu")
        sizes = [f"{size / 2**30:.1f}" for name, size in parts.items() if name not in ("overhead", "allocated")]
        fit = [script.fits(parts["peak"], "gpu", memory * 2**30) for memory in (192, 80, 24)]
        assert stated.split(" | ") == sizes + ["yes" if it_does else "no" for it_does in fit]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_nothing_is_left_to_fill_in(name):
    assert not re.findall(r"^[A-Z]{5,}$|TODO|TUTTIME|TOLDERIVED", DOCUMENTS[name], re.M)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_targets_and_files_exist(name):
    rules = "".join((ROOT / file).read_text(encoding="utf-8") for file in ("Makefile", "env/use.mk"))
    targets = set(re.findall(r"^([a-z-]+):", rules, re.M))
    named = set(re.findall(r"(?:^    |`)make (?:-n )?([a-z-]+)", DOCUMENTS[name], re.M))
    assert named and named <= targets
    for file in re.findall(r"`(\d\d_\w+\.py)`|\]\((?!http)([^)#]+)\)", DOCUMENTS[name]):
        script, link = file
        assert (ROOT / "scripts" / script if script else (ROOT / name).parent / link).exists(), file


def test_the_step_of_the_architecture_page_works_as_it_says(tmp_path):
    project = Project(tmp_path)
    text = DOCUMENTS["docs/architecture.md"]
    (script,) = re.findall(r"```python\n(.*?)```", text, re.S)
    (rule,) = re.findall(r"```make\n(.*?)```", text, re.S)
    (tmp_path / "scripts/07_count_words.py").write_text(script)
    with (tmp_path / "Makefile").open("a") as file:
        file.write(rule)
    dataset = tmp_path / "outputs/dataset"
    dataset.mkdir(parents=True)
    (dataset / "run.json").write_text("{}")
    (dataset / "train.jsonl").write_text("three more words\n")
    python = tmp_path / ".venv/bin/python"
    real = 'case "$*" in *07_*) exec python3 "$@" ;; esac; script=$1 folder'
    python.write_text(python.read_text().replace("script=$1 folder", real))
    said = [project.make("outputs/words/run.json") for _ in range(2)]
    assert [result.returncode for result in said] == [0, 0], said[0].stderr
    assert "3 words" in said[0].stdout and "3 words" not in said[1].stdout
    names = {path.name for path in (tmp_path / "outputs/words").iterdir()}
    assert {"words.txt", "run.json", "SHA256SUMS"} <= names
    change(tmp_path / "scripts/07_count_words.py")
    assert "3 words" in project.make("outputs/words/run.json").stdout
