"""Workers as processes of this machine: for trying out, and for one machine with several devices."""

from obfuscatune.cluster.node import Node, NodeSettings, Report


class LocalPlace:
    """A place on this machine."""

    def __init__(self, name: str, settings: NodeSettings) -> None:
        self.name = name
        self._node = Node(name, settings)

    def request(self) -> bytes:
        """See `Place`."""
        return self._node.request()

    def start(self, certificate: bytes) -> None:
        """See `Place`."""
        self._node.start(certificate)

    def report(self) -> Report | None:
        """See `Place`."""
        return self._node.report()

    def close(self) -> None:
        """See `Place`."""
        self._node.close()


class LocalEngine:
    """Its workers end with this process, however that ends."""

    def __init__(self, names: list[str], settings: NodeSettings) -> None:
        self.places = [LocalPlace(name, settings) for name in names]

    def close(self) -> None:
        """See `Engine`."""
        for place in self.places:
            place.close()
