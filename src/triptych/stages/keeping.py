"""Whether a run keeps what its frozen vision tower makes of pictures, and where."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import PIL
import torch
import transformers
from rich.console import Console

from triptych.core.distributed import call_on_main
from triptych.core.errors import DataError, ModelError
from triptych.core.types import ImageReference, PictureInput
from triptych.data.images import decode, picture_key
from triptych.engine.parallel import Runtime
from triptych.models.features import FeatureCache, tower_key
from triptych.models.vision import VisionSide, store_obstacle, tower_state
from triptych.stages.build import Built
from triptych.stages.locate import at_key
from triptych.stages.recipe import StageRecipe, VlmRecipe
from triptych.stages.state_files import read_state, write_state

DECISION = "features.json"
"""In the folder of the run: whether states are kept. A resumed run decides as the first did: pictures go through the
tower one by one where states are kept, in batches where they are not, which differ in rounding."""
FORMAT = 2
"""Of what is kept; another one makes all that was kept unknown."""
PROBED = 3
"""Pictures that the probe computes and reads."""


def open_store(
    recipe: StageRecipe, built: Built, runtime: Runtime, console: Console, *, is_new: bool
) -> FeatureCache | None:
    """The store of this run, put in place in the scorer's vision side; None where states are not kept.

    Args:
        is_new: the run does not resume from a checkpoint.

    Raises:
        ModelError: `features.keep` is `always` or the run began with kept states, and they cannot be kept.
        CheckpointError: the file with what was decided is damaged.
    """
    if not isinstance(recipe, VlmRecipe) or built.vision is None:
        return None
    output = Path(recipe.output)
    is_sharded = runtime.strategy == "fsdp"
    obstacle = "the weights are sharded" if is_sharded else store_obstacle(built.scorer.hf, built.components)
    if obstacle is not None and recipe.features.keep == "always":
        raise _refusal(obstacle, "or set `features.keep` to `auto`")
    vision = built.vision

    def decide() -> tuple[bool, str]:
        keeps, reason = _decide(recipe, built, vision, runtime, obstacle) if is_new else _recall(output / DECISION)
        if keeps and obstacle is not None:
            raise _refusal(obstacle, "or resume as the run began")
        write_state(output / DECISION, {"keeps": keeps, "reason": reason})
        return keeps, reason

    keeps, reason = call_on_main(decide)
    store = _open(recipe, built, runtime) if keeps else None
    console.print(f"features of pictures: {'kept' if keeps else 'not kept'}, {reason}", highlight=False)
    if store is None:
        return None
    vision.store = store
    return store


def _recall(file: Path) -> tuple[bool, str]:
    decision = read_state(file, ("keeps", "reason"))
    if decision is None:
        return False, "as before this run was interrupted"  # by a version that kept nothing
    return bool(decision["keeps"]), str(decision["reason"])


def _refusal(obstacle: str, otherwise: str) -> ModelError:
    remedy = f"freeze the tower (and a connector inside it), do not shard it, {otherwise}"
    return ModelError(f"the features of pictures cannot be kept: {obstacle}", key="features.keep", remedy=remedy)


def _decide(
    recipe: VlmRecipe, built: Built, vision: VisionSide, runtime: Runtime, obstacle: str | None
) -> tuple[bool, str]:
    config = recipe.features
    if config.keep != "auto":
        return config.keep == "always", "as the recipe says"
    if obstacle is not None:
        return False, obstacle
    shown = _times_shown(recipe, built)
    store = _open(recipe, built, runtime)
    if shown < 2 and not len(store):
        return False, f"a picture goes through the tower {shown:.1f} times on average, which is hardly twice"
    return _probe(built, vision, runtime)


def _times_shown(recipe: VlmRecipe, built: Built) -> float:
    """How often a picture would go through the tower in this run, on average; rows that follow each other share it."""
    rows: Counter[object] = Counter()
    for dataset in built.datasets:
        rows.update(key for index in range(len(dataset)) if (key := dataset.picture_key(index)) is not None)
    if not rows:
        return 0.0
    together = recipe.loader.most_per_picture
    in_a_pass = sum(-(-number // together) for number in rows.values()) / len(rows)
    passes = built.passes_before + recipe.loader.passes(sum(len(dataset) for dataset in built.datasets))
    return passes * in_a_pass


def _probe(built: Built, vision: VisionSide, runtime: Runtime) -> tuple[bool, str]:
    """Compare computing the states of a few pictures with reading them."""
    pictures = _first_pictures(built)
    if not pictures:
        return False, "there are no pictures"
    built.scorer.to(runtime.device)
    computing: list[float] = []
    inputs: list[PictureInput] = []
    with TemporaryDirectory() as folder, runtime.autocast():
        vision.store = store = FeatureCache(Path(folder))
        for picture in (pictures[0], *pictures):  # the first one warms up
            start = time.perf_counter()
            pixels = built.pictures.pixels([decode(picture)])
            inputs.append(PictureInput(f"{len(inputs)} {picture_key(picture)}", pixels).to(runtime.device))
            vision.states(inputs[-1])
            computing.append(time.perf_counter() - start)
        vision.store = None
        store.flush()
        again, reading = FeatureCache(Path(folder)), []
        for item in inputs:
            start = time.perf_counter()
            states = again.get(item.key)
            assert states is not None
            for value in states.values():
                value.to(runtime.device, copy=True)
            reading.append(time.perf_counter() - start)
    compute, read = min(computing[1:]), min(reading[1:])
    words = f"a picture takes {1000 * compute:.1f} ms to compute and {1000 * read:.1f} ms to read"
    return read < compute, words


def _first_pictures(built: Built) -> list[ImageReference]:
    """Some that can be decoded; what is wrong with others is training's business."""
    found: dict[object, ImageReference] = {}
    for dataset in built.datasets:
        for index in range(min(len(dataset), PROBED)):
            with suppress(DataError):
                images = built.encode(dataset.sample(index)).images
                for image in images:
                    decode(image)
                found |= {image.identity: image for image in images}
    return list(found.values())[:PROBED]


def _open(recipe: VlmRecipe, built: Built, runtime: Runtime) -> FeatureCache:
    settings = {
        "pictures": built.picture_settings,
        "precision": runtime.precision,
        "device": runtime.device.type,
        "libraries": [FORMAT, torch.__version__, transformers.__version__, PIL.__version__],
    }
    key = tower_key(tower_state(built.scorer.hf, built.components), settings)
    config = recipe.features
    folder = Path(recipe.output) / "features" if config.folder is None else config.folder
    with at_key("features.folder"):
        return FeatureCache(folder / key, limit_bytes=round(config.limit_gib * 2**30))
