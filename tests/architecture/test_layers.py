"""What the folders may know of each other."""

import ast
import re
import subprocess
import sys
from pathlib import Path

from tests.architecture.source import PACKAGE, ROOT, listing, modules, place, tree
from triptych.objectives import OBJECTIVES

FAMILIES = re.compile(
    r"llava|qwen|gemma|internvl|smolvlm|smollm|idefics|siglip|pixtral|mistral|llama|paligemma|florence", re.IGNORECASE
)


def test_imports_go_one_way():
    command = [str(Path(sys.executable).with_name("lint-imports"))]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_core_has_five_modules():
    names = {path.name for path in modules("core")} - {"__init__.py"}
    assert names == {"types.py", "protocols.py", "config.py", "distributed.py", "errors.py"}


def test_model_families_are_told_apart_in_one_place():
    """A comparison with `model_type` anywhere else is a branch that the next family will miss."""
    allowed = {PACKAGE / "models" / "components.py", PACKAGE / "data" / "templates.py"}
    found = [
        place(path, node)
        for path in modules()
        if path not in allowed
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Compare | ast.Match) and "model_type" in _attributes(node)
    ]
    assert not found, listing(found)


def test_engine_names_no_objective_and_no_model_family():
    found = []
    classes = {target.__name__ for target in OBJECTIVES.values()}
    # "language" is also a component of the model, so kinds count only as whole strings.
    for path in modules("engine"):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if FAMILIES.search(line) or any(name in line for name in classes):
                found.append(f"{place(path)}:{number}: {line.strip()}")
        found += [
            f"{place(path, node)}: {node.value!r}"
            for node in ast.walk(tree(path))
            if isinstance(node, ast.Constant) and node.value in OBJECTIVES
        ]
    assert not found, listing(found)


def test_objectives_never_import_a_model_library():
    found = [
        place(path, node)
        for path in modules("objectives")
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Import | ast.ImportFrom)
        and {name.split(".")[0] for name in _imported(node)} & {"transformers", "peft", "accelerate", "datasets"}
    ]
    assert not found, listing(found)


def _attributes(node: ast.AST) -> set[str]:
    return {inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)}


def _imported(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
