from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, field_validator

from triptych.core.config import (
    Config,
    command_line_tree,
    config_problem,
    did_you_mean,
    differing_keys,
    load_tree,
    validate,
)
from triptych.core.errors import ConfigError


class Cosine(Config):
    kind: Literal["cosine"] = "cosine"
    warmup: float = 0.03


class Constant(Config):
    kind: Literal["constant"] = "constant"


class Rule(Config):
    match: str
    lr: float | None = None

    @field_validator("match")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value:
            raise ValueError("`match` is empty, so the rule covers nothing")
        return value


class Rows(Config):
    format: Literal["rows"] = "rows"


class Captions(Config):
    format: Literal["captions"] = "captions"


class Recipe(Config):
    stage: Literal["tune", "contrastive"]
    global_batch: int = 8
    schedule: Annotated[Cosine | Constant, Field(discriminator="kind")] = Cosine()
    data: Annotated[Rows | Captions, Field(discriminator="format")] = Rows()
    tuning: list[Rule] = Field(default_factory=list)
    source: str | None = Field(default=None, alias="from")
    named: dict[str, Rule] = Field(default_factory=dict)


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def problems_of(path: Path, *overrides: str):
    with pytest.raises(ConfigError) as error:
        validate(Recipe, load_tree(path, overrides))
    return {problem.key: problem for problem in error.value.problems}


def test_a_good_recipe_becomes_a_frozen_configuration(tmp_path):
    path = write(tmp_path, "stage: tune\nschedule: {kind: constant}\ntuning:\n  - {match: vision, lr: 1e-5}\n")
    recipe = validate(Recipe, load_tree(path))
    assert (recipe.stage, recipe.schedule, recipe.tuning) == ("tune", Constant(), [Rule(match="vision", lr=1e-5)])
    with pytest.raises(ValueError, match="frozen"):
        recipe.stage = "contrastive"


def test_every_fault_comes_at_once_with_file_line_key_and_remedy(tmp_path):
    path = write(
        tmp_path,
        "stage: tuen\n"
        "global_batchh: 16\n"
        "global_batch: many\n"
        "schedule:\n"
        "  kind: cosine\n"
        "  warm_up: 0.1\n"
        "tuning:\n"
        "  - match: vision\n"
        "  - lr: 1.0\n"
        "  - match: ''\n",
    )
    problems = problems_of(path)
    assert {key: problem.line for key, problem in problems.items()} == {
        "stage": 1,
        "global_batchh": 2,
        "global_batch": 3,
        "schedule.warm_up": 6,
        "tuning[1].match": 9,
        "tuning[2].match": 10,
    }
    assert {problem.file for problem in problems.values()} == {str(path)}
    assert problems["stage"].remedy == "did you mean `tune`?"
    assert problems["global_batchh"].remedy == "did you mean `global_batch`?"
    assert problems["schedule.warm_up"].remedy == "did you mean `warmup`?"
    assert "many" in problems["global_batch"].message
    assert problems["tuning[1].match"].remedy == "add `match:`"
    assert problems["tuning[2].match"].message == "`match` is empty, so the rule covers nothing"


def test_unknown_variants_name_the_known_ones(tmp_path):
    assert problems_of(write(tmp_path, "stage: tune\nschedule: {kind: cosin}\n"))["schedule"].remedy == (
        "did you mean `cosine`?"
    )


@pytest.mark.parametrize(
    ("text", "tag", "known"), [("schedule: {warmup: 0.1}", "kind", "cosine"), ("data: {}", "format", "rows")]
)
def test_a_missing_variant_names_its_key_and_the_known_ones(tmp_path, text, tag, known):
    key = text.partition(":")[0]
    missing = problems_of(write(tmp_path, f"stage: tune\n{text}\n"))[key]
    assert f"`{tag}` is required" in missing.message and known in (missing.remedy or "")


def test_a_mistyped_alias_is_offered_as_the_recipe_spells_it(tmp_path):
    problem = problems_of(write(tmp_path, "stage: tune\nfrm: somewhere\n"))["frm"]
    assert problem.remedy == "did you mean `from`?"


def test_unknown_keys_inside_a_mapping_of_models(tmp_path):
    problem = problems_of(write(tmp_path, "stage: tune\nnamed:\n  first: {match: a, lrr: 1}\n"))["named.first.lrr"]
    assert (problem.line, problem.remedy) == (3, "did you mean `lr`?")


def test_the_command_line_wins_and_is_named_in_errors(tmp_path):
    path = write(tmp_path, "stage: tune\nglobal_batch: 4\ntuning:\n  - {match: vision}\n")
    recipe = validate(Recipe, load_tree(path, ["global_batch=32", "schedule.kind=constant", "tuning[0].lr=2e-4"]))
    assert (recipe.global_batch, recipe.schedule, recipe.tuning[0].lr) == (32, Constant(), 2e-4)
    problem = problems_of(path, "global_batch=none")["global_batch"]
    assert (problem.file, problem.line) == ("command line", None)


def test_overrides_that_are_none_are_all_reported(tmp_path):
    with pytest.raises(ConfigError) as error:
        load_tree(write(tmp_path, "stage: tune\n"), ["global_batch", "=3", "stage=[unclosed"])
    assert len(error.value.problems) == 3
    assert {problem.file for problem in error.value.problems} == {"command line"}


def test_references_within_a_recipe_are_resolved(tmp_path):
    recipe = validate(Recipe, load_tree(write(tmp_path, "stage: tune\nglobal_batch: 6\nnamed: {a: {match: x}}\n")))
    assert recipe.global_batch == 6
    tree = load_tree(write(tmp_path, "stage: tune\nnamed: {a: {match: '${stage}'}}\n"))
    assert validate(Recipe, tree).named["a"].match == "tune"
    with pytest.raises(ConfigError, match="cannot be resolved"):
        load_tree(write(tmp_path, "stage: ${nowhere}\n"))


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [("stage: [1, 2\nmore: 3\n", 2, "not valid YAML"), ("- a\n- b\n", 1, "mapping"), ("", 1, "mapping")],
)
def test_files_that_are_no_recipe(tmp_path, text, line, words):
    with pytest.raises(ConfigError, match=words) as error:
        load_tree(write(tmp_path, text))
    assert error.value.problems[0].line == line


def test_a_missing_file_offers_its_neighbours(tmp_path):
    write(tmp_path, "stage: tune\n")
    with pytest.raises(ConfigError, match=r"did you mean `recipe\.yaml`"):
        load_tree(tmp_path / "recipee.yaml")
    with pytest.raises(ConfigError, match="does not exist"):
        load_tree(tmp_path / "nowhere" / "recipe.yaml")


def test_problems_beyond_the_schema_find_the_nearest_line(tmp_path):
    tree = load_tree(write(tmp_path, "stage: tune\nschedule:\n  kind: cosine\n"))
    problem = config_problem(tree, ("schedule", "warmup"), "too long", "shorten it")
    assert (problem.line, problem.key, problem.remedy) == (2, "schedule.warmup", "shorten it")


def test_did_you_mean():
    assert did_you_mean("langauge", ["language", "vision"]) == "did you mean `language`?"
    assert did_you_mean("xyz", ["vision", "language"]) == "known: language, vision"


def test_differing_keys_show_both_values():
    left = {"train": {"lr": 1e-3, "epochs": 1}, "data": [{"path": "a"}], "seed": 1}
    right = {"train": {"lr": 1e-4, "epochs": 1}, "data": [{"path": "b"}], "name": "x", "seed": 1}
    assert differing_keys(left, right) == [
        "data[0].path: 'a' -> 'b'",
        "name: None -> 'x'",
        "train.lr: 0.001 -> 0.0001",
    ]
    assert differing_keys({"data": [1, 2]}, {"data": [1]}) == ["data: [1, 2] -> [1]"]
    assert differing_keys(left, left) == []


def test_an_overridden_key_below_an_unknown_one_is_blamed_on_the_command_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("loader: {seed: 1}\n")
    tree = load_tree(path, ["lodaer.seed=3", "loader.seed=2"])
    assert tree.locate(("lodaer",)) == ("command line", None)
    assert tree.locate(("loader",)) == (str(path), 1)
    assert tree.locate(("loader", "seed")) == ("command line", None)


def test_values_of_another_file_keep_their_place_and_the_command_line_wins(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("loader: {seed: 1, batch: 2}\n")
    given = {("loader", "seed"): (5, ("pipeline.yaml", 7)), ("loader", "batch"): (6, ("pipeline.yaml", 8))}
    tree = load_tree(path, ["loader.batch=9"], given)
    assert tree.values == {"loader": {"seed": 5, "batch": 9}}
    assert tree.locate(("loader", "seed")) == ("pipeline.yaml", 7)
    assert tree.locate(("loader", "batch")) == ("command line", None)
    assert tree.locate(("loader",)) == (str(path), 1)


def test_a_recipe_without_a_file():
    tree = command_line_tree({"loader": {"seed": 1}}, ["loader.batch=9", "lr=1e-3"])
    assert tree.values == {"loader": {"seed": 1, "batch": 9}, "lr": "1e-3"}
    assert tree.locate(("lr",))[0] == "command line"
    with pytest.raises(ConfigError, match=r"override `x` is not `key.sub=value`"):
        command_line_tree({}, ["x"])


def test_a_recipe_that_is_not_utf8_is_refused_with_its_line(tmp_path):
    (tmp_path / "latin.yaml").write_bytes(b"stage: tune\noutput: r\xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml:2: not UTF-8"):
        load_tree(tmp_path / "latin.yaml")


def test_many_known_names_are_not_all_listed():
    assert did_you_mean("x", map(str, range(50)), most=3) == "known: 0, 1, 10 and 47 more"
