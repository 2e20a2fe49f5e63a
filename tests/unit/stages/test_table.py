"""The table of stages, and a package light enough for `doctor`."""

from __future__ import annotations

import subprocess
import sys
from typing import get_args

import pytest

from triptych.stages.table import STAGES


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_is_found_by_the_name_its_recipe_holds(name: str) -> None:
    schema, build = STAGES[name]
    assert get_args(schema.model_fields["stage"].annotation) == (name,)
    assert build.__name__ == f"build_{name}"


def test_the_package_itself_imports_nothing_heavy() -> None:
    program = (
        "import sys\nimport triptych.stages.doctor\n"
        "print([name for name in ('torch', 'transformers', 'peft', 'datasets') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
