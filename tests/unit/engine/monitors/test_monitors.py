"""The table of monitors and their configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter, ValidationError

from triptych.engine.monitors import MONITORS, MonitorConfig, build_monitors


def test_every_kind_of_the_union_is_in_the_table_and_builds(tmp_path: Path) -> None:
    adapter: TypeAdapter[MonitorConfig] = TypeAdapter(MonitorConfig)
    monitors = build_monitors([adapter.validate_python({"kind": kind}) for kind in MONITORS], tmp_path, 10)

    for kind, monitor in zip(MONITORS, monitors, strict=True):
        assert isinstance(monitor, MONITORS[kind])
    with pytest.raises(ValidationError, match="'console', 'jsonl', 'tensorboard', 'health'"):
        adapter.validate_python({"kind": "consol"})
