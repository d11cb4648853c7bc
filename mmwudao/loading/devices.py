"""Where a model runs, in which number format, and with how many threads."""

from __future__ import annotations

import os

import torch

from data.batches import cores
from data.host_memory import parse_bytes

MAX_THREADS = 16  # the matrices of one picture are small: more threads only wait for each other
DEVICES = ("auto", "cpu", "cuda", "mps")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(device: str) -> torch.device:
    """The torch device of a name in `DEVICES`. Raises `ValueError` for another name or one this machine lacks."""
    if device not in DEVICES:
        raise ValueError(f"unknown device {device!r}; choose from {', '.join(DEVICES)}")
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        device = next(name for name, here in present.items() if here)
    if not present[device]:
        raise ValueError(f"PyTorch finds no {device} device on this machine: use --device auto or cpu")
    return torch.device(device)


def choose_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The torch dtype of a name in `DTYPES`; "auto" is bfloat16 where the hardware multiplies it natively.

    Raises `ValueError` for another name.
    """
    if dtype in DTYPES:
        return DTYPES[dtype]
    if dtype != "auto":
        raise ValueError(f"unknown dtype {dtype!r}; choose from auto, {', '.join(DTYPES)} or int8")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = device.type == "cpu" and cpu_multiplies_bfloat16()
    return torch.bfloat16 if native else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether the CPU has AMX or AVX512-BF16; elsewhere PyTorch emulates bfloat16, which is slower than float32."""
    # torch.ops.mkldnn._is_mkldnn_bf16_supported() will not do: it is true for plain AVX512 too
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def choose_threads() -> None:
    """Give PyTorch as many threads as this process may use cores, unless the user has set OMP_NUM_THREADS."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores(), MAX_THREADS))


def choose_expert_memory(given: str | None, device: torch.device) -> int | None:
    """The bytes that a text such as "256MB" gives to a generator's experts; None without it: all are in memory.

    Raises `ValueError` for another text, and for a device that is no CPU.
    """
    if given is None:
        return None
    if device.type != "cpu":
        raise ValueError("--expert-memory is for CPUs: add --device cpu, or leave it out")
    return parse_bytes(given)
