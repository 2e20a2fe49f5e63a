"""The vision side of a scorer: from the pictures of a batch to the features that stand for their tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from triptych.core.errors import ModelError, Problem
from triptych.core.protocols import FeatureStore, PictureProcessor
from triptych.core.types import Batch, PictureInput
from triptych.models.components import INNER_CONNECTOR_NAMES, Components, component_parameters
from triptych.models.pictures import PICTURE_TILES, model_inputs

GRID = "image_grid_thw"
"""[3] patches of a picture in time, height and width, for families whose pixels name their grids."""
_STATES = "states"
"""[tiles, T, D]: what goes into the connector."""
_POOLED = "pooled"
"""[tokens, D]: what comes out of a connector inside the tower."""
_DEEPSTACK = "deepstack"


@dataclass(frozen=True)
class Features:
    """Vision features of the N different pictures of a batch."""

    pooled: tuple[Tensor, ...]
    """For each picture [tokens of the picture, D]."""
    deepstack: tuple[tuple[Tensor, ...], ...] = ()
    """For each level that also enters deeper layers (Qwen3-VL), for each picture, [tokens, D]; usually empty."""
    grids: Tensor | None = None
    """[N, 3] int64, see `GRID`; None for other families."""


class VisionSide:
    """Runs tower and connector, or the connector alone where a picture's tower states are known.

    States are kept for frozen towers only. They are computed picture by picture, so that they do not depend on what
    else is in the batch, and a run with a full store equals one that fills it to the bit.
    """

    def __init__(
        self,
        hf: PreTrainedModel,
        components: Components,
        pictures: PictureProcessor | None,
        store: FeatureStore | None = None,
    ) -> None:
        """
        Args:
            pictures: makes the dummy picture of a micro-batch without pictures; needed when vision or connector train.
            store: keeps the tower's states of pictures whose batches come with `picture_inputs`.
        """
        self._hf = hf
        self._components = components
        self._pictures = pictures
        self.store = store

    def features(self, batch: Batch) -> Features | None:
        """Features of the batch's pictures in order; None without pictures.

        Raises:
            ModelError: pixels are not attached, or their number differs from that of the pictures.
        """
        if not any(batch.row_images):
            return None
        if batch.picture_inputs is not None:
            features = self._from_states([self.states(item) for item in batch.picture_inputs])
        elif batch.pixels is not None:
            features = self._from_pixels(batch.pixels)
        else:
            raise ModelError(
                Problem(
                    f"a batch of {len(batch.images)} pictures has no pixels", remedy="call the source's attach first"
                )
            )
        if len(features.pooled) != len(batch.images):
            message = f"the model made features of {len(features.pooled)} pictures, the batch has {len(batch.images)}"
            raise ModelError(Problem(message))
        return features

    def dummy(self, batch: Batch) -> Tensor | None:
        """0-d zero that depends on every vision and connector parameter in use, where a batch without pictures must
        run the vision side all the same.

        Data-parallel ranks must use the same parameters: for gradients when any of them trains, and for the gathering
        of sharded parameters in every forward pass.

        Raises:
            ModelError: it is needed, and there is no picture processor to make the picture.
        """
        parameters = self._parameters("vision", "connector")
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in parameters)
        if any(batch.row_images) or not (trains or any(isinstance(item, DTensor) for item in parameters)):
            return None
        if self._pictures is None:
            raise ModelError(
                Problem(
                    "a micro-batch has no pictures while vision or connector train, so they would get no gradient",
                    remedy="give the scorer `pictures`, the model's picture processor",
                )
            )
        # Grey, since pictures of exact zeros are taken for padding by some families.
        pixels = self._pictures.pixels([Image.new("RGB", (32, 32), (96, 96, 96))])
        features = self._from_pixels({name: value.to(batch.input_ids.device) for name, value in pixels.items()})
        parts = [*features.pooled, *(part for level in features.deepstack for part in level)]
        return torch.stack([part.float().sum() for part in parts]).sum() * 0.0

    def _from_pixels(self, pixels: Mapping[str, Tensor]) -> Features:
        """Features of the pictures in `pixels`, once each; without a graph where nothing before them trains."""
        trains = any(parameter.requires_grad for parameter in self._parameters("vision", "connector"))
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            outputs = self._hf.base_model.get_image_features(**model_inputs(pixels), return_dict=True)
        pooled = outputs.pooler_output
        if isinstance(pooled, Tensor):  # [tiles, tokens of a tile, D]
            tiles = pixels.get(PICTURE_TILES)
            counts = [1] * len(pooled) if tiles is None else tiles.tolist()
            pooled = [part.flatten(0, 1) for part in pooled.split(counts)]
        deepstack = tuple(tuple(level) for level in outputs.get("deepstack_features") or ())
        return Features(tuple(pooled), deepstack, pixels.get(GRID))

    @torch.no_grad()
    def states(self, item: PictureInput) -> Mapping[str, Tensor]:
        """What the store keeps of a picture; computed and put there where it is not known."""
        if item.features is not None:
            return item.features
        assert item.pixels is not None
        inputs: list[Tensor] = []
        connector = self._outer_connector()
        watched = nn.Identity() if connector is None else connector
        hook = watched.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        kind = next(iter(item.pixels.values())).device.type
        dtype, is_on = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        try:
            # Casts of the connector's weights that are cached here would carry no gradients later.
            with torch.autocast(kind, dtype, enabled=is_on, cache_enabled=False):
                features = self._from_pixels(item.pixels)
        finally:
            hook.remove()
        states = {_POOLED: features.pooled[0]} if connector is None else {_STATES: inputs[0]}
        states |= {f"{_DEEPSTACK}.{number}": level[0] for number, level in enumerate(features.deepstack)}
        if features.grids is not None:
            states[GRID] = features.grids[0]
        if self.store is not None:
            self.store.put(item.key, states)
        return states

    def _from_states(self, states: Sequence[Mapping[str, Tensor]]) -> Features:
        """Features of pictures whose tower states are known; the connector runs here, with its gradients."""
        grids = torch.stack([item[GRID] for item in states]) if GRID in states[0] else None
        connector = self._outer_connector()
        if connector is None:
            levels = sorted(name for name in states[0] if name.startswith(_DEEPSTACK))
            deepstack = tuple(tuple(item[name] for item in states) for name in levels)
            return Features(tuple(item[_POOLED] for item in states), deepstack, grids)
        tiles = [len(item[_STATES]) for item in states]
        trains = any(parameter.requires_grad for parameter in self._parameters("connector"))
        with torch.set_grad_enabled(trains and torch.is_grad_enabled()):
            pooled = connector(torch.cat([item[_STATES] for item in states]))
        return Features(tuple(part.flatten(0, 1) for part in pooled.split(tiles)), (), grids)

    def _outer_connector(self) -> nn.Module | None:
        """The connector behind the tower; None where it is inside (Qwen)."""
        (path, *others) = self._components.modules["connector"]
        return None if others or path.split(".")[-1] in INNER_CONNECTOR_NAMES else self._hf.get_submodule(path)

    def _parameters(self, *components: str) -> list[nn.Parameter]:
        return [
            parameter
            for component in components
            for parameter in component_parameters(self._components, component, self._hf).values()
        ]


def store_obstacle(hf: PreTrainedModel, components: Components) -> str | None:
    """Why the tower states of this model's pictures cannot be kept; None where they can."""
    trained = {
        component
        for component in ("vision", "connector")
        if any(item.requires_grad for item in component_parameters(components, component, hf).values())
    }
    if "vision" in trained:
        return "the vision tower trains"
    is_inside = any(path.split(".")[-1] in INNER_CONNECTOR_NAMES for path in components.modules["connector"])
    if is_inside and "connector" in trained:
        return "the connector is a part of the vision tower, and trains"
    return None


def tower_state(hf: PreTrainedModel, components: Components) -> dict[str, Tensor]:
    """Weights and buffers that decide a picture's states: those of the tower, and of a connector inside it."""
    inner = [path for path in components.modules["connector"] if path.split(".")[-1] in INNER_CONNECTOR_NAMES]
    paths = tuple(f"{path}." for path in (*components.modules["vision"], *inner))
    return {name: value for name, value in hf.state_dict().items() if f"{name}.".startswith(paths)}
