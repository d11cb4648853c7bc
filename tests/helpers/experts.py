"""Small generators with experts, one of each gate."""

from __future__ import annotations

from typing import Any

from generation.transformer.config import TransformerConfig
from generation.transformer.experts import (
    ExpertOptions,
)
from generation.transformer.model import Transformer
from tests.helpers.generators import SIZES, make_model

CHOICES: dict[str, dict[str, Any]] = {
    "switch": {"count": 4, "gate": "switch"},
    "gshard": {"count": 4, "gate": "gshard", "every": 2},
    "bias": {"count": 4, "gate": "bias", "shared": 1},
}


def make_experts(**options: Any) -> Transformer:
    return make_model(TransformerConfig.modern(**SIZES, experts=ExpertOptions(**options)))
