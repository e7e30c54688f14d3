"""What two scripts share stands in both, word for word."""

import ast
import difflib
from collections import defaultdict

from conftest import ROOT, SCRIPTS


def test_functions_of_one_name_are_equal():
    versions = defaultdict(lambda: defaultdict(list))
    for script in SCRIPTS:
        source = script.read_text(encoding="utf-8")
        for node in ast.parse(source).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name not in ("main", "ScriptArguments"):
                versions[node.name][ast.get_source_segment(source, node)].append(script.name)
    assert sum(len(scripts) > 1 for texts in versions.values() for scripts in texts.values()) >= 5
    differing = {name: list(texts.values()) for name, texts in versions.items() if len(texts) > 1}
    assert not differing


def test_training_with_and_without_lora_differ_in_what_lora_is():
    lora, full = (
        (ROOT / "scripts" / name).read_text().splitlines() for name in ("02_train_lora.py", "03_train_full.py")
    )
    pairs = difflib.SequenceMatcher(None, lora, full, autojunk=False).get_opcodes()
    differing = sum(
        max(end - start, other_end - other) for kind, start, end, other, other_end in pairs if kind != "equal"
    )
    # Quantized weights are about LoRA too: only an adapter is trained on them.
    assert differing <= 80, "what is not about LoRA stands in both, word for word"
