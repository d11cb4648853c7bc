"""What an evaluation of towers measures on. The command line reads help and limits here: nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import COUNT, check_options, option


@dataclass(frozen=True)
class RetrievalEvalConfig:
    """What `evaluate` measures on, besides the shards."""

    splits: tuple[str, ...]
    limit: int | None = option(None, "Use only this many pictures of each split, the first.", least=1, most=COUNT)
    batch_size: int = option(64, "Encode this many pictures at a time.", least=1, most=2**16)
    seed: int = option(0, "The seed of the shuffled concepts.", least=0, most=2**31 - 1)

    def __post_init__(self) -> None:
        check_options(self)
