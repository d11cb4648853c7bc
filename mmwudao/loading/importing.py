"""Published weights of other projects as model directories of ours."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from data.atomic import new_folder
from data.framed_text import FramedTokenizer, framed_text_file
from data.text import TextTokenizer
from generation.cogview.importing import import_generator
from generation.drawing.sampling import SamplingOptions
from generation.janus.configuration import choose_template, janus_config, prompt_frame, read_janus_folder
from generation.janus.importing import check_janus, tokenizer_of, used_tensors, write_generator, write_tokenizer
from generation.janus.settings import JanusImport
from mmwudao.loading.model_dir import ModelConfig, Part, copy_part, write_model_config
from mmwudao.loading.options import Selection
from vqvae.cogview import import_tokenizer
from vqvae.storage.folders import read_weights_folder
from vqvae.storage.parts import ModelError, stored_hash

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
    layers: int | None = None,
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
            layers=layers,
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


JANUS_CARD = """# {name}

Converted from the files of Janus in `{source}` (Chen et al. 2025, arXiv:2501.17811) by `mmwudao import janus`. The
weights are those of the files; the vectors of the codes, which the original computes for every code that it draws, are
computed once. Pictures have {side} pixels a side, the only size that the model draws. What the import leaves behind:
the tower that looks at pictures, and the head of the text. The licence is that of the weights, which the files came
with{licence}
"""


def import_janus(source: Path, out: Path, settings: JanusImport, towers: Path | None = None) -> Path:
    """Convert a folder of Janus, in its own layout or that of transformers, to the new model directory `out`.

    `towers` is a folder of towers to put beside it. Never more than one copy of the weights is in memory. Raises
    `ModelError` (or `TextError`) that says what is missing, damaged, unsafe or does not fit; `out` is then not made.
    """
    files = read_janus_folder(source)
    text_path = source / "tokenizer.json"
    template = choose_template(files, text_path, settings.template)
    text_file = framed_text_file(text_path, template, int(files.language["vocab_size"]))
    parts = {} if towers is None else {"towers": Part("towers", stored_hash(towers))}
    name = settings.name or source.resolve().name
    with new_folder(out) as building:
        (building / "text.json").write_bytes(text_file)
        text = FramedTokenizer(building / "text.json")
        found = used_tensors(read_weights_folder(source), source)
        vq16 = tokenizer_of(found, files.layout, source)
        config = janus_config(files, vq16, prompt_frame(text, text_path), settings)
        check_janus(found, config, vq16, files.layout, source)
        tokenizer_hash = write_tokenizer(found, vq16, files.layout, building / "tokenizer", source)
        config = replace(config, tokenizer_hash=tokenizer_hash, text_hash=text.content_hash)
        generator_hash = write_generator(found, config, files.layout, building / "generator", source)
        if towers is not None:
            copy_part(towers, building / "towers")
        model = ModelConfig(
            name=name,
            image_size=files.image_size,
            styles=(),
            languages=("en", "zh"),
            default_sampling=SamplingOptions(guidance=5.0),  # of the published script
            parts={
                "tokenizer": Part("tokenizer", tokenizer_hash),
                "generator": Part("generator", generator_hash),
                "text": Part("text.json", text.content_hash),
                **parts,
            },
            selection=Selection(judge="towers" if parts else "caption"),
        )
        card = JANUS_CARD.format(
            name=name, source=source.resolve().name, side=files.image_size, licence=_licence(source)
        )
        write_model_config(building, model, card)
    return out


def _licence(source: Path) -> str:
    """The text of the licence that lies beside the weights, for the card."""
    path = next((path for path in sorted(source.glob("LICENSE*")) if path.is_file()), None)
    if path is None:
        return "; none lay beside them."
    return f":\n\n{path.read_text(encoding='utf-8', errors='replace').strip()}"
