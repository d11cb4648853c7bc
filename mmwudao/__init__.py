"""The front door: `from mmwudao import load; load("emoji").generate("红心", n=4, seed=7)`."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from generation.drawing.engines import Kind
    from mmwudao.pipeline import Pipeline

__version__ = "0.1.0"
__all__ = ["__version__", "load"]


def load(
    model: str | Path = "emoji",
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | Path | None = None,
    engine: Kind = "auto",
) -> Pipeline:
    """A model ready to draw; see `mmwudao.pipeline.load`. PyTorch is imported only here, not with the package."""
    from mmwudao.pipeline import load as load_pipeline

    return load_pipeline(model, device, dtype, adapter, engine)
