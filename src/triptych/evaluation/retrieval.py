"""Image-text retrieval with a dual encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from triptych.core.distributed import all_gather_rows, all_reduce_max
from triptych.core.protocols import BatchSource
from triptych.core.types import Scores
from triptych.evaluation.metrics import recall_at_k
from triptych.models.modes import evaluation_mode


class Retrieval:
    """Evaluator: recall@k from image to text and from text to image over the whole source."""

    def __init__(
        self, scorer: nn.Module, source: BatchSource, ks: Sequence[int] = (1, 5, 10), device: torch.device | str = "cpu"
    ) -> None:
        self.scorer = scorer
        self.source = source
        self.ks = tuple(ks)
        self.device = torch.device(device)
        self._start = source.state_dict()

    def run(self) -> Mapping[str, float]:
        """`recall_i2t@k` and `recall_t2i@k` for each k that is not larger than the number of rows."""
        self.source.load_state_dict(self._start)
        images: list[Tensor] = []
        texts: list[Tensor] = []
        keys: list[Tensor] = []
        with evaluation_mode(self.scorer), torch.no_grad():
            for window in self.source.windows():
                count = int(all_reduce_max(torch.tensor(len(window.batches), device=self.device)))
                for index in range(count):
                    light = window.batches[min(index, len(window.batches) - 1)]
                    batch = self.source.attach(light).to(self.device)
                    scores: Scores = self.scorer(batch)
                    assert scores.image_embeddings is not None and scores.text_embeddings is not None
                    kept = 0 if light.is_padding or index >= len(window.batches) else batch.num_rows
                    images.append(scores.image_embeddings[:kept].float())
                    texts.append(scores.text_embeddings[:kept].float())
                    keys.append(batch.text_keys[:kept])
        image, _ = all_gather_rows(torch.cat(images))
        text, _ = all_gather_rows(torch.cat(texts))
        key, _ = all_gather_rows(torch.cat(keys))
        results: dict[str, float] = {}
        for k in self.ks:
            if k <= len(key):
                results[f"recall_i2t@{k}"] = recall_at_k(image, text, key, key, k)
                results[f"recall_t2i@{k}"] = recall_at_k(text, image, key, key, k)
        return results
