"""Comparisons with peers, run with `make bench`."""

from importlib.util import find_spec

_MISSING = [name for name in ("trl", "open_clip", "peft") if find_spec(name) is None]
if _MISSING:
    raise SystemExit(f"error: the benchmark needs {', '.join(_MISSING)} -> `make bench` installs the peers first")
