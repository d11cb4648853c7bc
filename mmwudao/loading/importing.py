"""Published weights of other projects as model directories of ours."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

from data.atomic import new_folder
from data.framed_text import PROMPT, FramedTokenizer, framed_text_file, load_model_text
from data.named_prompts import named_prompts_file
from data.text import TextTokenizer
from generation.cogview.importing import import_generator
from generation.drawing.sampling import SamplingOptions
from generation.emu3.configuration import (
    codes_of_a_side,
    emu3_config,
    prompt_template,
    read_emu3_folder,
    unwanted_frame,
)
from generation.emu3.first_layout import RANKS, first_text
from generation.emu3.importing import check_emu3, read_emu3_weights, write_emu3_generator, write_emu3_tokenizer
from generation.emu3.settings import Emu3Import
from generation.janus.configuration import choose_template, janus_config, prompt_frame, read_janus_folder
from generation.janus.importing import check_janus, tokenizer_of, used_tensors, write_generator, write_tokenizer
from generation.janus.settings import JanusImport
from generation.llamagen.classes import class_names
from generation.llamagen.encoders import import_t5, import_vectors
from generation.llamagen.importing import check_llamagen, import_vq16, llamagen_config, read_llamagen, write_llamagen
from generation.llamagen.settings import LlamaGenImport
from generation.transformer.config import TransformerConfig
from mmwudao.loading.model_dir import ModelConfig, Part, copy_part, write_model_config
from mmwudao.loading.options import Selection
from vqvae.cogview import import_tokenizer
from vqvae.storage.folders import read_weights_folder
from vqvae.storage.parts import ModelError, stored_hash

T5_TEMPLATE = PROMPT + "</s>"

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
    hashes = {} if towers is None else {"towers": stored_hash(towers)}
    name = settings.name or source.resolve().name
    with new_folder(out) as building:
        (building / "text.json").write_bytes(text_file)
        text = FramedTokenizer(building / "text.json")
        found = used_tensors(read_weights_folder(source), source)
        vq16 = tokenizer_of(found, files.layout, source)
        config = janus_config(files, vq16, prompt_frame(text, text_path), settings)
        check_janus(found, config, vq16, files.layout, source)
        hashes["tokenizer"] = write_tokenizer(found, vq16, files.layout, building / "tokenizer", source)
        hashes["text"] = text.content_hash
        config = replace(config, tokenizer_hash=hashes["tokenizer"], text_hash=hashes["text"])
        hashes["generator"] = write_generator(found, config, files.layout, building / "generator", source)
        if towers is not None:
            copy_part(towers, building / "towers")
        card = JANUS_CARD.format(
            name=name, source=source.resolve().name, side=files.image_size, licence=_licence(source)
        )
        # guidance of the published script
        drawing = SamplingOptions(guidance=5.0)
        _finish(building, name, files.image_size, ("en", "zh"), drawing, hashes, card)
    return out


EMU3_CARD = """# {name}

Converted from the files of Emu3 in `{source}` (Wang et al. 2024, arXiv:2409.18869) by `mmwudao import emu3`, with the
weights of the files. Pictures have {side} pixels a side. Behind every prompt stands "{praise}", and it is guided away
from "{unwanted}". What the import leaves behind: the head of the text. BAAI published Emu3 under Apache-2.0{licence}
"""


def import_emu3(
    source: Path, out: Path, settings: Emu3Import, towers: Path | None = None, tokenizer: Path | None = None
) -> Path:
    """Convert a folder of Emu3 to the new model directory `out`.

    In its first layout the picture tokenizer has a folder of its own, `tokenizer`. `towers` is a folder of towers to
    put beside it. Never more than one copy of the weights is in memory. Raises
    `ModelError` (or `TextError`) that says what is missing, damaged, unsafe or does not fit; `out` is then not made.
    """
    files = read_emu3_folder(source, tokenizer)
    side = codes_of_a_side(files, settings.image_size)
    template = prompt_template(side, settings.praise)
    text_path = source / ("tokenizer.json" if tokenizer is None else RANKS)
    pieces = text_path if tokenizer is None else first_text(source)
    text_file = framed_text_file(pieces, template, int(files.language["vocab_size"]))
    hashes = {} if towers is None else {"towers": stored_hash(towers)}
    name = settings.name or source.resolve().name
    with new_folder(out) as building:
        (building / "text.json").write_bytes(text_file)
        text = FramedTokenizer(building / "text.json")
        frame = unwanted_frame(text, side, settings.unwanted, text_path)
        config = emu3_config(files, text, side, frame, settings)
        tensors = read_emu3_weights(files)
        check_emu3(tensors, config)
        hashes["tokenizer"] = write_emu3_tokenizer(tensors, building / "tokenizer")
        hashes["text"] = text.content_hash
        config = replace(config, tokenizer_hash=hashes["tokenizer"], text_hash=hashes["text"])
        hashes["generator"] = write_emu3_generator(tensors, config, building / "generator")
        if towers is not None:
            copy_part(towers, building / "towers")
        card = EMU3_CARD.format(
            name=name, source=source.resolve().name, side=settings.image_size, praise=settings.praise.strip(),
            unwanted=settings.unwanted, licence=_licence(source),
        )  # fmt: skip
        # of the published script
        drawing = SamplingOptions(guidance=3.0, top_k=2048)
        _finish(building, name, settings.image_size, ("en", "zh"), drawing, hashes, card)
    return out


LLAMAGEN_CARD = """# {name}

Converted from LlamaGen's files `{source}` and `{tokenizer}` (Sun et al. 2024, arXiv:2406.06525) by `mmwudao import
llamagen`. It draws {what}, {side} pixels a side. The weights are those of the files. LlamaGen's code and weights were
published under the MIT licence{licence}
"""


def import_llamagen(
    source: Path,
    tokenizer: Path,
    out: Path,
    settings: LlamaGenImport,
    *,
    t5: Path | None = None,
    vectors: Path | None = None,
    classes: Path | None = None,
) -> Path:
    """Convert a checkpoint of LlamaGen and its picture tokenizer to the new model directory `out`.

    A model of captions needs the folder `t5` of its text encoder, or a file of the `vectors` of the prompts that it
    shall draw; one of classes may be told their names, one class a line, by the file `classes`. Never more than one
    copy of the weights is in memory. Raises `ModelError` (or `TextError`) that says what is missing, damaged, unsafe or
    does not fit; `out` is then not made.
    """
    file = read_llamagen(source)
    captions = file.draws == "captions"
    if captions and (t5 is None) == (vectors is None):
        raise ModelError(f"{source} draws captions: give the folder of its text encoder (--t5) or vectors (--vectors)")
    if not captions and (t5 or vectors):
        raise ModelError(f"{source} draws classes, which need neither --t5 nor --vectors")
    name = settings.name or source.resolve().stem
    hashes: dict[str, str] = {}
    with new_folder(out) as building:
        vq16, hashes["tokenizer"] = import_vq16(tokenizer, building / "tokenizer")
        config = llamagen_config(file, vq16, settings)
        check_llamagen(file, config)
        if captions:
            text_file, hashes["encoder"] = _write_encoder(config, t5, vectors, building / "encoder")
        else:
            text_file = named_prompts_file("class", class_names(file.pieces - 1, classes))
        (building / "text.json").write_bytes(text_file)
        hashes["text"] = load_model_text(building / "text.json").content_hash
        config = replace(config, tokenizer_hash=hashes["tokenizer"], text_hash=hashes["text"])
        hashes["generator"] = write_llamagen(file, config, building / "generator")
        side = config.grid[0] * vq16.stride
        what = "captions in English" if captions else f"{file.pieces - 1} classes"
        card = LLAMAGEN_CARD.format(
            name=name, source=source.name, tokenizer=tokenizer.name, what=what, side=side,
            licence=_licence(source.resolve().parent),
        )  # fmt: skip
        # of the published scripts
        drawing = SamplingOptions(guidance=7.5, top_k=1000) if captions else SamplingOptions(guidance=4.0, top_k=2000)
        _finish(building, name, side, ("en",), drawing, hashes, card)
    return out


def _write_encoder(config: TransformerConfig, t5: Path | None, vectors: Path | None, folder: Path) -> tuple[bytes, str]:
    """Write the encoder of a model of captions; returns the content of its text part and its content hash."""
    if t5 is None:
        assert vectors is not None
        prompts, found = import_vectors(vectors, config.prefix_width, config.max_text, folder)
        return named_prompts_file("prompt", [[prompt] for prompt in prompts]), found
    encoder, found = import_t5(t5, folder)
    if encoder.width != config.prefix_width:
        raise ModelError(
            f"{t5} makes vectors of {encoder.width} numbers, and the generator reads {config.prefix_width}: it needs "
            "another encoder"
        )
    pieces = int(encoder.t5.get("vocab_size", 32128))
    return framed_text_file(t5 / "tokenizer.json", T5_TEMPLATE, pieces, web_captions=True), found


def _finish(
    building: Path,
    name: str,
    image_size: int,
    languages: tuple[str, ...],
    drawing: SamplingOptions,
    hashes: dict[str, str],
    card: str,
) -> None:
    """Write config.json and card of a new model with a text.json, which draws and tells nothing."""
    model = ModelConfig(
        name=name,
        image_size=image_size,
        styles=(),
        languages=languages,
        default_sampling=drawing,
        parts={part: Part("text.json" if part == "text" else part, found) for part, found in hashes.items()},
        selection=Selection(judge="towers" if "towers" in hashes else "caption"),
    )
    write_model_config(building, model, card)


def _licence(source: Path) -> str:
    """The text of the licence that lies beside the weights, for the card."""
    path = next((path for path in sorted(source.glob("LICENSE*")) if path.is_file()), None)
    if path is None:
        return "; none lay beside them."
    return f":\n\n{path.read_text(encoding='utf-8', errors='replace').strip()}"
