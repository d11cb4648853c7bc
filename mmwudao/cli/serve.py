"""`serve`: the HTTP service. Heavy imports happen inside the command."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from mmwudao.cli.options import option_groups
from mmwudao.service.settings import ServeSettings


@option_groups
def serve(
    settings: ServeSettings,
    host: Annotated[
        str, typer.Option(help="Listen on this address; an address that other machines can reach needs keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Listen on this port; 0 takes any that is free.")] = 8000,
    ray: Annotated[
        str | None, typer.Option(metavar="ADDRESS", help="Serve by a Ray cluster: auto, HOST:PORT, or local.")
    ] = None,
) -> None:
    """Serve vectors, search, pictures and captions over HTTP; /docs describes it, SIGTERM ends it in good order."""
    from mmwudao.service.keys import check_binding, read_keys

    # before anything is loaded or started
    settings.check_mode(by_ray=ray is not None)
    keys = read_keys(settings.keys_file)
    check_binding(host, keys)
    if ray is not None:
        from retrieval.cluster import connected

        with connected(ray):
            from mmwudao.service.ray.deployments import serve_replicas

            serve_replicas(settings, host, port)
        return
    config = settings.config(keys)
    from mmwudao.loading.devices import choose_threads
    from mmwudao.service.opening import open_served
    from mmwudao.service.server import bind, configure_logging, make_server, run_server

    configure_logging(config.log_prompts)
    choose_threads()
    with bind(host, port) as listener:  # before the models are loaded: a port that is taken is told at once
        served = open_served(settings)

        def tell(port: int) -> None:
            print(
                f"serving {served.name} ({', '.join(served.abilities)}) on {host}:{port}", file=sys.stderr, flush=True
            )

        try:
            run_server(make_server(served, config, host, port, tell), listener)
        finally:
            served.close()
