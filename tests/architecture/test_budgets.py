"""Sizes that keep a file readable, and rules of style that ruff does not know."""

import ast

from tests.architecture.source import functions, listing, modules, place, tree

FUNCTION_LINES, FILE_LINES, PARAMETERS = 60, 500, 8


def test_functions_fit_on_a_screen():
    found = [
        f"{place(path, node)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for path in modules()
        for node in functions(path)
        if node.end_lineno - node.lineno + 1 > FUNCTION_LINES
    ]
    assert not found, listing(found)


def test_files_stay_short():
    sizes = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in modules()}
    found = [f"{name}: {size} lines" for name, size in sizes.items() if size > FILE_LINES]
    assert not found, listing(found)


def test_functions_take_few_parameters():
    found = []
    for path in modules():
        for node in functions(path):
            names = [item.arg for item in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > PARAMETERS:
                found.append(f"{place(path, node)} {node.name}: {count} parameters")
    assert not found, listing(found)


def test_every_field_of_a_configuration_is_explained():
    """The string under a field becomes its documentation; without it a recipe's key has no meaning on record."""
    found = []
    for path, nodes in _configurations().items():
        for node in nodes:
            for item, following in zip(node.body, [*node.body[1:], None], strict=True):
                if isinstance(item, ast.AnnAssign) and not _is_text(following) and not _is_constant(item):
                    found.append(f"{place(path, item)} {node.name}.{ast.unparse(item.target)}")
    assert not found, listing(found)


def test_nothing_is_looked_up_by_trial():
    """`hasattr` hides which types are meant; a protocol or a table says it."""
    found = [
        place(path, node)
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "hasattr"
    ]
    assert not found, listing(found)


def _configurations():
    """Path -> classes that derive from `Config`, directly or not (told by name)."""
    classes = {path: [node for node in tree(path).body if isinstance(node, ast.ClassDef)] for path in modules()}
    names, previous = {"Config"}, set()
    while names != previous:
        previous = set(names)
        names |= {node.name for nodes in classes.values() for node in nodes if _bases(node) & names}
    return {path: [node for node in nodes if _bases(node) & names] for path, nodes in classes.items()}


def _bases(node):
    return {base.id for base in node.bases if isinstance(base, ast.Name)}


def _is_text(node: ast.stmt | None) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _is_constant(node: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.unparse(node.annotation)
