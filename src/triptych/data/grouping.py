"""Which rows of a run's data are about the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from triptych.core.errors import DataError
from triptych.core.types import Sample


class Rows(Protocol):
    """A data set: rows by number."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def sample(self, index: int) -> Sample:
        """Read one row; raises DataError."""
        ...


def picture_groups(datasets: Sequence[Rows]) -> list[list[int]]:
    """For each data set, a number for each row: equal for rows that show the same pictures in the same order.

    Rows without pictures and rows that cannot be read have a number of their own. Pictures are told apart by where they
    are, see `ImageReference.identity`; none is opened.
    """
    numbers: dict[object, int] = {}
    groups = []
    for dataset in datasets:
        groups.append([])
        for index in range(len(dataset)):
            try:
                key = tuple(image.identity for image in dataset.sample(index).images)
            except DataError:
                key = ()
            groups[-1].append(numbers.setdefault(key or (id(dataset), index), len(numbers)))
    return groups
