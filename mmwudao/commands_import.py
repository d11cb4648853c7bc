"""`import`: published weights of other projects to model directories. Heavy imports happen inside the commands."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Convert published weights of other projects.", no_args_is_help=True)


@app.callback()
def _group() -> None:
    """Convert published weights of other projects."""  # without a callback, a single command would be the group


@app.command("cogview")
def import_cogview(
    tokenizer: Annotated[Path, typer.Option(help="The image tokenizer, vqvae_hard_biggerset_011.pt.")],
    generator: Annotated[Path, typer.Option(help="A checkpoint folder: cogview-base, cogview-caption, cogview-sr.")],
    text_model: Annotated[Path, typer.Option(help="The SentencePiece model, cog-pretrain.model.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="The new model directory.")],
    name: Annotated[str | None, typer.Option(help="The model's name; default: that of the checkpoint folder.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads; default: width / 64, as published.")] = None,
    image_size: Annotated[int, typer.Option(help="Pixels a side.")] = 256,
) -> None:
    """Convert CogView's files. They are read without running anything in them, and mapped instead of loaded."""
    from mmwudao.imports import import_cogview as convert

    print(convert(tokenizer, generator, text_model, out, name=name, heads=heads, image_size=image_size))
