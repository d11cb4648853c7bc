"""The settings of an embedding run. The command line reads help and defaults here, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import check_options, option
from data.sample import DataError

VECTOR_DTYPES = ("float32", "float16")


@dataclass(frozen=True)
class EmbedSettings:
    """Which samples are embedded, and how. Raises `ValueError` for values that are not allowed."""

    split: str | None = option(None, "Embed only the shards of this split; all by default.")
    images: bool = option(True, "Embed the pictures.")
    texts: bool = option(True, "Embed the captions.")
    dtype: str = option("float32", "Store the vectors as float32 or float16.")
    batch_size: int = option(64, "Encode this many pictures in one forward pass.", least=1)
    workers: int | None = option(None, "Process this many batches in parallel; one a core by default.", least=1)

    def __post_init__(self) -> None:
        if self.dtype not in VECTOR_DTYPES:
            raise DataError(f"vectors are stored as {' or '.join(VECTOR_DTYPES)}, not {self.dtype!r}")
        if not (self.images or self.texts):
            raise DataError("nothing to embed: ask for images, texts or both")
        check_options(self)


@dataclass(frozen=True)
class RaySettings:
    """Where `embed_shards_on_cluster` works: a Ray cluster and the actors on it. Raises `ValueError`."""

    address: str = option("local", "Work on a Ray cluster: auto, HOST:PORT, or local (this machine's cores).")
    replicas: int | None = option(None, "Load this many copies of the towers; one a GPU or core by default.", least=1)
    device: str = option("auto", "cpu, cuda (one GPU a replica), or auto: GPUs if the cluster has any.")

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "cuda"):
            raise DataError(f"on a cluster the device is auto, cpu or cuda, not {self.device!r}")
        check_options(self)
