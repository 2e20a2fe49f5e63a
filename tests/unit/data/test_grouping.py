"""Rows about the same pictures have the same number."""

from __future__ import annotations

from triptych.core.errors import DataError
from triptych.core.types import ImageReference, Message, Origin, Sample, Text
from triptych.data.grouping import picture_groups


class Pictured:
    """Rows that show the named pictures; None stands for a row that cannot be read."""

    def __init__(self, rows: list[tuple[str, ...] | None]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def sample(self, index: int) -> Sample:
        names = self._rows[index]
        if names is None:
            raise DataError("broken row")
        parts = (*(ImageReference(path=f"/{name}", name=name) for name in names), Text("what?"))
        return Sample((Message("user", parts),), Origin("rows.json", index + 1))


def test_groups_are_those_of_the_pictures_over_all_data_sets() -> None:
    first = Pictured([("a",), ("b",), ("a",), (), None, ("a", "b")])
    second = Pictured([("b",), (), ("b", "a"), ("a",), None])
    one, two = picture_groups([first, second])
    assert one[0] == one[2] == two[3]
    assert one[1] == two[0]
    numbers = [*one, *two]
    # a, b, a-b, b-a, and one each for two rows without pictures and two that cannot be read
    assert len(set(numbers)) == 8 and sorted(set(numbers)) == list(range(8))
