"""What went over the link, counted."""

from dataclasses import asdict, dataclass, replace


@dataclass
class LinkStats:
    """Totals since the link was opened."""

    crossings: int = 0
    """Requests to multiply that were answered."""
    bytes_sent: int = 0
    """Bytes to the worker, headers and uploads included."""
    bytes_received: int = 0
    """Bytes from the worker, headers included."""
    seconds_waiting: float = 0.0
    """Time spent waiting for replies and receiving them."""
    uploads: int = 0
    """Matrices sent; those that the worker had already are not among them."""
    bytes_uploaded: int = 0
    """Bytes of these matrices."""
    verified: int = 0
    """Products that were held against secret vectors."""
    reconnects: int = 0
    """Connections made after the first."""
    retries: int = 0
    """Requests to multiply that were sent again."""

    def snapshot(self) -> "LinkStats":
        """A copy that stands still."""
        return replace(self)

    def since(self, earlier: "LinkStats") -> "LinkStats":
        """What was added since the snapshot `earlier`."""
        before = asdict(earlier)
        return LinkStats(**{name: value - before[name] for name, value in asdict(self).items()})
