"""One process: uvicorn around the application."""

from __future__ import annotations

import gc
import logging
import signal
import sys
import warnings

import uvicorn

from mmwudao.service.app import create_app
from mmwudao.service.keys import check_binding
from mmwudao.service.queues import Served
from mmwudao.service.settings import ServiceConfig

KEEP_ALIVE = 75  # s; longer than a proxy's in front, or it would see connections close under its requests
# warnings of these loggers quote what clients wrote
QUOTING_LOGGERS = ("mmwudao.loading.loaded", "retrieval")


def make_server(served: Served, config: ServiceConfig, host: str, port: int) -> uvicorn.Server:
    """A server, not yet running.

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
    return uvicorn.Server(settings)


def run_server(server: uvicorn.Server) -> None:
    """Serve until SIGTERM or SIGINT, and finish what was accepted."""
    # uvicorn raises the signal again at its end; the default handler would end the process before anything is closed
    signal.signal(signal.SIGTERM, lambda *_: None)
    # loaded objects stay: without this the garbage collector walks a million objects of PyTorch again and again
    gc.collect()
    gc.freeze()
    server.run()


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
