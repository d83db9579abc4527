"""A console on one socket of this machine, until it is interrupted."""

import socket
import webbrowser
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import uvicorn

from obfuscatune.console.shell import Shell
from obfuscatune.errors import ConfigError

LOCAL = "127.0.0.1"
_MAX_HEADER_BYTES = 32 * 2**10
_CONNECTIONS = 64
_DRAIN_SECONDS = 2


def listen(port: int) -> socket.socket:
    """A socket of this machine alone; 0 takes any port that is free.

    Raises:
        ConfigError: the port cannot be had.
    """
    try:
        return socket.create_server((LOCAL, port))
    except OSError as error:
        raise ConfigError(f"--port {port}: cannot listen there: {error.strerror or error}") from error


def serve(
    shell: Shell,
    listening: socket.socket,
    told: Callable[[str], None],
    *,
    beside: AbstractContextManager[None] | None = None,
    opens_browser: bool = False,
) -> None:
    """Serve a console until SIGINT or SIGTERM.

    Args:
        told: Is given the one-time link, once a browser can follow it.
        beside: What lasts as long as the console.
        opens_browser: Whether the link is opened here and now.
    """
    port = listening.getsockname()[1]
    shell.origin = f"http://{LOCAL}:{port}"
    hosts = {f"{LOCAL}:{port}", f"localhost:{port}"}
    config = uvicorn.Config(
        shell.asgi(hosts),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        lifespan="off",
        ws="none",
        limit_concurrency=_CONNECTIONS,
        h11_max_incomplete_event_size=_MAX_HEADER_BYTES,
        timeout_graceful_shutdown=_DRAIN_SECONDS,
    )
    with beside or nullcontext():
        link = shell.link()
        told(link)  # the socket listens already: who comes early waits
        if opens_browser:
            webbrowser.open(link)
        uvicorn.Server(config).run(sockets=[listening])
