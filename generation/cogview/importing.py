"""Imports CogView's published transformer checkpoints: finds the file, maps its tensors to ours, converts them.

V vocabulary (padded), H width, P positions, L layers. The files hold float16 weights of model-parallel size 1.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from generation.cogview.rows import PUBLISHED_DEPTHS, cogview_config
from generation.rows.vocabulary import Vocabulary
from generation.transformer.config import TransformerConfig
from vqvae.storage.parts import ModelError
from vqvae.storage.published import Source, converted, read_checkpoint, section, shape_of, stream_part

TRACKERS = ("latest_checkpointed_iteration.txt", "latest")  # the second is DeepSpeed's own
HEAD_WIDTH = 64  # of every published model; the files do not contain it

WORDS = "word_embeddings.weight"
PLACES = "transformer.position_embeddings.weight"
LAYER = re.compile(r"transformer\.layers\.(0|[1-9]\d{0,3})\.")

logger = logging.getLogger(__name__)


def find_checkpoint(folder: Path) -> Path:
    """The weights' file in a published checkpoint folder. Raises `ModelError` that says what is missing."""
    tracker = next((folder / name for name in TRACKERS if (folder / name).is_file()), None)
    if tracker is None:
        raise ModelError(f"{folder} is no CogView checkpoint folder: it has no {TRACKERS[0]}")
    iteration = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not re.fullmatch(r"\w[\w.-]*", iteration):
        raise ModelError(f"{tracker} must hold the name of a folder, an iteration, not {iteration[:40]!r}")
    ranks = sorted((folder / iteration).glob("mp_rank_*_model_states.pt"))
    if len(ranks) > 1:
        raise ModelError(f"{folder / iteration} is split into {len(ranks)} parts: merge it to model-parallel size 1")
    if not ranks:
        raise ModelError(f"{folder} is incomplete: {iteration}/mp_rank_00_model_states.pt is missing")
    return ranks[0]


def generator_sources(config: TransformerConfig) -> dict[str, Source]:
    """For each tensor of our transformer the published one; the output matrix is the embedding in both."""
    width, hidden = config.width, config.hidden_width

    def pair(ours: str, theirs: str, *shape: int) -> dict[str, Source]:
        return {
            f"{ours}.weight": Source(f"{theirs}.weight", shape),
            f"{ours}.bias": Source(f"{theirs}.bias", shape[:1]),
        }

    sources = {
        "embed.weight": Source(WORDS, (config.vocabulary.padded_size, width)),
        "embed_positions.0.weight": Source(PLACES, (config.num_positions, width)),
        **pair("norm", "transformer.final_layernorm", width),
    }
    for layer in range(config.depth):
        block, theirs = f"blocks.{layer}", f"transformer.layers.{layer}"
        sources |= pair(f"{block}.attention_norm", f"{theirs}.input_layernorm", width)
        # queries, keys, values are the thirds of the rows, heads consecutive in each, as in ours
        sources |= pair(f"{block}.attention.qkv", f"{theirs}.attention.query_key_value", 3 * width, width)
        sources |= pair(f"{block}.attention.project", f"{theirs}.attention.dense", width, width)
        sources |= pair(f"{block}.attention_out_norm", f"{theirs}.third_layernorm", width)
        sources |= pair(f"{block}.mlp_norm", f"{theirs}.post_attention_layernorm", width)
        sources |= pair(f"{block}.mlp.expand", f"{theirs}.mlp.dense_h_to_4h", hidden, width)
        sources |= pair(f"{block}.mlp.project", f"{theirs}.mlp.dense_4h_to_h", width, hidden)
        sources |= pair(f"{block}.mlp_out_norm", f"{theirs}.fourth_layernorm", width)
    return sources


def generator_config(
    found: Mapping[str, Any],
    path: Path,
    *,
    num_image_codes: int,
    num_text_pieces: int,
    grid: tuple[int, int] = (32, 32),
    heads: int | None = None,
    layers: int | None = None,
) -> TransformerConfig:
    """The sizes of published weights. The number of heads does not show in them: width / 64 if `heads` is not given.

    Raises `ModelError` for weights that do not fit the two vocabularies, the grid, the heads or the layers (`_depth`).
    """
    vocabulary_size, width = shape_of(found, WORDS, 2, path, "CogView transformer")
    positions = shape_of(found, PLACES, 2, path, "CogView transformer")[0]
    vocab = Vocabulary(num_image_codes, num_text_pieces)
    if vocabulary_size != vocab.padded_size:
        raise ModelError(
            f"{path} has {vocabulary_size} ids, but {num_image_codes} image codes, {num_text_pieces} text pieces and "
            f"27 commands make {vocab.padded_size}: are the tokenizer and the text model those of these weights?"
        )
    if heads is None and width % HEAD_WIDTH:
        raise ModelError(f"{path} is {width} wide, no multiple of {HEAD_WIDTH}: say how many heads it has (--heads)")
    try:
        return cogview_config(
            positions=positions,
            width=width,
            depth=_depth(found, path, width, layers),
            heads=heads or width // HEAD_WIDTH,
            num_image_codes=num_image_codes,
            num_text_pieces=num_text_pieces,
            grid=grid,
        )
    except ModelError:
        raise
    except ValueError as error:
        raise ModelError(f"{path} does not fit: {error}") from error


def _depth(found: Mapping[str, Any], path: Path, width: int, wanted: int | None) -> int:
    """The number of layers, which must be there from 0 on without gaps.

    A checkpoint that lost its last layers looks like a smaller model. So there must be `wanted` of them; if that is not
    given, as many as the published models of this width have (`PUBLISHED_DEPTHS`). Of another width nothing is known,
    and a warning says so.
    """
    layers = sorted({int(match[1]) for key in found if isinstance(key, str) and (match := LAYER.match(key))})
    if layers != [*range(len(layers))] or not layers:
        gap = next((place for place, layer in enumerate(layers) if layer != place), 0)
        raise ModelError(
            f"{path} does not fit: transformer.layers.{gap} is missing, and {len(layers)} others are there"
        )
    depth = PUBLISHED_DEPTHS.get(width) if wanted is None else wanted
    if depth is None:
        logger.warning(
            "%s: no published model is %d wide, so whether its %d layers are all is not known: --layers says how many "
            "there must be", path, width, len(layers),
        )  # fmt: skip
    elif len(layers) != depth:
        reason = (
            "as asked" if wanted is not None else f"of the published models that are {width} wide (or say --layers)"
        )
        raise ModelError(f"{path} does not fit: it has {len(layers)} layers, and not the {depth} {reason}")
    return len(layers)


def import_generator(
    checkpoint: Path,
    folder: Path,
    *,
    num_image_codes: int,
    num_text_pieces: int,
    tokenizer_hash: str,
    text_hash: str,
    grid: tuple[int, int] = (32, 32),
    heads: int | None = None,
    layers: int | None = None,
) -> tuple[TransformerConfig, str]:
    """Convert a published checkpoint folder to the new part `folder`; returns its config and content hash.

    Raises `ModelError` for a folder that is incomplete, a file that is damaged or unsafe, and weights that do not fit.
    """
    path = find_checkpoint(checkpoint)
    found = section(read_checkpoint(path), "module", path)
    vocabularies = {"num_image_codes": num_image_codes, "num_text_pieces": num_text_pieces}
    config = generator_config(found, path, **vocabularies, grid=grid, heads=heads, layers=layers)
    config = replace(config, tokenizer_hash=tokenizer_hash, text_hash=text_hash)
    return config, stream_part(folder, config, converted(found, generator_sources(config), path))
