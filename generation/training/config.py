"""What `mmwudao train generator` reads from its YAML file."""

from __future__ import annotations

from dataclasses import dataclass, field

from data.options import COUNT, check_options, option
from generation.rows.mixture import Mixture
from generation.rows.texts import CaptionMix
from generation.training.matching import MatchTraining
from generation.transformer.config import TransformerConfig
from vqvae.training.config import LoopConfig, ParallelConfig


@dataclass
class GeneratorDataConfig:
    """Which codes and captions."""

    codes: str = "codes"  # folder written by `mmwudao tokenize`
    text_model: str = "text.model"  # SentencePiece
    tokenizer: str = ""  # folder of the image tokenizer, for sample sheets; empty = no sheets
    train: str = "train"
    test: list[str] = field(default_factory=lambda: ["test-family", "test-concept"])
    exclude_families: list[str] = field(default_factory=list)
    balance: float = option(
        0.5, "A picture's weight is the count of its concept's and family's pictures to the power of minus this.",
        least=0, most=10,
    )  # fmt: skip
    test_pictures: int = option(256, "Evaluate on this many pictures of each test split.", least=1, most=COUNT)
    # for model.prompt_features: a model that has towers, or a folder of towers; and the file of their vectors, which is
    # made if it is missing (empty = features-HASH.safetensors in the folder of codes)
    towers: str = ""
    features: str = ""
    pictures: str = ""  # the shards of pictures that the codes were made of, for from_picture

    def __post_init__(self) -> None:
        check_options(self)


@dataclass
class GeneratorTrainConfig:
    """Everything that `mmwudao train generator` reads from its YAML file.

    Of `model`, the vocabulary sizes, the grid, the width of prompt features and the hashes are filled in from the data.
    Raises `ValueError` for a
    value out of range.
    """

    data: GeneratorDataConfig = field(default_factory=GeneratorDataConfig)
    captions: CaptionMix = field(default_factory=CaptionMix)
    model: TransformerConfig = field(default_factory=TransformerConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    # row kind -> weight, see `generation.rows.mixture`: how often a step learns rows of that kind
    mix: dict[str, float] = field(default_factory=lambda: {"draw": 1.0})
    match: MatchTraining = field(default_factory=MatchTraining)  # how rows of the kind match are trained
    start_from: str = ""  # folder of a trained generator of the same sizes; empty = random weights
    upcycle: str = ""  # folder of one without experts, whose MLPs all experts start as; empty = no
    text_weight: float = option(
        0.2, "Weigh the loss of a text token in rows that draw by this, where an image token weighs 1.",
        least=0, most=1e6,
    )  # fmt: skip
    code_noise: float = option(
        0.0, "Replace up to this share of the codes that a row is given with wrong ones.", least=0, most=1
    )
    code_mask: float = option(
        0.0, "Hide half or more of the given codes in this share of the rows that draw.", least=0, most=1
    )
    from_picture: float = option(
        0.0,
        "Give this share of the rows that draw with a caption the vector of the picture itself instead of its name's; "
        "needs model.prompt_features.kind both.",
        least=0,
        most=1,
    )
    given_codes: float = option(
        1.0, "Give rows that describe between this share of the codes and all of them.", least=0, most=1
    )
    packing: bool = True  # rows one after another without padding; padded where attention is sparse
    checkpoint_gradients: bool = False  # less memory, a third more time
    sample_prompts: list[str] = field(default_factory=list)
    sample_every: int = option(
        2000, "Steps between two sample sheets, which are made at evaluations.", least=1, most=COUNT
    )

    def __post_init__(self) -> None:
        check_options(self)
        shares = Mixture(self.mix).shares
        if "match" in shares and not self.model.match.used:
            raise ValueError("mix.match needs a head for the vectors: set model.match.width, such as 128")
        if self.model.match.used and "match" not in shares:
            raise ValueError("model.match.width is for vectors that mix.match trains: give it a weight, such as 0.1")
        if "match" in shares and self.parallel.tensor > 1:
            raise ValueError("mix.match compares the shares of a batch: use parallel.shard instead of parallel.tensor")
        if (self.from_picture > 0) != (self.model.prompt_features.kind == "both"):
            raise ValueError("from_picture above 0 and model.prompt_features.kind=both go together")
        if self.upcycle and self.start_from:
            raise ValueError("start_from and upcycle both say what to start from: leave one out")
        if self.upcycle and not self.model.experts.used:
            raise ValueError("upcycle makes experts of the MLPs of a generator: set model.experts.count")
        if self.upcycle and (self.model.experts.shared or self.model.experts.width):
            raise ValueError(
                "upcycle makes experts as wide as the MLP, and no shared one: leave out model.experts.width and shared"
            )
