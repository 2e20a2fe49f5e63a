"""Modes are what they were."""

from __future__ import annotations

import pytest
from torch import nn

from triptych.models.modes import evaluation_mode


def test_every_flag_comes_back_also_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    model[1].eval()
    with pytest.raises(ValueError, match="inside"), evaluation_mode(model):
        assert not any(item.training for item in model.modules())
        raise ValueError("inside")
    assert [item.training for item in model.modules()] == [True, True, False, False]
