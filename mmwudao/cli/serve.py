"""`serve`: the HTTP service. Heavy imports happen inside the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mmwudao.cli.options import Adapter, Device, Dtype, Engine

if TYPE_CHECKING:
    from generation.drawing.engines import Kind
    from mmwudao.service.queues import Served


def serve(
    model: Annotated[
        str, typer.Option(help="A shipped name, a model directory, a hub id, or a folder of towers alone.")
    ] = "emoji",
    towers: Annotated[str | None, typer.Option(help="Towers for vectors and search; default: the model's own.")] = None,
    collection: Annotated[
        str | None, typer.Option(help="What is searched: a folder, a bucket or a server; made if it is not there.")
    ] = None,
    durable: Annotated[
        bool, typer.Option("--durable", help="Writes to the collection also survive a loss of power (slower).")
    ] = False,
    adapter: Adapter = None,
    host: Annotated[str, typer.Option(help="The address to listen on; others than this machine's need keys.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    keys_file: Annotated[
        Path | None, typer.Option(help="Bearer keys, one a line; also in the environment: MMWUDAO_KEYS.")
    ] = None,
    allow_urls: Annotated[
        bool, typer.Option("--allow-urls", help="Fetch pictures that clients name by public URLs.")
    ] = False,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Write what clients ask for to the log.")] = False,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that are accepted at a time; beyond: 429.")] = 1024,
    deadline: Annotated[float, typer.Option(help="Seconds for an answer, after acceptance.")] = 60.0,
    drawing_deadline: Annotated[float, typer.Option(help="The same for pictures, captions and reranking.")] = 600.0,
    limit: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=NUMBER", help="Any other limit, such as waiting_texts=4096; may be repeated."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    engine: Engine = "auto",
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Serve by a Ray cluster: auto, HOST:PORT, or local.")
    ] = None,
    tower_replicas: Annotated[int, typer.Option(min=1, help="With --ray: processes that make vectors.")] = 1,
    generator_replicas: Annotated[int, typer.Option(min=0, help="With --ray: processes that draw, or none.")] = 1,
    cpus: Annotated[float, typer.Option(min=0, help="With --ray: cores of each replica.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0, help="With --ray: GPUs of each replica, or a part of one.")] = 0.0,
) -> None:
    """Serve vectors, search, pictures and captions over HTTP; /docs describes it, SIGTERM ends it in good order."""
    if ray is not None:
        if device != "auto":
            raise ValueError("with --ray, replicas work on GPUs that --gpus reserves, else on CPUs: leave out --device")
        _serve_by_ray(
            ray, host, port,
            model=model, towers=towers, collection=collection, adapter=str(adapter) if adapter else None,
            tower_replicas=tower_replicas, generator_replicas=generator_replicas, cpus=cpus, gpus=gpus, dtype=dtype,
            engine=engine,
            keys_file=keys_file, allow_urls=allow_urls, log_prompts=log_prompts, max_requests=max_requests,
            deadline=deadline, drawing_deadline=drawing_deadline, limit=limit or [],
            durable=durable,
        )  # fmt: skip
        return
    if tower_replicas != 1 or generator_replicas != 1 or cpus != 1 or gpus:
        raise ValueError("replicas are for --ray: without it, one process has one of each")
    from mmwudao.loading.devices import choose_threads
    from mmwudao.service.keys import check_binding, read_keys
    from mmwudao.service.server import configure_logging, make_server, run
    from mmwudao.service.settings import with_limits

    config = with_limits(
        limit or (),
        keys=read_keys(keys_file),
        allow_urls=allow_urls,
        log_prompts=log_prompts,
        max_requests=max_requests,
        deadline=deadline,
        drawing_deadline=drawing_deadline,
    )
    check_binding(host, config.keys)  # before models are loaded
    configure_logging(log_prompts)
    choose_threads()
    served = load_served(model, towers, collection, adapter, device, dtype, engine, durable)
    print(f"serving {served.name} ({', '.join(served.abilities)}) on {host}:{port}", file=sys.stderr)
    try:
        run(make_server(served, config, host, port))
    finally:
        if served.collection is not None:
            served.collection.close()


def _serve_by_ray(address: str, host: str, port: int, **settings: Any) -> None:
    """Until SIGTERM or SIGINT. Raises `ValueError`."""
    from mmwudao.service.keys import check_binding, read_keys
    from retrieval.cluster import connected

    check_binding(host, read_keys(settings["keys_file"]))  # before anything is started
    with connected(address):
        from mmwudao.service.ray.deployments import ScaleOut, run

        run(ScaleOut(**settings), host, port)


def load_served(
    model: str,
    towers: str | None,
    collection: str | None,
    adapter: Path | None,
    device: str,
    dtype: str,
    engine: Kind = "auto",
    durable: bool = False,
) -> Served:
    """The parts of what the options name. Raises `ValueError`."""
    from mmwudao.loading.towers import load_model_towers
    from mmwudao.pipeline import load
    from mmwudao.service.queues import Served
    from retrieval.collections.opening import open_collection
    from vqvae.storage.parts import content_hash

    name = Path(model).name
    if (Path(model) / "model.safetensors").exists():  # towers alone
        if towers or adapter:
            raise ValueError(f"{model} holds towers alone: it takes neither --towers nor --adapter")
        pipeline, own = None, load_model_towers(model, device)
    else:
        pipeline, own = load(model, device, dtype, adapter, engine), None
        if towers is not None:
            own = load_model_towers(towers, device)
        elif "towers" in pipeline.config.parts:
            own = pipeline.towers
    if collection is None:
        if durable:
            raise ValueError("durable is about the collection: give --collection")
        return Served(name, own, pipeline)
    if own is None:
        raise ValueError(f"{model} has no towers to search a collection with: give --towers")
    opened = open_collection(collection, create=True, dim=own.embed_dim, model=content_hash(own), durable=durable)
    return Served(name, own, pipeline, opened)
