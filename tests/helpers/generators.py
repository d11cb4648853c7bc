"""Small generators with random weights, and what they are asked to draw."""

from __future__ import annotations

import torch

from generation.transformer.config import TransformerConfig
from generation.transformer.model import Transformer

SIZES = {
    "num_image_codes": 32,
    "num_text_pieces": 50,
    "width": 64,
    "depth": 2,
    "heads": 4,
    "max_text": 6,
    "grid": (4, 4),
}
PRESETS = {
    "cogview": TransformerConfig.cogview(**SIZES),
    "cogview-relaxed": TransformerConfig.cogview(**SIZES, pb_relax=32.0),
    "modern": TransformerConfig.modern(**SIZES),
    "learned-2d": TransformerConfig.modern(**SIZES, position="learned_2d", tie_embeddings=False),
}

GRID = (4, 4)
PROMPTS = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3], [30], [7, 7], [8], [9, 1], [2], [3, 3, 3], [49]]
SEEDS = list(range(100, 112))


def make_model(config: TransformerConfig, seed: int = 0) -> Transformer:
    """A random model whose logits differ clearly: untrained ones are almost flat."""
    torch.manual_seed(seed)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model
