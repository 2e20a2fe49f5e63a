"""Log-probabilities of the reference model, computed once for every row before training and kept on disk.

The model as it is before training is the reference, so no second copy of its weights is held, and no step pays for a
second forward pass. What is kept belongs to the tokens and pictures of a row, not to its place in a file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import PIL
import torch
import transformers
from rich.console import Console
from rich.progress import track
from torch import Tensor

from triptych.core.distributed import barrier, call_on_main, is_main, rank, world_size
from triptych.core.errors import ModelError
from triptych.core.protocols import PictureProcessor
from triptych.core.types import IGNORE, Batch, Example, ImageReference, Sample
from triptych.data.formats import Dataset
from triptych.data.grouping import picture_groups
from triptych.data.images import decode, picture_key
from triptych.data.loader import Loader, LoaderConfig
from triptych.data.mixture import Mixture
from triptych.data.tokenize import at_row
from triptych.engine.parallel import Runtime
from triptych.engine.trainer import next_window
from triptych.models.features import FeatureCache, tower_key
from triptych.models.reference import REFERENCE_LOGPROBS, reference_logprobs
from triptych.models.vlm import VlmScorer

FORMAT = 2
"""Of what is kept; another one makes all that was kept unknown."""
TOGETHER = 4
"""Examples in a forward pass, whatever training does: its micro-batches must not change the numbers' roundings."""

Encode = Callable[[Sample], Example]


@dataclass
class PrecomputedReference:
    """Adds the kept numbers to examples as they are encoded; before `prepare` it adds nothing."""

    encode_plain: Encode
    """Sample -> example without the numbers."""
    pictures: PictureProcessor
    settings: Mapping[str, Any]
    """What tokens and numbers depend on beside weights and rows: image processor, template, longest row."""
    rows: str = "training rows"
    """How messages name the rows."""
    _store: FeatureCache | None = field(default=None, init=False)
    _home: Path | None = field(default=None, init=False)

    def encode(self, sample: Sample) -> Example:
        """The example with `token_values["reference_logprobs"]` in every branch.

        Raises:
            DataError: the row cannot be used; its pictures are decoded where its numbers are not known.
            ModelError: its numbers were not computed: the row changed since training began.
        """
        example = self.encode_plain(sample)
        if self._store is None:
            return example
        with at_row(example.origin):
            key = _example_key(example)
        known = self._store.get(key)
        if known is None:
            _check_pictures(example)
            message = f"{example.origin}: the reference's log-probabilities of this row are not known"
            raise ModelError(
                message, remedy=f"it changed since they were computed: delete {self._home} and start again"
            )
        branches = tuple(
            replace(branch, token_values={**branch.token_values, REFERENCE_LOGPROBS: known[str(number)]})
            for number, branch in enumerate(example.branches)
        )
        return replace(example, branches=branches)

    def prepare(
        self,
        scorer: VlmScorer,
        datasets: Sequence[Dataset],
        config: LoaderConfig,
        folder: Path,
        runtime: Runtime,
        console: Console,
    ) -> None:
        """Compute what is not known yet; every rank does its share, and knows all afterwards.

        Args:
            scorer: as it is before training, not wrapped, on its device.
            datasets: all rows that will be encoded.
            config: how rows are drawn in training, their pictures decoded, where these are used, and what is done about
                rows that cannot be used.
            folder: where the numbers are kept, each model in a folder of its own.

        Raises:
            DataError: a row cannot be used and `on_bad_row` is `stop`; on every rank.
        """
        settings = {
            **self.settings,
            "decode": config.decode,
            "precision": runtime.precision,
            "device": runtime.device.type,
            "libraries": [FORMAT, torch.__version__, transformers.__version__, PIL.__version__],
        }
        home = folder / tower_key(scorer.state_dict(), settings)
        self._home = home
        store = FeatureCache(home)
        finished = home / f"{self._data_key(datasets)}.done"
        # All do the same, whatever each sees.
        if not call_on_main(partial(_is_whole, finished, store)):
            try:
                for batch in self._batches(store, scorer, datasets, config, runtime, console):
                    with runtime.autocast():
                        logprobs = reference_logprobs(scorer, batch)
                    _put_rows(store, batch, logprobs)
            finally:  # what an interruption leaves is known to the next start
                store.flush()
            barrier()
            if is_main():
                finished.write_text("\n".join(FeatureCache(home).files), encoding="utf-8")
        self._store = FeatureCache(home)

    def _batches(
        self,
        store: FeatureCache,
        scorer: VlmScorer,
        datasets: Sequence[Dataset],
        config: LoaderConfig,
        runtime: Runtime,
        console: Console,
    ) -> Iterable[Batch]:
        """This rank's batches, on the device, but those whose rows are all known already."""
        once = {"steps": None, "epochs": 1.0, "report": None}  # training reports the rows that are skipped
        size = {"micro_batch": TOGETHER, "micro_batch_tokens": None}
        options = config.model_copy(update={**once, **size})
        sizes, none = [len(dataset) for dataset in datasets], [None] * len(datasets)
        order = Mixture(sizes, none, options.seed, lambda: picture_groups(datasets), options.most_per_picture)
        share, store_of_features = (rank(), world_size()), scorer.vision.store
        loader = Loader(
            datasets, order, self.encode_plain, self.pictures, options, share, scorer.packs_trees, store_of_features
        )
        title = f"log-probabilities of the reference, {self.rows}"
        windows, ahead = iter(loader.windows()), range(loader.total_windows)
        for _ in track(ahead, title, console=console, disable=not is_main()):
            window = next_window(windows, runtime)
            assert window is not None
            for batch in window.batches:
                if batch.is_padding or all(key in store for key in _batch_keys(batch)):
                    continue
                yield loader.attach(batch).to(runtime.device)

    def _data_key(self, datasets: Sequence[Dataset]) -> str:
        facts = [dataset.fingerprint() for dataset in datasets]
        text = json.dumps([facts, self.settings, world_size()], sort_keys=True, default=str)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _is_whole(finished: Path, store: FeatureCache) -> bool:
    """Whether all was computed, and none of the files that it lists was lost since."""
    files = finished.read_text(encoding="utf-8").split() if finished.is_file() else []
    return bool(files) and set(files) <= set(store.files)  # earlier versions listed none


def _check_pictures(example: Example) -> None:
    """Raises DataError where a picture of the example cannot be decoded, which is why its numbers are not known."""
    with at_row(example.origin):
        for reference in example.images:
            decode(reference)


def _put_rows(store: FeatureCache, batch: Batch, logprobs: Tensor) -> None:
    """Keep the numbers of a batch, example by example."""
    rows = logprobs.float().cpu().split(batch.supervised.sum(1).tolist())
    examples = batch.example_index.tolist()
    found: dict[int, dict[str, Tensor]] = {}
    for row, example in enumerate(examples):
        found.setdefault(example, {})[str(len(found.get(example, {})))] = rows[row]
    for key, values in zip(_batch_keys(batch), found.values(), strict=True):
        store.put(key, values)


def _batch_keys(batch: Batch) -> list[str]:
    """For each example."""
    rows: dict[int, list[tuple[Tensor, Tensor, list[ImageReference]]]] = {}
    for row, example in enumerate(batch.example_index.tolist()):
        end = int(batch.lengths[row])
        shown = [batch.images[image] for image in batch.row_images[row]]
        rows.setdefault(example, []).append((batch.input_ids[row, :end], batch.labels[row, :end], shown))
    return [_key(item) for item in rows.values()]


def _example_key(example: Example) -> str:
    trunk = example.trunk
    rows = []
    for branch in example.branches:
        labels = torch.cat([trunk.labels, branch.labels]).clone()
        labels[0] = IGNORE  # nothing predicts the first token
        shown = [example.images[image] for image in (*trunk.images, *branch.images)]
        rows.append((torch.cat([trunk.input_ids, branch.input_ids]), labels, shown))
    return _key(rows)


def _key(rows: Iterable[tuple[Tensor, Tensor, Sequence[ImageReference]]]) -> str:
    """Digest of the tokens, labels and pictures of an example's rows."""
    digest = hashlib.blake2b(digest_size=16)
    for ids, labels, shown in rows:
        digest.update(f"{len(ids)} {' '.join(map(picture_key, shown))} ".encode())
        digest.update(torch.stack([ids, labels]).numpy().tobytes())
    return digest.hexdigest()
