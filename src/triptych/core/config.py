"""Recipes: YAML with overrides in, validated configuration out; every problem at once, with line and remedy."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from triptych.core.errors import ConfigError, Problem

KeyPath = tuple[str | int, ...]
ConfigType = TypeVar("ConfigType", bound="Config")


class Config(BaseModel):
    """Base of every configuration: unknown keys are refused, values cannot change after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


Place = tuple[str, int | None]
"""File (or `command line`) and line."""
COMMAND_LINE: Place = ("command line", None)


@dataclass(frozen=True)
class ConfigTree:
    """A recipe as read: plain values and where each key stands."""

    values: dict[str, Any]
    path: Path
    lines: Mapping[KeyPath, int]
    """Key path -> 1-based line of the file; keys set on the command line are absent."""
    overridden: Mapping[KeyPath, Place] = field(default_factory=dict)
    """Key path -> where the value comes from that replaced the file's."""

    def locate(self, key: KeyPath) -> Place:
        """Where a key stands, or its nearest parent that stands somewhere."""
        while key:
            if key in self.overridden:
                return self.overridden[key]
            if key in self.lines:
                return str(self.path), self.lines[key]
            below = next((place for item, place in self.overridden.items() if item[: len(key)] == key), None)
            if below is not None:
                return below
            key = key[:-1]
        return str(self.path), None


def load_tree(
    path: Path | str, overrides: Sequence[str] = (), given: Mapping[KeyPath, tuple[Any, Place]] | None = None
) -> ConfigTree:
    """Read a YAML recipe and merge values into it.

    Args:
        path: the file.
        overrides: `key.sub=value` of the command line; they win.
        given: key path -> (value, where it stands), what another file puts into this one.

    Raises:
        ConfigError: the file is missing, is not YAML, or an override cannot be parsed.
    """
    path = Path(path)
    if not path.is_file():
        raise ConfigError(Problem("recipe not found", file=str(path), remedy=_similar_files(path)))
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        row = path.read_bytes()[: error.start].count(b"\n") + 1
        message = f"not UTF-8: {error.reason}"
        raise ConfigError(Problem(message, file=str(path), line=row, remedy="save the file as UTF-8")) from error
    try:
        node = yaml.compose(text)
        tree = OmegaConf.create(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else None
        raise ConfigError(
            Problem(f"not valid YAML: {error}", file=str(path), line=line, remedy="mend the syntax on this line")
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(Problem(f"cannot be read: {error}", file=str(path))) from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(Problem("a recipe must be a mapping of keys", file=str(path), line=1))
    lines: dict[KeyPath, int] = {}
    _collect_lines(node, (), lines)
    return _merge(tree, path, lines, {**(given or {}), **_parse_overrides(overrides)})


def command_line_tree(values: Mapping[str, Any], overrides: Sequence[str]) -> ConfigTree:
    """A recipe that stands in no file, with `key.sub=value` overrides merged into it.

    Raises:
        ConfigError: an override cannot be parsed.
    """
    return _merge(OmegaConf.create(dict(values)), Path(COMMAND_LINE[0]), {}, _parse_overrides(overrides))


def _parse_overrides(overrides: Sequence[str]) -> dict[KeyPath, tuple[Any, Place]]:
    problems: list[Problem] = []
    parsed: dict[KeyPath, tuple[Any, Place]] = {}
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator or not key:
            remedy = "write key=value"
            problems.append(Problem(f"override `{override}` is not `key.sub=value`", COMMAND_LINE[0], remedy=remedy))
            continue
        try:
            parsed[parse_key(key)] = (yaml.safe_load(value), COMMAND_LINE)
        except yaml.YAMLError as error:
            problems.append(Problem(f"override `{override}`: {error}", COMMAND_LINE[0]))
    if problems:
        raise ConfigError(problems)
    return parsed


def _merge(
    tree: Any, path: Path, lines: Mapping[KeyPath, int], given: Mapping[KeyPath, tuple[Any, Place]]
) -> ConfigTree:
    problems: list[Problem] = []
    for key, (value, (file, line)) in given.items():
        try:
            OmegaConf.update(tree, _dotted(key), value, merge=True, force_add=True)
        except (OmegaConfBaseException, ValueError, TypeError) as error:
            problems.append(Problem(f"`{_dotted(key)}={value}` cannot be put into {path}: {error}", file, line))
    if problems:
        raise ConfigError(problems)
    try:
        values = OmegaConf.to_container(tree, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(Problem(f"cannot be resolved: {error}", file=str(path))) from error
    assert isinstance(values, dict)
    places = {key: place for key, (_, place) in given.items()}
    return ConfigTree({str(key): value for key, value in values.items()}, path, lines, places)


def validate(schema: type[ConfigType], tree: ConfigTree) -> ConfigType:
    """Turn a tree into `schema`.

    Raises:
        ConfigError: one problem for every key that is unknown, missing or of the wrong type or value.
    """
    try:
        return schema.model_validate(tree.values)
    except ValidationError as error:
        found = [item for item in error.errors() if not _is_consequence(item)]
        raise ConfigError([_to_problem(schema, tree, item) for item in found]) from error


def config_problem(tree: ConfigTree, key: KeyPath, message: str, remedy: str | None = None) -> Problem:
    """A problem located at a key, for checks that go beyond the schema."""
    file, line = tree.locate(key)
    return Problem(message, file=file, line=line, key=_dotted(key), remedy=remedy)


def did_you_mean(name: str, known: Iterable[str], most: int = 40) -> str:
    """A remedy that offers the nearest known names, or lists them: all, or `most` of them."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=2, cutoff=0.55)
    if close:
        return "did you mean " + " or ".join(f"`{item}`" for item in close) + "?"
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return "known: " + ", ".join(names[:most]) + rest


def differing_keys(left: Any, right: Any, key: KeyPath = ()) -> list[str]:
    """Dotted keys whose values differ between two plain trees, with both values."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        names = sorted({*left, *right}, key=str)
        return [text for name in names for text in differing_keys(left.get(name), right.get(name), (*key, name))]
    if isinstance(left, list) and isinstance(right, list) and len(left) == len(right):
        pairs = enumerate(zip(left, right, strict=True))
        return [text for index, (a, b) in pairs for text in differing_keys(a, b, (*key, index))]
    return [] if left == right else [f"{_dotted(key)}: {left!r} -> {right!r}"]


def _collect_lines(node: yaml.Node, key: KeyPath, lines: dict[KeyPath, int]) -> None:
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            child = (*key, name.value)
            lines[child] = name.start_mark.line + 1
            _collect_lines(value, child, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            child = (*key, index)
            lines[child] = value.start_mark.line + 1
            _collect_lines(value, child, lines)


def parse_key(key: str) -> KeyPath:
    """`data[0].path` or `data.0.path` -> ("data", 0, "path")."""
    return tuple(int(part) if part.isdigit() else part for part in key.replace("[", ".").replace("]", "").split("."))


def _dotted(key: KeyPath) -> str:
    text = ""
    for part in key:
        text += f"[{part}]" if isinstance(part, int) else (f".{part}" if text else str(part))
    return text


def _similar_files(path: Path) -> str:
    if not path.parent.is_dir():
        return f"the folder {path.parent} does not exist"
    names = [item.name for item in path.parent.glob("*.yaml")]
    return did_you_mean(path.name, names) if names else f"there is no .yaml file in {path.parent}"


def _is_consequence(error: Any) -> bool:
    """Whether a list is too short only because its items are wrong, which is reported for each."""
    return bool(error["type"] == "too_short" and len(error["input"]) > error["ctx"]["actual_length"])


def _to_problem(schema: type[Config], tree: ConfigTree, error: Any) -> Problem:
    key = _strip_union_tags(tree.values, error["loc"])
    kind = error["type"]
    context = error.get("ctx", {})
    remedy: str | None = None
    message = str(error["msg"])
    if kind == "extra_forbidden":
        message = f"unknown key `{key[-1]}`"
        remedy = did_you_mean(str(key[-1]), _known_keys(schema, error["loc"][:-1]))
    elif kind == "missing":
        message = f"`{key[-1]}` is required"
        remedy = f"add `{key[-1]}:`"
    elif kind in ("union_tag_invalid", "literal_error"):
        expected = context.get("expected_tags") or context.get("expected", "")
        names = [name.strip(" '\"") for name in str(expected).replace(" or ", ",").split(",")]
        given = context.get("tag", error.get("input"))
        message = f"`{given}` is not allowed here"
        remedy = did_you_mean(str(given), names)
    elif kind == "union_tag_not_found":
        name = str(context["discriminator"]).strip("'")
        message = f"`{name}` is required to tell which variant this is"
        remedy = "known: " + ", ".join(sorted(_known_tags(schema, error["loc"], name)))
    elif kind == "value_error":
        message = str(context.get("error", message))
    else:
        message = f"{message}, got {error.get('input')!r}"
    return config_problem(tree, key, message, remedy)


def _strip_union_tags(values: Any, location: Sequence[str | int]) -> KeyPath:
    """Drop the parts of a pydantic location that name a union member rather than a key of the recipe."""
    key: list[str | int] = []
    node: Any = values
    for position, part in enumerate(location):
        last = position == len(location) - 1
        if (isinstance(node, Mapping) and part in node) or (
            isinstance(node, list) and isinstance(part, int) and part < len(node)
        ):
            node = node[part]  # type: ignore[index]
        elif not last or not isinstance(node, Mapping):
            continue
        key.append(part)
    return tuple(key)


def _known_keys(schema: Any, location: Sequence[str | int]) -> set[str]:
    """Keys accepted at a location of `schema`."""
    return {item.alias or name for model in _models_at(schema, location) for name, item in model.model_fields.items()}


def _known_tags(schema: Any, location: Sequence[str | int], discriminator: str) -> set[str]:
    """Values of the key that tells the variants of a union at a location apart."""
    fields = (model.model_fields.get(discriminator) for model in _models_at(schema, location))
    return {str(value) for item in fields if item is not None for value in _literals(item.annotation)}


def _models_at(schema: Any, location: Sequence[str | int]) -> list[type[BaseModel]]:
    members = _members(schema)
    for part in location:
        following: list[Any] = []
        for member in members:
            if isinstance(member, type) and issubclass(member, BaseModel):
                if any(part in _literals(item.annotation) for item in member.model_fields.values()):
                    following.append(member)
                else:
                    following.extend(
                        inner
                        for name, item in member.model_fields.items()
                        if part == (item.alias or name)
                        for inner in _members(item.annotation)
                    )
            elif get_origin(member) in (list, tuple, Sequence) and isinstance(part, int):
                following.extend(inner for item in get_args(member) for inner in _members(item))
            elif get_origin(member) in (dict, Mapping):
                following.extend(_members(get_args(member)[1]))
        members = following
    return [member for member in members if isinstance(member, type) and issubclass(member, BaseModel)]


def _literals(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def _members(annotation: Any) -> list[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _members(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [inner for item in get_args(annotation) for inner in _members(item)]
    if origin is Literal:
        return []
    return [annotation]
