"""Which rows of a run's data are about the same pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Rows(Protocol):
    """A data set: rows by number."""

    def __len__(self) -> int:
        """Rows."""
        ...

    def picture_key(self, index: int) -> tuple[str, ...] | None:
        """Equal for rows that show the same pictures in the same order; None without pictures."""
        ...


def picture_groups(datasets: Sequence[Rows]) -> list[list[int]]:
    """For each data set, a number for each row: equal for rows that show the same pictures in the same order.

    Rows without pictures have a number of their own. No picture is opened.
    """
    numbers: dict[object, int] = {}
    return [
        [
            numbers.setdefault(dataset.picture_key(index) or (number, index), len(numbers))
            for index in range(len(dataset))
        ]
        for number, dataset in enumerate(datasets)
    ]
