"""Connectors carry vision features into the language model's embedding space; one file per kind."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from triptych.models.connectors.linear import FixedIdentity, LinearConnectorConfig, restore_linear
from triptych.models.connectors.mlp import MlpConnectorConfig

CONNECTORS = {"linear": LinearConnectorConfig, "mlp": MlpConnectorConfig}
"""`kind` -> configuration, which also knows how `LlavaForConditionalGeneration` holds it."""

ConnectorConfig = Annotated[LinearConnectorConfig | MlpConnectorConfig, Field(discriminator="kind")]

__all__ = [
    "CONNECTORS",
    "ConnectorConfig",
    "FixedIdentity",
    "LinearConnectorConfig",
    "MlpConnectorConfig",
    "restore_linear",
]
