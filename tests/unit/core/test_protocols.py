import inspect

import pytest
import torch
from pydantic import TypeAdapter

from triptych.core import protocols
from triptych.core.protocols import Objective, WindowObjective, join_pixels
from triptych.objectives import OBJECTIVES, ObjectiveConfig, build_objective


def build(kind):
    return build_objective(TypeAdapter(ObjectiveConfig).validate_python({"kind": kind}))


def parameters(function):
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_objectives_have_the_shape_the_engine_expects(kind):
    objective = build(kind)
    assert isinstance(objective, Objective)
    protocol = WindowObjective if isinstance(objective, WindowObjective) else Objective
    methods = [name for name, member in inspect.getmembers(protocol, inspect.isfunction) if not name.startswith("_")]
    assert len(methods) == (6 if protocol is WindowObjective else 3)
    for name in methods:
        assert parameters(getattr(type(objective), name)) == parameters(getattr(protocol, name)), name


@pytest.mark.parametrize("kind", sorted(OBJECTIVES))
def test_objectives_never_see_a_model(kind):
    members = inspect.getmembers(type(build(kind)), inspect.isfunction)
    assert not {name for _, function in members for name in parameters(function)} & {"model", "scorer", "hf"}


def test_only_the_coupled_objective_is_a_window_objective():
    assert [kind for kind in OBJECTIVES if isinstance(build(kind), WindowObjective)] == ["contrastive"]


def test_every_protocol_method_says_what_it_does():
    for name, protocol in inspect.getmembers(protocols, inspect.isclass):
        if protocol.__module__ != protocols.__name__:
            continue
        assert protocol.__doc__, name
        for method, function in inspect.getmembers(protocol, inspect.isfunction):
            if method == "__call__" or not method.startswith("_"):
                assert function.__doc__, f"{name}.{method}"


def test_pictures_are_joined_in_order():
    first, second = {"pixel_values": torch.ones(1, 3)}, {"pixel_values": torch.full((2, 3), 2.0)}
    assert join_pixels([first, second])["pixel_values"].tolist() == [[1, 1, 1], [2, 2, 2], [2, 2, 2]]


def test_smaller_ones_are_padded_with_zeros_and_keep_their_type():
    first, second = {"mask": torch.ones(1, 1, 2, dtype=torch.int64)}, {"mask": torch.ones(1, 2, 1, dtype=torch.int64)}
    joined = join_pixels([first, second])["mask"]
    assert joined.dtype == torch.int64
    assert joined.tolist() == [[[1, 1], [0, 0]], [[1, 0], [1, 0]]]
