"""From settings to what is served: which models, from where, checked together and loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmwudao.loading.generator_towers import check_generator_vectors
from mmwudao.loading.model_dir import find_model, read_model_config
from mmwudao.loading.vectors import load_vector_maker
from mmwudao.pipeline import Pipeline, load
from mmwudao.service.generators import Generator, LocalGenerator
from mmwudao.service.queues import Served
from mmwudao.service.settings import ServeSettings
from retrieval.collections.opening import open_collection
from vqvae.storage.parts import content_hash


@dataclass(frozen=True)
class ModelSources:
    """Where the models of a server come from; None: it has none."""

    generator: str | None
    towers: str | None


def find_sources(settings: ServeSettings) -> ModelSources:
    """Which models the settings name; no weights are read.

    Raises `ValueError` for options that do not go together, and `ModelError` for a model that is not there.
    """
    model, by_generator = settings.model, settings.by == "generator"
    if by_generator and settings.towers:
        raise ValueError("--by generator makes vectors without towers: leave out --towers")
    if settings.durable and settings.collection is None:
        raise ValueError("--durable is about the collection: give --collection")
    if (Path(model) / "model.safetensors").exists():
        if settings.towers or settings.adapter:
            raise ValueError(f"{model} holds towers alone: it takes neither --towers nor --adapter")
        if by_generator:
            check_generator_vectors(model)
        return ModelSources(None, model)
    parts = read_model_config(find_model(model)).parts
    if by_generator:
        check_generator_vectors(model)
    sources = ModelSources(
        generator=model if settings.generator_replicas else None,
        towers=settings.towers or (model if by_generator or "towers" in parts else None),
    )
    if settings.adapter and sources.generator is None:
        raise ValueError("a style is for a generator: without one there is no --adapter")
    if sources.towers is None and (settings.collection or sources.generator is None):
        raise ValueError(f"{model} has no towers to search or make vectors with: give --towers")
    return sources


def load_generator(settings: ServeSettings) -> Pipeline:
    """The model that draws. Raises `ValueError` as `mmwudao.pipeline.load` does."""
    return load(
        settings.model, settings.device, settings.dtype, settings.adapter, settings.engine, settings.expert_memory
    )


def open_served(settings: ServeSettings, remote: Generator | None = None) -> Served:
    """Load the models and open the collection; with `remote`, that generator is used and none is loaded.

    Raises `ValueError` as `find_sources` does, for a model that cannot be loaded, and for a collection of other towers'
    vectors.
    """
    sources = find_sources(settings)
    pipeline = load_generator(settings) if sources.generator is not None and remote is None else None
    generator = LocalGenerator(pipeline) if pipeline is not None else remote
    if sources.towers is None:
        towers = None
    elif pipeline is not None and settings.towers is None and settings.by == "towers":
        towers = pipeline.towers  # loaded once, also for captions and reranking
    else:
        towers = load_vector_maker(settings.by, sources.towers, settings.device)
    collection = None
    if settings.collection is not None:
        assert towers is not None, "find_sources checks this"
        collection = open_collection(
            settings.collection,
            create=True,
            dim=towers.embed_dim,
            model=content_hash(towers),
            durable=settings.durable,
        )
    return Served(Path(settings.model).name, towers, generator, collection)
