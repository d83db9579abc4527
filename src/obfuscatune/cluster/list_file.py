"""Publishes a list that lies in a file, where no supervisor does: `python -m obfuscatune.cluster.list_file`.

Needs no more than a worker does. The file may be replaced while it is served, as a ConfigMap is.
"""

import argparse
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from obfuscatune.cluster.publisher import Publisher
from obfuscatune.errors import ConfigError, DiscoveryError, ObfuscaTuneError
from obfuscatune.fleet.listing import MAX_LIST_BYTES, parse_list
from obfuscatune.protocol.addresses import TcpAddress, parse_address

SECONDS_BETWEEN_LOOKS = 5.0


def read_list(path: Path) -> bytes:
    """The list in a file.

    Raises:
        DiscoveryError: enclaves would refuse it, or there is none.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_LIST_BYTES + 1)
    except OSError as error:
        raise DiscoveryError(f"cannot read the list {path}: {error.strerror}") from error
    parse_list(data)
    return data


def serve(path: Path, address: TcpAddress, over: threading.Event, say: Callable[[str], None]) -> None:
    """Serve the list until `over` is set. One that enclaves would refuse is said, and the one before stays.

    Raises:
        ConfigError: nothing can listen there.
        DiscoveryError: the list is no good at the start.
    """
    data = read_list(path)
    publisher = Publisher(address)
    try:
        publisher.publish(data)
        say(f"the list is at http://{publisher.address.host}:{publisher.address.port}/fleet.json")
        said = ""
        while not over.wait(SECONDS_BETWEEN_LOOKS):
            try:
                publisher.publish(read_list(path))
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
    parser.add_argument("--list", type=Path, required=True, help="the list, as `fleet manifests` wrote it")
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
