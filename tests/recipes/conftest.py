"""Fixtures of the tests that run the real commands."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.recipes.command_server import CommandServer


@pytest.fixture(scope="session")
def server() -> Iterator[CommandServer]:
    """Runs `triptych` commands without paying for imports each time."""
    server = CommandServer()
    yield server
    server.close()
