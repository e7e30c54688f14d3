"""What stands twice is short, and word for word the same."""

import ast
from collections import defaultdict
from pathlib import Path

from conftest import ROOT

FILES = sorted((ROOT / "scripts").rglob("*.py"))
MOST = 15  # lines, blank ones not counted
TWINS = {"02_train_lora.py", "03_train_full.py"}


def find_copies(files: list[Path]) -> list[str]:
    """Where more than MOST lines, one after another, stand in another place too, but for the twins."""
    seen, copies = defaultdict(list), []
    for file in files:
        text = file.read_text(encoding="utf-8").rpartition("# ///\n")[2]  # without the header
        lines = [line for line in text.splitlines() if line.strip()]
        for number in range(len(lines) - MOST):
            passage = tuple(lines[number : number + MOST + 1])
            copies += [
                f"{other.name} and {file.name}: {passage[0].strip()}"
                for other in seen[passage]
                if {other.name, file.name} != TWINS
            ]
            seen[passage].append(file)
    return copies


def test_no_long_passage_stands_twice():
    assert len(FILES) > 7
    assert find_copies(FILES) == []


def test_a_copy_would_be_seen_wherever_it_stands(tmp_path):
    passage = [f"line_{number}()" for number in range(MOST + 1)]
    one, two = tmp_path / "one.py", tmp_path / "two.py"
    one.write_text("\n".join(["first()", *passage, "last()"]))
    two.write_text("\n\n".join(["before()", *passage, "after()"]))
    assert find_copies([one, two]) == ["one.py and two.py: line_0()"]
    two.write_text("\n".join(["before()", *passage[1:], "after()"]))
    assert find_copies([one, two]) == []
    two.write_text("\n".join([*passage, "after()", *passage]))
    assert find_copies([two]) == ["two.py and two.py: line_0()"]
    twins = [one.rename(tmp_path / "02_train_lora.py"), two.rename(tmp_path / "03_train_full.py")]
    assert find_copies(twins) == ["03_train_full.py and 03_train_full.py: line_0()"]


def test_functions_of_one_name_are_equal_in_the_tutorials_scripts():
    versions = defaultdict(lambda: defaultdict(list))
    for script in (ROOT / "scripts").glob("0[2-6]*.py"):
        source = script.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            # load_model: one returns the tokenizer too, the other takes quantized weights
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in (
                "main",
                "Arguments",
                "load_model",
            ):
                versions[node.name][ast.get_source_segment(source, node)].append(script.name)
    shared = {name for name, texts in versions.items() for scripts in texts.values() if len(scripts) > 1}
    assert {"find_config", "find_origin", "load_rows", "Interruption", "TokenLossTrainer"} <= shared
    assert {name: list(texts.values()) for name, texts in versions.items() if len(texts) > 1} == {}
