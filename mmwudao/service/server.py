"""One process: uvicorn around the application."""

from __future__ import annotations

import gc
import logging
import signal
import socket
import sys
import warnings
from collections.abc import Callable

import uvicorn

from mmwudao.service.app import create_app
from mmwudao.service.keys import check_binding
from mmwudao.service.queues import Served
from mmwudao.service.settings import ServiceConfig

KEEP_ALIVE = 75  # s; longer than a proxy's in front, or it would see connections close under its requests
# warnings of these loggers quote what clients wrote
QUOTING_LOGGERS = ("mmwudao.loading.loaded", "retrieval")


class Server(uvicorn.Server):
    """uvicorn's server, which says when it listens."""

    def __init__(self, config: uvicorn.Config, on_listening: Callable[[int], None] | None = None) -> None:
        super().__init__(config)
        self._on_listening = on_listening

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and self._on_listening is not None:
            self._on_listening(self.servers[0].sockets[0].getsockname()[1])


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which does not listen yet. Raises `ValueError` for one that cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host.strip("[]"), port))
    except OSError as error:
        listener.close()
        raise ValueError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    return listener


def make_server(
    served: Served,
    config: ServiceConfig,
    host: str,
    port: int,
    on_listening: Callable[[int], None] | None = None,
) -> Server:
    """A server, not yet running; `on_listening` is called with the port once it takes requests.

    Raises `ValueError` for an address that others can reach without a key.
    """
    check_binding(host, config.keys)
    settings = uvicorn.Config(
        create_app(served, config),
        host=host,
        port=port,
        log_config=None,
        access_log=False,  # our middleware logs without ids and queries
        server_header=False,
        # the client's address is not needed, and a proxy's headers about it cannot be trusted
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE,
        # past every deadline: only clients that do not read their answer are cut off
        timeout_graceful_shutdown=int(max(config.deadline, config.drawing_deadline)) + 5,
    )
    return Server(settings, on_listening)


def run_server(server: uvicorn.Server, listener: socket.socket) -> None:
    """Serve at `listener` until SIGTERM or SIGINT, and finish what was accepted."""
    # uvicorn raises the signal again at its end; the default handler would end the process before anything is closed
    signal.signal(signal.SIGTERM, lambda *_: None)
    # loaded objects stay: without this the garbage collector walks a million objects of PyTorch again and again
    gc.collect()
    gc.freeze()
    server.run([listener])


def configure_logging(log_prompts: bool) -> None:
    """Log to stderr. Without `log_prompts`, nothing that clients wrote is logged."""
    # the format below needs none of these (Python's "Logging HOWTO", Optimization)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    # Pillow warns of odd files of clients, and Python would keep each such line for ever
    warnings.filterwarnings("ignore", module="PIL")
    if not log_prompts:
        for name in QUOTING_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
