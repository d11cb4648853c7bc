"""The front door: `from mmwudao import load; load("emoji").generate("红心", n=4, seed=7)`."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmwudao.version import __version__

if TYPE_CHECKING:
    from mmwudao.pipeline import load

__all__ = ["__version__", "load"]

PACKAGES = ("data", "vqvae", "generation", "retrieval")  # ours, beside this one


def _check_packages(packages: tuple[str, ...] = PACKAGES) -> None:
    """`ImportError` if Python finds another module by the name of one of our packages, such as the user's `data.py`."""
    root = Path(__file__).resolve().parents[1]
    for name in packages:
        module = sys.modules.get(name)
        spec = module.__spec__ if module is not None else importlib.util.find_spec(name)
        found = spec.origin if spec is not None else None
        if found is None or Path(found).resolve() != root / name / "__init__.py":
            raise ImportError(
                f"mmwudao needs its own package {name!r}, and Python finds {found or 'another'} first: "
                "rename that file or folder, or run from another folder"
            )


def __getattr__(name: str) -> Any:
    """`load`, with which PyTorch is imported: only when it is asked for."""
    if name == "load":
        from mmwudao.pipeline import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_check_packages()
