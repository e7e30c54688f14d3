"""What two scripts share stands in both, word for word."""

import ast
from collections import defaultdict

from conftest import SCRIPTS


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
