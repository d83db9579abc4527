"""Publishes lists of files and other publishers as one: `python -m obfuscatune.cluster.list_file`.

Needs no more than a worker does. A file may be replaced while it is served, as a ConfigMap is.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from obfuscatune.cluster.publisher import Publisher
from obfuscatune.errors import ConfigError, DiscoveryError, ObfuscaTuneError
from obfuscatune.fleet.discovery import fetch
from obfuscatune.fleet.listing import MAX_LIST_BYTES, merge_lists
from obfuscatune.protocol.addresses import TcpAddress, parse_address

SECONDS_BETWEEN_LOOKS = 5.0


def read_lists(sources: Sequence[str]) -> bytes:
    """The list in a file or at a URL; several as one.

    Raises:
        DiscoveryError: enclaves would refuse it, or there is none.
    """
    return merge_lists([fetch(it) if it.startswith(("http://", "https://")) else _read(Path(it)) for it in sources])


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise DiscoveryError(f"cannot read the list {path}: {error.strerror}") from error


def serve(sources: Sequence[str], address: TcpAddress, over: threading.Event, say: Callable[[str], None]) -> None:
    """Serve the lists of `sources`, files or URLs, as one, until `over` is set.

    One that enclaves would refuse is said, and the one before stays.

    Raises:
        ConfigError: nothing can listen there.
        DiscoveryError: the list is no good at the start.
    """
    data = read_lists(sources)
    publisher = Publisher(address)
    try:
        publisher.publish(data)
        say(f"the list is at http://{publisher.address.host}:{publisher.address.port}/fleet.json")
        said = ""
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                publisher.publish(read_lists(sources))
                said = ""
            except DiscoveryError as error:
                if str(error) != said:
                    said = str(error)
                    say(said)
    finally:
        publisher.close()


def listen_address(text: str) -> TcpAddress:
    """HOST:PORT. Raises ConfigError: it is none."""
    address = parse_address(f"tcp:{text}")
    if not isinstance(address, TcpAddress):
        raise ConfigError(f"{text}: write HOST:PORT")
    return address


def main(arguments: list[str]) -> int:
    """Serve until SIGTERM or Ctrl-C; 2 after an option or a list that cannot be used."""
    parser = argparse.ArgumentParser(prog="python -m obfuscatune.cluster.list_file", description="Serves fleet.json.")
    parser.add_argument("--list", action="append", required=True, help="a list: a file or a URL; may be given again")
    parser.add_argument("--publish", default="127.0.0.1:7650", help="where, as HOST:PORT")
    options = parser.parse_args(arguments)
    over = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: over.set())
    try:
        serve(options.list, listen_address(options.publish), over, _say)
    except ObfuscaTuneError as error:
        _say(f"error: {error}")
        return 2
    return 0


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
