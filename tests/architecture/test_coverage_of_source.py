"""Every source file has its test file, and every entry of a visible table its test."""

import ast
import re

import pytest

from tests.architecture.source import PACKAGE, UNIT, listing, modules, place, tree

TABLES = {
    "OBJECTIVES": "objectives/__init__.py",
    "FORMATS": "data/formats/__init__.py",
    "TEMPLATES": "data/templates.py",
    "CONNECTORS": "models/connectors/__init__.py",
    "MONITORS": "engine/monitors/__init__.py",
}


def test_every_source_file_has_a_mirrored_test_file():
    """`src/triptych/a/b.py` is tested by `tests/unit/a/test_b.py`."""
    missing = []
    for path in modules():
        mirrored = UNIT / path.relative_to(PACKAGE).with_name(f"test_{path.name}")
        if path.name != "__init__.py" and not mirrored.is_file():
            missing.append(f"{place(path)} -> tests/unit/{mirrored.relative_to(UNIT)}")
    assert not missing, listing(missing)


def test_every_test_file_mirrors_a_source_file_or_a_folder():
    """`test_b.py` or `test_b_more.py` for `b.py`; tests of a folder's `__init__` start with the folder's name."""
    strays = []
    for path in sorted(UNIT.rglob("test_*.py")):
        folder = PACKAGE / path.parent.relative_to(UNIT)
        subjects = (folder.name, *(source.stem for source in folder.glob("*.py")))
        if not path.stem.removeprefix("test_").startswith(subjects):
            strays.append(str(path.relative_to(UNIT)))
    assert not strays, listing(strays)


@pytest.mark.parametrize("table", TABLES)
def test_every_entry_of_a_table_is_tested(table):
    """A test names the entry in a string, or runs over the table itself."""
    path = PACKAGE / TABLES[table]
    entries = _keys(path, table)
    assert entries, f"{place(path)} holds no literal table {table}"
    folder = path.parent.relative_to(PACKAGE).parts[0]
    sources = [file.read_text(encoding="utf-8") for file in sorted((UNIT / folder).rglob("*.py"))]
    if any(re.search(rf"parametrize\([^)]*\b{table}\b", source) for source in sources):
        return
    strings = [text for source in sources for text in _strings(source)]
    untested = [entry for entry in entries if not any(_names(text, entry) for text in strings)]
    assert not untested, listing(untested)


def _keys(path, table):
    for node in tree(path).body:
        targets = [node.target] if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [])
        if any(isinstance(target, ast.Name) and target.id == table for target in targets):
            assert isinstance(node.value, ast.Dict), f"{place(path, node)}: {table} is not a literal table"
            return [key.value for key in node.value.keys]
    return []


def _names(text, entry):
    """The entry as a whole string, or as the value of a key inside YAML or JSON."""
    return text == entry or re.search(rf":\s*['\"]?{re.escape(entry)}(?![\w-])", text)


def _strings(source):
    return [
        node.value
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
