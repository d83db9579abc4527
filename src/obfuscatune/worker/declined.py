"""What a worker will not do, and the code that says so in its reply."""

from obfuscatune.wire.errors import WorkerRefused
from obfuscatune.wire.messages import ErrorCode


class Declined(WorkerRefused):
    """One request is refused; the connection goes on."""

    def __init__(self, code: ErrorCode, text: str) -> None:
        super().__init__(text)
        self.code = code
