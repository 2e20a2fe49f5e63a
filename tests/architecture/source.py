"""The source tree as the architecture tests see it."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "triptych"
UNIT = ROOT / "tests" / "unit"


def modules(folder: str = "") -> list[Path]:
    """Every source file below a folder of the package, sorted."""
    return sorted((PACKAGE / folder).rglob("*.py"))


@cache
def tree(path: Path) -> ast.Module:
    """The file parsed."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def place(path: Path, node: ast.AST | None = None) -> str:
    """`src/triptych/a/b.py:12`."""
    name = str(path.relative_to(ROOT))
    return f"{name}:{getattr(node, 'lineno', 1)}" if node else name


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a file, nested ones included."""
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def listing(found: list[str]) -> str:
    """All of it, a line each: pytest would shorten a list."""
    return f"{len(found)} found:\n" + "\n".join(found)
