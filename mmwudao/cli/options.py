"""Options that several commands have, alone and in groups. A group is a dataclass: each field is an option.

No module that is imported here imports PyTorch, NumPy or Pillow: `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

import typer

from data.options import full_help, help_of
from generation.drawing.sampling import SamplingOptions
from mmwudao.loading.options import EngineName, JudgeName, RunOptions

if TYPE_CHECKING:
    from mmwudao.pipeline import Pipeline

Model = Annotated[
    str, typer.Option(help="The model is a shipped name, a model directory, or a hub id such as owner/name.")
]
Device = Annotated[str, typer.Option(help=help_of(RunOptions, "device"))]
Dtype = Annotated[str, typer.Option(help=help_of(RunOptions, "dtype"))]
Engine = Annotated[EngineName, typer.Option(help=help_of(RunOptions, "engine"))]
ExpertMemory = Annotated[str | None, typer.Option(help=help_of(RunOptions, "expert_memory"))]
Adapter = Annotated[Path | None, typer.Option(help=help_of(RunOptions, "adapter"))]
Style = Annotated[
    str | None, typer.Option(help="Draw in the style of this picture family; `mmwudao info` lists those of a model.")
]
Seed = Annotated[
    int | None, typer.Option(help="Picture k is drawn with this seed + k; without it a random seed is drawn and told.")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="Write the pictures into this folder.")]
Judge = JudgeName
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


def field_option(settings: type, name: str, *names: str, **extra: Any) -> Any:
    """The command line option of a settings field, with the help and the limits of the field."""
    return typer.Option(*names, help=help_of(settings, name), **extra)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Which model to load, and where it runs."""

    model: Model = "emoji"
    device: Device = "auto"
    dtype: Dtype = "auto"

    def load(self) -> Pipeline:
        """See `mmwudao.pipeline.load`."""
        from mmwudao.loading.devices import choose_threads
        from mmwudao.pipeline import load

        choose_threads()
        return load(**vars(self))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawingModelOptions(ModelOptions):
    """`ModelOptions` of a command that draws."""

    adapter: Adapter = None
    engine: Engine = "auto"
    expert_memory: ExpertMemory = None


@dataclasses.dataclass(frozen=True)
class SomeOf:
    """Marks a parameter that takes only those options of a group that are given, as a dictionary."""

    group: type


Sampling = Annotated[dict[str, Any], SomeOf(SamplingOptions)]


def option_groups(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer in which each parameter that is a group has become the options of its fields.

    A parameter annotated with a dataclass gets an instance of it; one annotated with `SomeOf` of a dataclass gets a
    dictionary of the options that are given.
    """
    parameters: list[inspect.Parameter] = []
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        kind: Any = parameter.annotation
        some = False
        if get_origin(kind) is Annotated and isinstance(get_args(kind)[1], SomeOf):
            kind, some = get_args(kind)[1].group, True
        is_group = dataclasses.is_dataclass(kind)
        if not is_group:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        options = list(_group_parameters(kind, some))
        build: Callable[..., Any] = _given if some else kind
        groups[parameter.name] = build, [option.name for option in options]
        parameters += options

    @functools.wraps(command)
    def spread(**values: Any) -> None:
        built = {name: build(**{key: values.pop(key) for key in keys}) for name, (build, keys) in groups.items()}
        command(**values, **built)

    spread.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spread.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spread


def _group_parameters(group: Any, some: bool) -> Iterator[inspect.Parameter]:
    """The fields of a dataclass as parameters for typer: annotated with a `typer.Option`, or made by `data.options`."""
    hints = get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        kind = hints[field.name]
        if get_origin(kind) is not Annotated:
            # a flag needs no `--no-` form where off is the default
            names = [f"--{field.name.replace('_', '-')}"] if field.default is False else []
            kind = Annotated[kind | None if some else kind, typer.Option(*names, help=full_help(field))]
        made = field.default_factory
        default = None if some else field.default if made is dataclasses.MISSING else made()
        yield inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _given(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def as_typed(argument: str) -> str:
    """A command line argument as UTF-8, where the locale made Python read its bytes as something else."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:  # not UTF-8 either: `check_prompt` says so
        return argument
