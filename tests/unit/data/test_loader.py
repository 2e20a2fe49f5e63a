"""Windows: which rows, in which order, on which rank, before and after a resume."""

from __future__ import annotations

import io
import itertools
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from tests.fake_pictures import FakePictures
from tests.unit.data.formats.reading import open_file
from triptych.core.errors import CheckpointError, DataError
from triptych.core.types import IGNORE, Batch, Branch, Example, ImageReference, Message, Origin, Sample, Text, Window
from triptych.data.grouping import picture_groups
from triptych.data.images import picture_key, read_size
from triptych.data.loader import Loader, LoaderConfig
from triptych.data.mixture import Mixture


class Numbers:
    """Rows whose only content is their number; those named broken cannot be read."""

    digest = "0"

    def __init__(self, name: str, size: int, broken: tuple[int, ...] = (), picture: Path | None = None) -> None:
        self.name, self.size, self.broken, self.picture = name, size, broken, picture

    def __len__(self) -> int:
        return self.size

    def origin(self, index: int) -> Origin:
        return Origin(self.name, index + 1)

    def fingerprint(self) -> dict[str, str]:
        return {self.name: self.digest}

    def sample(self, index: int) -> Sample:
        if index in self.broken:
            raise DataError("broken row", file=self.name, line=index + 1)
        parts: list[Any] = [Text(str(index))]
        if self.picture is not None and index % 2 == 0:
            parts.append(ImageReference(path=str(self.picture), name=self.picture.name))
        return Sample((Message("user", tuple(parts)),), self.origin(index), task=self.name)


def encode(sample: Sample) -> Example:
    """Two tokens: 1, then 10 + the row number."""
    token = torch.tensor([10 + int(sample.messages[0].text)])
    one = torch.ones(1)
    return Example(
        trunk=Branch(
            torch.tensor([1]), torch.tensor([IGNORE]), one.to(torch.uint8), one, tuple(range(len(sample.images)))
        ),
        branches=(Branch(token, token, torch.full((1,), 5, dtype=torch.uint8), one),),
        images=sample.images,
        image_sizes=tuple(read_size(reference) for reference in sample.images),
        origin=sample.origin,
        task=sample.task,
    )


class NoTokenizer:
    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


PICTURES = FakePictures(NoTokenizer(), size=2)


def make(datasets: list[Numbers], rank: int = 0, world_size: int = 1, **config: Any) -> Loader:
    options: dict[str, Any] = {"global_batch": 4, "micro_batch": 2, "epochs": 2, "seed": 3, "prefetch": 0} | config
    mixture = Mixture([len(item) for item in datasets], [None] * len(datasets), options["seed"])
    return Loader(datasets, mixture, encode, PICTURES, LoaderConfig(**options), (rank, world_size))


def rows(window: Window) -> list[str]:
    """`file:line` of the rows of a window that count."""
    return [f"{item.file}:{item.line}" for batch in window.batches if not batch.is_padding for item in batch.origins]


def shapes(windows: Iterator[Window] | list[Window]) -> list[list[int]]:
    return [[batch.num_rows for batch in window.batches] for window in windows]


DATA = [Numbers("a", 6), Numbers("b", 4)]


@pytest.mark.requirement("A-33", "F-25")
def test_an_epoch_holds_every_row_once_and_its_last_window_is_smaller() -> None:
    loader = make(DATA)
    windows = list(loader.windows())
    assert loader.total_windows == 6
    assert shapes(windows) == [[2, 2], [2, 2], [2]] * 2
    first = [row for window in windows[:3] for row in rows(window)]
    second = [row for window in windows[3:] for row in rows(window)]
    assert sorted(first) == sorted(second) == sorted([f"a:{i}" for i in range(1, 7)] + [f"b:{i}" for i in range(1, 5)])
    assert first != second
    assert [window.index for window in windows] == list(range(6))
    assert [window.epoch for window in windows] == [0.4, 0.8, 1.0, 1.4, 1.8, 2.0]


def test_grouping_by_length_keeps_the_rows_of_every_window() -> None:
    """Rows 1, 3, ... of a window are longer; grouped, each micro-batch holds rows of one length."""

    def longer(sample: Sample) -> Example:
        example = encode(sample)
        (branch,) = example.branches
        if int(sample.messages[0].text) % 2 == 0:
            return example
        twice = replace(
            branch,
            **{name: torch.cat([getattr(branch, name)] * 2) for name in ("input_ids", "labels", "kinds", "weights")},
        )
        return replace(example, branches=(twice,))

    def run(group_by_length: bool, **changes: Any) -> list[Window]:
        options = {"global_batch": 8, "micro_batch": 4, "steps": 3, "prefetch": 0, **changes}
        config = LoaderConfig(**options, group_by_length=group_by_length)
        data = [Numbers("a", 16, broken=(5,))]
        return list(Loader(data, Mixture([16], [None], 0), longer, PICTURES, config).windows())

    plain, grouped = (run(value, on_bad_row="skip") for value in (False, True))
    assert [sorted(rows(window)) for window in plain] == [sorted(rows(window)) for window in grouped]
    assert [window.skipped for window in plain] == [window.skipped for window in grouped]
    for window in grouped:
        lengths = [length for batch in window.batches for length in batch.lengths.tolist()]
        assert lengths == sorted(lengths)
    padding = [
        sum(int((~batch.attention_mask.bool()).sum()) for w in run_ for batch in w.batches) for run_ in (plain, grouped)
    ]
    assert padding[1] < padding[0]


@pytest.mark.requirement("A-33")
def test_the_order_is_that_of_the_mixture() -> None:
    mixture = Mixture([6, 4], [None, None], 3)
    drawn = [mixture.draw(position) for position in range(20)]
    loaded = [row for window in make(DATA).windows() for row in rows(window)]
    assert loaded == [f"{'ab'[dataset]}:{row + 1}" for dataset, row in drawn]


@pytest.mark.parametrize(
    ("length", "total"),
    [({"epochs": 1}, 3), ({"epochs": 0.5}, 2), ({"epochs": 1.5}, 5), ({"epochs": None, "steps": 7}, 7)],
)
def test_the_length_of_a_run(length: dict[str, Any], total: int) -> None:
    loader = make(DATA, **length)
    assert loader.total_windows == total
    assert len(list(loader.windows())) == total


def test_exactly_one_length_must_be_given() -> None:
    with pytest.raises(ValidationError, match="exactly one of"):
        LoaderConfig(global_batch=1, micro_batch=1)
    with pytest.raises(ValidationError, match="exactly one of"):
        LoaderConfig(global_batch=1, micro_batch=1, epochs=1, steps=1)
    with pytest.raises(ValidationError, match=r"exactly one of .*; `micro_batch: auto` finds") as caught:
        LoaderConfig(global_batch=1, micro_batch="auto", micro_batch_tokens=3)
    assert caught.value.error_count() == 1


@pytest.mark.requirement("A-33")
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_the_shares_of_the_ranks_join_to_the_windows_of_one_process(world_size: int) -> None:
    whole = [rows(window) for window in make(DATA).windows()]
    ranks = [list(make(DATA, rank, world_size).windows()) for rank in range(world_size)]
    joined = [[row for window in shares for row in rows(window)] for shares in zip(*ranks, strict=True)]
    assert joined == whole
    for shares in zip(*ranks, strict=True):
        sizes = [len(rows(window)) for window in shares]
        assert max(sizes) - min(sizes) <= 1
        assert all(window.batches for window in shares)


class Pictured(Numbers):
    """Rows 3n to 3n + 2 are about one picture; row n has n extra tokens, so that ranks differ."""

    def __init__(self, size: int, folder: Path) -> None:
        super().__init__("p", size)
        self.folder = folder
        for number in range(-(-size // 3)):
            Image.new("RGB", (2, 2), (number, 0, 0)).save(folder / f"{number}.png")

    def picture_key(self, index: int) -> tuple[str, ...]:
        return (str(index // 3),)

    def sample(self, index: int) -> Sample:
        file = self.folder / f"{index // 3}.png"
        parts = (ImageReference(path=str(file), name=file.name), Text(str(index)))
        return Sample((Message("user", parts),), self.origin(index))


def encode_pictured(sample: Sample) -> Example:
    """Six tokens up to the end of the picture, then as many as the row's number, 1 of them learned."""
    index = int(sample.messages[0].text)
    kinds = torch.tensor([1, 4, 4, 4, 4, 2], dtype=torch.uint8)
    ids = torch.tensor([1, 9, 9, 9, 9, 3])
    own = torch.full((index + 1,), 10 + index)
    return Example(
        trunk=Branch(ids, torch.full((6,), IGNORE), kinds, torch.ones(6), (0,)),
        branches=(Branch(own, own, torch.full((index + 1,), 5, dtype=torch.uint8), torch.ones(index + 1)),),
        images=sample.images,
        image_sizes=((2, 2),),
        origin=sample.origin,
    )


def make_pictured(data: Pictured, rank: int = 0, world_size: int = 1, packed: bool = True, **config: Any) -> Loader:
    options: dict[str, Any] = {"global_batch": 6, "epochs": 3, "seed": 3, "prefetch": 0} | config
    mixture = Mixture([len(data)], [None], 3, lambda: picture_groups([data]), options.get("rows_per_picture", 3))
    return Loader([data], mixture, encode_pictured, PICTURES, LoaderConfig(**options), (rank, world_size), packed)


@pytest.mark.requirement("A-33")
@pytest.mark.parametrize("done", range(8))
def test_rows_about_one_picture_are_trees_the_same_after_a_resume(tmp_path: Path, done: int) -> None:
    data = Pictured(14, tmp_path)
    whole = list(make_pictured(data, micro_batch_tokens=60).windows())
    assert sorted(rows(window) for window in whole[:1]) != [[f"p:{line}" for line in range(1, 7)]]
    assert sorted(row for window in whole[:3] for row in rows(window)) == sorted(f"p:{n}" for n in range(1, 15))
    shared = [len(batch.tree_index) - int(batch.tree_index[-1]) - 1 for window in whole for batch in window.batches]
    assert sum(shared) > 14  # rows that stand behind another one of their picture
    loader = make_pictured(data, micro_batch_tokens=60)
    taken = list(itertools.islice(loader.windows(), done))
    resumed = make_pictured(data, micro_batch_tokens=60)
    resumed.load_state_dict(json.loads(json.dumps(loader.state_dict())))
    assert_equal([*taken, *resumed.windows()], whole)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_windows_of_trees(tmp_path: Path, world_size: int) -> None:
    data = Pictured(14, tmp_path)
    whole = [rows(window) for window in make_pictured(data, micro_batch=6).windows()]
    ranks = [list(make_pictured(data, r, world_size, micro_batch_tokens=30).windows()) for r in range(world_size)]
    assert [[row for window in shares for row in rows(window)] for shares in zip(*ranks, strict=True)] == whole
    # Token budgets make different numbers of micro-batches; the engine evens them out.
    assert len({len(window.batches) for shares in zip(*ranks, strict=True) for window in shares}) > 1


@pytest.mark.parametrize("packed", [True, False])
def test_micro_batches_keep_to_their_tokens(tmp_path: Path, packed: bool) -> None:
    loader = make_pictured(Pictured(14, tmp_path), packed=packed, micro_batch_tokens=45)
    for batch in (batch for window in loader.windows() for batch in window.batches):
        own = int((batch.lengths - batch.trunk_lengths).sum())
        firsts = {int(tree): int(trunk) for tree, trunk in zip(batch.tree_index, batch.trunk_lengths, strict=True)}
        computed = own + sum(firsts.values()) if packed else batch.input_ids.numel()
        assert computed <= 45 or batch.num_rows == 1


@pytest.mark.parametrize("wrong", [0, -3, True, "automatic", 2.5])
def test_a_micro_batch_is_a_number_of_samples_or_auto(wrong: object) -> None:
    with pytest.raises(ValidationError, match="neither a number of samples, 1 or more, nor `auto`") as caught:
        LoaderConfig(global_batch=1, epochs=1, micro_batch=wrong)  # type: ignore[arg-type]
    assert caught.value.error_count() == 1
    with pytest.raises(ValidationError, match="give one of them"):
        LoaderConfig(global_batch=1, epochs=1, micro_batch="auto", micro_batch_tokens=3)
    assert LoaderConfig(global_batch=1, epochs=1, micro_batch="auto").micro_batch == "auto"


@pytest.mark.parametrize("wrong", [0, -3, True, "many", 2.5])
def test_decoding_threads_are_a_number_or_auto(wrong: object) -> None:
    with pytest.raises(ValidationError, match="neither a number of threads, 1 or more, nor `auto`") as caught:
        LoaderConfig(global_batch=1, epochs=1, micro_batch=1, decode_threads=wrong)  # type: ignore[arg-type]
    assert caught.value.error_count() == 1


def test_how_rows_are_split_must_be_said_and_pictures_per_step_are_kept() -> None:
    with pytest.raises(ValidationError, match="give `micro_batch`"):
        LoaderConfig(global_batch=1, epochs=1)
    most = {size: LoaderConfig(global_batch=size, micro_batch=1, epochs=1).most_per_picture for size in (1, 16, 200)}
    assert most == {1: 1, 16: 2, 200: 8}
    assert LoaderConfig(global_batch=4, micro_batch=1, epochs=1, rows_per_picture=4).most_per_picture == 4


def test_a_checkpoint_with_another_grouping_is_refused(tmp_path: Path) -> None:
    data = Pictured(14, tmp_path)
    state = make_pictured(data, micro_batch=2, rows_per_picture=3).state_dict()
    with pytest.raises(CheckpointError, match="made with rows_per_picture 3, this run has 2"):
        make_pictured(data, micro_batch=2, rows_per_picture=2).load_state_dict(state)
    del state["rows_per_picture"]  # of a version that drew every row by itself
    with pytest.raises(CheckpointError, match="made with rows_per_picture 1"):
        make_pictured(data, micro_batch=2, rows_per_picture=3).load_state_dict(state)


def test_a_rank_without_rows_gets_a_batch_that_counts_nothing() -> None:
    last = list(make(DATA, rank=0, world_size=4, epochs=1).windows())[-1]  # 2 rows for 4 ranks
    assert rows(last) == []
    assert [batch.is_padding for batch in last.batches] == [True]
    assert last.batches[0].weights.sum() == 0
    assert last.batches[0].num_rows == 1


@pytest.mark.requirement("A-33")
@pytest.mark.parametrize("prefetch", [0, 1, 3])
@pytest.mark.parametrize("done", range(7))
def test_resuming_after_any_window_continues_with_the_same_windows(done: int, prefetch: int) -> None:
    whole = list(make(DATA).windows())
    loader = make(DATA, prefetch=prefetch)
    taken = list(itertools.islice(loader.windows(), done))
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = make(DATA, prefetch=prefetch)
    resumed.load_state_dict(state)
    assert_equal([*taken, *resumed.windows()], whole)


def test_the_ranks_may_change_on_resume_but_not_the_data() -> None:
    loader = make(DATA)
    next(loader.windows())
    state = loader.state_dict()
    halves = [make(DATA, rank, 2, micro_batch=1) for rank in range(2)]
    for half in halves:
        half.load_state_dict(state)
    joined = [
        [row for window in pair for row in rows(window)] for pair in zip(*(h.windows() for h in halves), strict=True)
    ]
    assert joined == [rows(window) for window in itertools.islice(make(DATA).windows(), 1, None)]
    for changed, name in (({"seed": 4}, "seed"), ({"global_batch": 5}, "global_batch")):
        with pytest.raises(CheckpointError, match=f"made with {name}"):
            make(DATA, **changed).load_state_dict(state)
    with pytest.raises(CheckpointError, match="made with rows"):
        make([Numbers("a", 6), Numbers("b", 5)]).load_state_dict(state)


def test_a_resume_with_changed_data_names_the_file(tmp_path: Path) -> None:
    def open_as_loader() -> Loader:
        return make([open_file(tmp_path, "captions", "rows.csv"), Numbers("b", 4)])  # type: ignore[list-item]

    picture = tmp_path / "1.png"
    Image.new("RGB", (4, 4)).save(picture)
    rows = tmp_path / "rows.csv"
    rows.write_text("image,caption\n1.png,one\n1.png,two\n")
    state = json.loads(json.dumps(open_as_loader().state_dict()))
    os.utime(rows, (1, 1))
    open_as_loader().load_state_dict(state)
    rows.write_text("image,caption\n1.png,one\n1.png,owt\n")
    with pytest.raises(CheckpointError, match=r"rows.csv: the data file has changed since the checkpoint"):
        open_as_loader().load_state_dict(state)


def test_skipping_looks_at_every_picture_of_a_tar(tmp_path: Path) -> None:
    good, path = io.BytesIO(), tmp_path / "pictures.bin"
    Image.effect_noise((64, 64), 50).save(good, "JPEG")
    cut = good.getvalue()[:900]
    path.write_bytes(good.getvalue() + cut)

    class Slices(Numbers):
        def sample(self, index: int) -> Sample:
            place = (0, len(good.getvalue())) if index % 2 == 0 else (len(good.getvalue()), len(cut))
            image = ImageReference(str(path), offset=place[0], size=place[1])
            return Sample((Message("user", (Text(str(index)), image)),), self.origin(index))

    (window,) = make([Slices("a", 4)], epochs=1, on_bad_row="skip").windows()
    assert sorted(rows(window)) == ["a:1", "a:3"]
    assert sorted(str(item) for item in window.skipped) == ["a:2", "a:4"]


def assert_equal(left: list[Window], right: list[Window]) -> None:
    assert [(w.index, w.epoch, w.skipped, len(w.batches)) for w in left] == [
        (w.index, w.epoch, w.skipped, len(w.batches)) for w in right
    ]
    for mine, other in zip(left, right, strict=True):
        for batch, expected in zip(mine.batches, other.batches, strict=True):
            assert batch.origins == expected.origins
            assert torch.equal(batch.input_ids, expected.input_ids)
            assert torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.weights, expected.weights)


# -- pictures ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path)
    return path


RED = torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 2, 2)


@pytest.mark.requirement("A-5", "A-32")
@pytest.mark.parametrize("prefetch", [0, 2])
def test_pixels_come_with_attach_and_text_rows_mix_in(picture: Path, prefetch: int) -> None:
    loader = make([Numbers("a", 6, picture=picture), Numbers("b", 4)], prefetch=prefetch, epochs=1)
    seen = 0
    for window in loader.windows():
        for batch in window.batches:
            assert batch.pixels is None
            attached = loader.attach(batch)
            if not batch.images:
                assert attached.pixels is None
                continue
            seen += sum(len(images) for images in batch.row_images)
            assert attached.pixels is not None
            assert attached.pixels["pixel_values"].shape == (len(batch.images), 3, 2, 2)
            assert torch.equal(attached.pixels["pixel_values"][0], RED)
    assert seen == 3


@pytest.mark.parametrize("prefetch", [0, 1])
def test_passes_copies_and_new_iterations_get_their_own_pixels(tmp_path: Path, prefetch: int) -> None:
    """Each row has a picture whose red value is its number: pixels must follow the rows through every kind of use."""

    class Reds(Numbers):
        def sample(self, index: int) -> Sample:
            path = tmp_path / f"{index}.png"
            Image.new("RGB", (2, 2), (index, 0, 0)).save(path)
            message = Message("user", (Text(str(index)), ImageReference(path=str(path))))
            return Sample((message,), self.origin(index))

    def check(loader: Loader, batch: Batch) -> None:
        pixels = loader.attach(batch).pixels
        assert pixels is not None
        reds = (pixels["pixel_values"][:, 0, 0, 0] * 255).round().long()
        assert reds.tolist() == (batch.input_ids[:, 1] - 10).tolist()

    loader = make([Reds("a", 9)], prefetch=prefetch, epochs=2)
    for window in itertools.islice(loader.windows(), 3):
        for _ in range(2):
            for batch in window.batches:
                check(loader, batch)
        check(loader, replace(window.batches[-1], is_padding=True))
        check(loader, window.batches[0])
    for window in loader.windows():  # a new iteration, while pixels of another window may still be in the making
        for batch in reversed(window.batches):
            check(loader, batch)


@pytest.mark.parametrize("decode", ["full", "draft"])
def test_a_picture_that_breaks_when_decoded_names_its_row(picture: Path, decode: str) -> None:
    loader = make([Numbers("a", 2, picture=picture)], epochs=1, decode=decode)
    window = next(loader.windows())
    picture.write_bytes(picture.read_bytes()[:40])
    with pytest.raises(DataError, match=r"a:1.*red.png"):
        loader.attach(window.batches[0])


class SizedPictures(FakePictures):
    """Remembers what it is given; may be called by several threads."""

    def __init__(self, size: int) -> None:
        super().__init__(NoTokenizer(), size)
        self.given: list[tuple[tuple[int, int], list[tuple[int, int]] | None]] = []

    def pixels(self, pictures: Any, sizes: Any = None) -> dict[str, torch.Tensor]:
        self.given += [(picture.size, sizes) for picture in pictures]
        return super().pixels(pictures, sizes)


@pytest.mark.parametrize(
    ("decode", "given"), [("full", ((64, 48), None)), ("draft", ((16, 12), [(64, 48)]))], ids=["full", "draft"]
)
def test_a_draft_is_decoded_as_small_as_the_model_allows(tmp_path: Path, decode: str, given: Any) -> None:
    path = tmp_path / "photo.jpg"
    Image.new("RGB", (64, 48), (255, 0, 0)).save(path)
    data, pictures = Numbers("a", 2, picture=path), SizedPictures(size=8)
    config = LoaderConfig(global_batch=2, micro_batch=2, epochs=1, decode=decode)  # type: ignore[arg-type]
    loader = Loader([data], Mixture([2], [None], 0), encode, pictures, config)
    (window,) = loader.windows()
    pixels = loader.attach(window.batches[0]).pixels
    assert pixels is not None and pixels["pixel_values"].shape == (1, 3, 8, 8)
    assert pictures.given == [given]


def test_the_number_of_threads_changes_no_pixel_and_may_be_chosen(tmp_path: Path) -> None:
    def run(threads: Any) -> list[torch.Tensor]:
        loader = make_pictured(Pictured(30, tmp_path), decode_threads=threads, micro_batch=6, epochs=2, prefetch=1)
        attached = [loader.attach(batch) for window in loader.windows() for batch in window.batches]
        return [batch.pixels["pixel_values"] for batch in attached if batch.pixels is not None]

    expected = run(1)
    assert len(expected) > 6
    for threads in (2, "auto"):
        assert all(torch.equal(a, b) for a, b in zip(expected, run(threads), strict=True))
    assert LoaderConfig(global_batch=1, micro_batch=1, epochs=1).decode_threads == "auto"
    for wrong in (0, "many"):
        with pytest.raises(ValidationError, match="decode_threads"):
            LoaderConfig(global_batch=1, micro_batch=1, epochs=1, decode_threads=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("uses_cuda", [True, False])
def test_pixels_are_pinned_where_cuda_is_used(picture: Path, uses_cuda: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[torch.Size] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.shape)
        return tensor

    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: uses_cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    loader = make([Numbers("a", 1, picture=picture)], epochs=1)
    loader.attach(next(loader.windows()).batches[0])
    assert pinned == ([torch.Size([1, 3, 2, 2])] if uses_cuda else [])


def test_the_next_pixels_are_made_while_a_batch_is_used(picture: Path) -> None:
    """So the time that the model computes is not waited for again: the share of time spent on data covers the rest."""
    pictures = SizedPictures(size=2)
    config = LoaderConfig(global_batch=2, micro_batch=1, epochs=1, seed=0, prefetch=1, rows_per_picture=1)
    data = Numbers("a", 4, picture=picture)
    loader = Loader([data], Mixture([4], [None], 0), encode, pictures, config)
    iterator = loader.windows()
    batches = [batch for window in itertools.islice(iterator, 2) for batch in window.batches if batch.images]
    assert len(batches) == 2
    end = time.monotonic() + 10
    while not pictures.given and time.monotonic() < end:
        time.sleep(0.01)  # nothing is attached meanwhile
    assert pictures.given
    iterator.close()  # type: ignore[attr-defined]


# -- bad rows ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_bad_row_stops_the_run(prefetch: int) -> None:
    loader = make([Numbers("a", 6, broken=(2,))], prefetch=prefetch)
    with pytest.raises(DataError, match="a:3: broken row"):
        list(loader.windows())


@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_skipped_row_is_listed_and_nothing_takes_its_place(tmp_path: Path, prefetch: int) -> None:
    report = tmp_path / "logs" / "skipped.jsonl"
    data = [Numbers("a", 6, broken=(2,)), Numbers("b", 4)]
    loader = make(data, prefetch=prefetch, epochs=1, on_bad_row="skip", report=report)
    windows = list(loader.windows())
    assert [item for window in windows for item in window.skipped] == [Origin("a", 3)]
    whole = [rows(window) for window in make(DATA, epochs=1).windows()]
    assert [rows(window) for window in windows] == [[row for row in window if row != "a:3"] for window in whole]
    assert [json.loads(line) for line in report.read_text().splitlines()] == [
        {"window": windows[index].index, "file": "a", "line": 3, "message": "broken row"}
        for index in range(3)
        if windows[index].skipped
    ]


def test_a_row_of_a_window_that_is_repeated_after_a_kill_is_listed_once(tmp_path: Path) -> None:
    def run(name: str) -> Loader:
        data = [Numbers("a", 6, broken=(0, 1, 2, 4))]
        return make(data, global_batch=2, micro_batch=1, epochs=2, on_bad_row="skip", report=tmp_path / name)

    list(run("whole").windows())
    killed = run("killed")
    windows = killed.windows()
    list(itertools.islice(windows, 2))
    state = killed.state_dict()
    list(itertools.islice(windows, 2))
    resumed = run("killed")
    resumed.load_state_dict(state)
    list(resumed.windows())
    assert (tmp_path / "killed").read_text() == (tmp_path / "whole").read_text() != ""


def test_skipping_finds_pictures_that_open_but_do_not_decode(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:900])
    assert read_size(ImageReference(path=str(path))) == (64, 64)
    loader = make([Numbers("a", 4, picture=path)], epochs=1, on_bad_row="skip")
    (window,) = loader.windows()
    assert sorted(rows(window)) == ["a:2", "a:4"]
    assert sorted(str(item) for item in window.skipped) == ["a:1", "a:3"]


def test_a_window_of_bad_rows_alone_still_has_a_batch() -> None:
    loader = make([Numbers("a", 2, broken=(0, 1))], epochs=1, on_bad_row="skip")
    (window,) = loader.windows()
    assert [batch.is_padding for batch in window.batches] == [True]
    assert len(window.skipped) == 2


# -- the background ----------------------------------------------------------------------------------------------------


def test_work_ahead_does_not_count_as_yielded() -> None:
    loader = make(DATA, prefetch=4)
    iterator = loader.windows()
    next(iterator)
    assert loader.state_dict()["windows"] == 1
    iterator.close()  # type: ignore[attr-defined]


def test_the_next_window_is_prepared_while_one_is_used() -> None:
    prepared = threading.Event()

    class Signal(Numbers):
        calls = 0

        def sample(self, index: int) -> Sample:
            self.calls += 1
            if self.calls == 8:
                prepared.set()
            return super().sample(index)

    iterator = make([Signal("a", 12)], prefetch=1).windows()
    next(iterator)
    assert prepared.wait(timeout=10)


def test_reports_change_nothing() -> None:
    loader = make(DATA)
    loader.report({"loss": 1.0})
    assert loader.state_dict()["windows"] == 0


class Known:
    """A store that knows the pictures it is told."""

    def __init__(self, *keys: str) -> None:
        self.keys, self.asked = set(keys), []  # type: ignore[var-annotated]

    def get(self, key: str) -> dict[str, torch.Tensor] | None:
        self.asked.append(key)
        return {"states": torch.ones(1, 2, 3)} if key in self.keys else None

    def put(self, key: str, tensors: Any) -> None:
        raise AssertionError("the loader only asks")


@pytest.mark.parametrize("prefetch", [0, 2])
def test_pictures_that_a_store_knows_are_not_decoded(tmp_path: Path, prefetch: int) -> None:
    data = Pictured(9, tmp_path)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for number, file in enumerate(files):
        Image.new("RGB", (2, 2), (number, 0, 0)).save(file)
    keys = [picture_key(ImageReference(path=str(file))) for file in files]
    store = Known(keys[1])
    options = LoaderConfig(global_batch=9, micro_batch=9, epochs=1, prefetch=prefetch)
    loader = Loader([data], Mixture([9], [None], 3), encode_pictured, PICTURES, options, store=store)
    files[1].write_bytes(files[1].read_bytes())  # the same bytes, so the same key
    (window,) = loader.windows()
    batch = loader.attach(window.batches[0])
    assert batch.pixels is None and batch.picture_inputs is not None and len(batch.images) == 3
    for reference, item in zip(batch.images, batch.picture_inputs, strict=True):
        number = int(Path(reference.path or "").stem)
        assert item.key == keys[number]
        assert (item.features is not None, item.pixels is None) == (number == 1, number == 1)
        if item.pixels is not None:
            assert item.pixels["pixel_values"].shape == (1, 3, 2, 2)
    assert sorted(store.asked) == sorted(keys)


def test_reduced_pictures_have_features_of_their_own(tmp_path: Path) -> None:
    store = Known()
    options = LoaderConfig(global_batch=3, micro_batch=3, epochs=1, decode="draft")
    loader = Loader([Pictured(3, tmp_path)], Mixture([3], [None], 3), encode_pictured, PICTURES, options, store=store)
    (window,) = loader.windows()
    loader.attach(window.batches[0])
    assert store.asked == [picture_key(ImageReference(path=str(tmp_path / "0.png"))) + " draft"]
