"""How a generator is evaluated. The command line reads help and limits here, so nothing heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass

from data.options import COUNT, check_options, option


@dataclass(frozen=True)
class GeneratorEvalConfig:
    """`prompts` in each language, each ranked among `candidates`; `neighbours` are shown beside each picture."""

    split: str = "test-family"
    prompts: int = option(16, "Draw for this many prompts in each language.", least=2, most=2**16)
    candidates: int = option(100, "Rank each prompt among this many candidates.", least=2, most=2**16)
    neighbours: int = option(4, "Show this many training pictures beside each drawing.", least=1, most=1024)
    train_limit: int | None = option(None, "Compare with only this many training pictures.", least=1, most=COUNT)
    seed: int = option(0, "The seed of the choice and the drawings.", least=0, most=2**31 - 1)

    def __post_init__(self) -> None:
        check_options(self)
