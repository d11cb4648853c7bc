"""Published weights of other projects as model directories of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

from data.atomic import new_folder
from data.text import TextTokenizer
from generation.cogview.importing import import_generator
from generation.drawing.sampling import SamplingOptions
from mmwudao.loading.model_dir import ModelConfig, Part, write_model_config
from vqvae.cogview import import_tokenizer
from vqvae.storage.parts import ModelError

COGVIEW_CARD = """# {name}

Converted from CogView's published files (Ding et al. 2021, arXiv:2105.13290) by `mmwudao import cogview`; the
weights are unchanged. What differs in use: docs/cogview.md of the project.
"""


def import_cogview(
    tokenizer: Path,
    generator: Path,
    text_model: Path,
    out: Path,
    *,
    name: str | None = None,
    heads: int | None = None,
    image_size: int = 256,
) -> Path:
    """Convert CogView's tokenizer file, checkpoint folder and text model to the new model directory `out`.

    Never more than one copy of the weights is in memory. Raises `ModelError` (or `TextError`) that says what is
    missing, damaged, unsafe or does not fit; `out` is then not made.
    """
    text = TextTokenizer(text_model, needs_bytes=False)
    name = name or generator.resolve().name
    with new_folder(out) as building:
        vqvae, tokenizer_hash = import_tokenizer(tokenizer, building / "tokenizer")
        if image_size < 1 or image_size % vqvae.stride:
            raise ModelError(f"image_size must be a multiple of {vqvae.stride}, not {image_size}")
        side = image_size // vqvae.stride
        _, generator_hash = import_generator(
            generator,
            building / "generator",
            num_image_codes=vqvae.codebook_size,
            num_text_pieces=text.vocab_size,
            tokenizer_hash=tokenizer_hash,
            text_hash=text.content_hash,
            grid=(side, side),
            heads=heads,
        )
        shutil.copyfile(text_model, building / "text.model")
        config = ModelConfig(
            name=name,
            image_size=image_size,
            styles=(),
            languages=("zh",),
            default_sampling=SamplingOptions(temperature=1.0, top_k=200),  # of the published scripts
            parts={
                "tokenizer": Part("tokenizer", tokenizer_hash),
                "generator": Part("generator", generator_hash),
                "text": Part("text.model", text.content_hash),
            },
            describes="untagged",
        )
        write_model_config(building, config, COGVIEW_CARD.format(name=name))
    return out
