"""`generate`, `replay` and `info`: a model at work. Heavy imports happen inside the commands."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

if TYPE_CHECKING:
    from PIL import Image

    from mmwudao.pipeline import Progress

PREVIEW_ROWS = 2  # rows of codes between two previews
MAX_THREADS = 16  # more only wait for each other at the sizes of one picture's matrices

Model = Annotated[str, typer.Option(help="A shipped name, a model directory, or a hub id.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or mps.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16, float16, or int8 (weights of 8 bits).")]
# as in `generation.drawing.engines`, which is not imported for --help
Engine = Annotated[
    Literal["auto", "modules", "fused", "graph", "compile"],
    typer.Option(help="How a step is run; on a GPU graph, or compile, which takes a minute first and is faster."),
]
Style = Annotated[str | None, typer.Option(help="A picture family the model knows (see `mmwudao info`).")]
Seed = Annotated[int | None, typer.Option(help="Picture k is drawn with seed + k; default: a new one.")]
Temperature = Annotated[float | None, typer.Option(help="0 always takes the likeliest code.")]
TopK = Annotated[int | None, typer.Option(help="Sample from the k likeliest codes; 0: from all.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the likeliest codes of this total.")]
Guidance = Annotated[float | None, typer.Option(help="How strictly the prompt is followed; 1: no guidance.")]
Window = Annotated[
    int | None, typer.Option(help="Codes tried in one pass: the same picture, sooner where a pass costs little.")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="The folder for the pictures.")]
Adapter = Annotated[Path | None, typer.Option(help="The folder of a style that `train style` learned.")]
Judge = Literal["caption", "towers", "both"]  # as in `mmwudao.tasks`, which is not imported for --help
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw.")] = None,
    prompts_file: Annotated[
        Path | None, typer.Option(help="A UTF-8 text file with one prompt a line ('-' reads stdin).")
    ] = None,
    n: Annotated[int, typer.Option("-n", help="Pictures of each prompt.")] = 1,
    style: Style = None,
    seed: Seed = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    guidance: Guidance = None,
    window: Window = None,
    candidates: Annotated[
        int | None, typer.Option(help="Draw so many of each prompt, and keep the n that show it best.")
    ] = None,
    rerank: Annotated[Judge, typer.Option(help="What chooses among the candidates.")] = "caption",
    model: Model = "emoji",
    adapter: Adapter = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    engine: Engine = "auto",
    out: Out = Path("mmwudao-out"),
    preview: Annotated[bool, typer.Option("--preview", help="Keep a preview.png up to date while drawing.")] = False,
    as_json: Json = False,
) -> None:
    """Draw pictures: one PNG each, which `replay` can draw again, and a sheet of all, grid.png.

    Options that are not given are the model's own defaults. Existing files are never overwritten.
    """
    wanted = [*map(as_typed, prompts or []), *(_read_prompts(prompts_file) if prompts_file else [])]
    if not wanted:
        raise ValueError("no prompt: say what to draw, or give --prompts-file")
    with output_folder(out):
        choose_threads()
        from mmwudao.pictures import unused_path
        from mmwudao.pipeline import load

        pipeline = load(model, device, dtype, adapter, engine)
        preview_path = unused_path(out, "preview") if preview else None
        with drawing_progress(preview_path, columns := n if len(wanted) > 1 else None) as on_progress:
            images = pipeline.generate(
                wanted, n, seed, style, temperature, top_k, top_p, guidance, window, candidates, rerank, on_progress
            )
        pictures, sheet = write_pictures(out, images, columns)
    print_pictures(pictures, sheet, images, as_json)


def write_pictures(out: Path, images: list[Image.Image], columns: int | None) -> tuple[list[Path], Path]:
    """Write each drawn picture and a sheet of all into `out`, all or none; returns the paths."""
    from data.atomic import write_files
    from mmwudao.pictures import encode_png, file_stem, grid, unused_path

    files: dict[Path, bytes] = {}
    for image in images:
        stem = file_stem(image.info["prompt"], image.info["seed"])
        files[unused_path(out, stem, taken=frozenset(files))] = encode_png(image)
    pictures = list(files)
    sheet = unused_path(out, "grid", taken=frozenset(files))
    files[sheet] = encode_png(grid(images, columns))
    write_files(files)
    return pictures, sheet


def print_pictures(pictures: list[Path], sheet: Path, images: list[Image.Image], as_json: bool) -> None:
    if as_json:
        for path, image in zip(pictures, images, strict=True):
            print(json.dumps({"path": str(path), "grid": str(sheet), **image.info}, ensure_ascii=False))
    else:
        for path in pictures:
            print(path)
        print(f"sheet: {sheet}")


def replay(
    picture: Annotated[Path, typer.Argument(help="A PNG that `generate` wrote.")],
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="The file to write; default: PICTURE-replay.png beside it.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Where the model is now; default: as recorded.")] = None,
    adapter: Adapter = None,
    device: Annotated[str | None, typer.Option(help="Default: the recorded one.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Default: the recorded one.")] = None,
    as_json: Json = False,
) -> None:
    """Draw a picture again from the recipe inside it, and compare the two pixel by pixel.

    Exit code 1 when they differ, as they may on other hardware or with another PyTorch.
    """
    from data.atomic import write_files
    from mmwudao.pictures import differing_pixels, encode_png, read_recipe, unused_path

    recipe = read_recipe(picture)
    target = out or unused_path(picture.parent, f"{picture.stem}-replay")
    if out is not None and out.exists():
        raise ValueError(f"{out} exists: choose another file")
    with output_folder(target.parent):
        choose_threads()
        from mmwudao.pipeline import load

        places = (model or recipe["model"], device or recipe["device"], dtype or recipe["dtype"])
        pipeline = load(*places, adapter, recipe.get("engine", "auto"))
        with drawing_progress(None, None) as on_progress:
            image = pipeline.redraw(recipe, on_progress)
        differing = differing_pixels(picture, image)
        write_files({target: encode_png(image)})
    total = image.width * image.height
    if as_json:
        print(json.dumps({"path": str(target), "differing_pixels": differing, "pixels": total}, ensure_ascii=False))
    else:
        print(target)
        verdict = "identical to the original" if not differing else f"differs in {differing} of {total} pixels"
        print(f"{verdict} ({pipeline.device.type}, {pipeline.dtype})")
    if differing:
        raise typer.Exit(1)


def info(
    model: Annotated[
        str, typer.Argument(help="A shipped name, a model directory, a hub id, or a preset such as cogview-4b.")
    ] = "emoji",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Print a model's parts with their sizes and hashes, its styles and defaults, and the memory that drawing takes."""
    from mmwudao.loading.info import describe

    description = describe(model, dtype)
    print(json.dumps(description, ensure_ascii=False) if as_json else _format_description(description))


def _format_description(description: dict[str, Any]) -> str:
    if "parts" not in description:
        size, count = description["image_size"], description["parameters"]
        first = f"{description['name']}: {size} x {size} pixels, {count:,} parameters (a preset, no weights here)"
        return "\n".join([first, *_format_memory(description["memory"])])
    sampling = ", ".join(f"{name} {value}" for name, value in description["default_sampling"].items())
    lines = [
        f"{description['name']}: {description['image_size']} x {description['image_size']} pixels, "
        f"{description['bytes'] / 1e6:.1f} MB in {description['folder']}",
        f"hash       {description['model_hash']}",
        f"styles     {', '.join(description['styles'])}",
        f"languages  {', '.join(description['languages'])}",
        f"sampling   {sampling}",
    ]
    for name, part in description["parts"].items():
        count = f"{part['parameters']:,} parameters" if "parameters" in part else f"{part['pieces']:,} pieces"
        lines.append(f"{name:<10} {count}, {part['bytes'] / 1e6:.1f} MB, {part['dtype']}, {part['hash']}")
    return "\n".join([*lines, *_format_memory(description["memory"])])


def _format_memory(memory: dict[str, dict[str, Any]]) -> list[str]:
    """A line a device: what drawing takes on top of PyTorch itself."""
    lines = []
    for device, plan in memory.items():
        gb = {name: f"{value / 1e9:.2f}" for name, value in plan.items() if isinstance(value, int)}
        lines.append(
            f"memory     {device}, {plan['dtype']}: {gb['total']} GB = transformer {gb['transformer']} + image "
            f"tokenizer {gb['tokenizer']} + cache of {plan['rows']} rows {gb['cache']} + matrices {gb['matrices']} + "
            f"noise {gb['noise']} + activations {gb['activations']}; decoding a picture {gb['picture']}"
        )
    return lines


def as_typed(argument: str) -> str:
    """A command line argument as UTF-8, where the locale made Python read its bytes as something else."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:  # not UTF-8 either: `check_prompt` has the words for it
        return argument


def _read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not blank. Raises `ValueError` for a file that is no UTF-8 text."""
    data = sys.stdin.buffer.read() if str(path) == "-" else path.read_bytes()
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError(f"{path} holds no prompt")
    return prompts


@contextlib.contextmanager
def output_folder(folder: Path) -> Iterator[None]:
    """Make `folder` and see that it can be written, before the work; take it away again if the work fails."""
    missing = []
    parent = folder
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        yield
    except BaseException:
        for made in missing:
            with contextlib.suppress(OSError):  # not made yet, or no longer empty
                made.rmdir()
        raise


@contextlib.contextmanager
def drawing_progress(preview: Path | None, columns: int | None) -> Iterator[Callable[[Progress], None]]:
    """A callback for `Pipeline.generate` that moves a bar (on a terminal) and keeps `preview` up to date."""
    from tqdm import tqdm

    from data.atomic import write_files
    from mmwudao.pictures import encode_png, grid

    with tqdm(desc="drawing", disable=not sys.stderr.isatty(), leave=False) as bar:
        shown = -1

        def on_progress(progress: Progress) -> None:
            nonlocal shown
            bar.total = progress.total
            bar.update(progress.done - bar.n)
            if preview is not None and progress.rows // PREVIEW_ROWS != shown:
                shown = progress.rows // PREVIEW_ROWS
                write_files({preview: encode_png(grid(progress.preview(), columns))})

        try:
            yield on_progress
        except BaseException:
            if preview is not None:
                preview.unlink(missing_ok=True)
            raise


def choose_threads() -> None:
    """As many threads as this process may use cores, unless the user has said how many."""
    if "OMP_NUM_THREADS" in os.environ:
        return
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else torch.get_num_threads()
    with contextlib.suppress(OSError, ValueError):  # no control groups here, or no quota ("max")
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, int(quota) // int(period)))
    torch.set_num_threads(min(torch.get_num_threads(), cores, MAX_THREADS))
