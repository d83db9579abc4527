"""Every error of ObfuscaTune.

    ObfuscaTuneError
    ├── ConfigError               an option, a profile, an address or a run file that cannot be used
    ├── DataError                 a data set that cannot be read; carries file and line
    ├── ModelFileError            a model directory that cannot be read as what it claims to be
    ├── StorageError              the disk refused: full, read-only, gone
    ├── RunStopped                a run of fine-tuning ended early because it was asked to; a checkpoint is written
    ├── ProtectionError           the enclave cannot keep its promise and stops
    │   └── NonFiniteError        NaN or infinity arose inside the enclave, before anything was sent
    └── WireError                 between enclave and worker
        ├── ConnectionLost        the peer closed, died or could not be reached
        ├── DeadlineExceeded      the peer did not answer in time
        ├── UntrustedPeer         the peer's certificate is not a pinned one, or ours is not for the peer
        ├── ProtocolError         bytes that break docs/spec/wire.md
        │   ├── BadMagic          not our protocol
        │   ├── UnsupportedVersion
        │   ├── MalformedMessage  a field outside its range, or a message out of turn
        │   ├── LimitExceeded     a size above the limits, refused before allocation
        │   └── Truncated         the stream ended inside a message
        ├── BadReply              well-formed, but not an answer to what was asked
        └── WorkerRefused         the worker answered with an error
            ├── UnknownMatrix     it does not hold that matrix (any longer)
            ├── AdapterLost       it does not hold that adapter (any longer), and nobody else does
            └── QuotaExceeded     its memory is full

A message says what was expected, what came, and what to do. Only errors of this tree cross a
package's boundary; the command line prints their text and nothing else.
"""


class ObfuscaTuneError(Exception):
    """The root of the tree. Not raised itself."""


class ConfigError(ObfuscaTuneError):
    """An option, a profile, an address or a run file that cannot be used."""


class DataError(ObfuscaTuneError):
    """A data set that cannot be read. The message names file and line."""


class ModelFileError(ObfuscaTuneError):
    """A model directory that cannot be read as what it claims to be."""


class StorageError(ObfuscaTuneError):
    """The disk refused: full, read-only or gone."""


class RunStopped(ObfuscaTuneError):
    """A run of fine-tuning ended early because it was asked to. Its newest checkpoint is of the step it ended at."""


class ProtectionError(ObfuscaTuneError):
    """The enclave cannot keep its promise, and stops rather than send."""


class NonFiniteError(ProtectionError):
    """NaN or infinity arose inside the enclave, before anything was sent."""


class WireError(ObfuscaTuneError):
    """Anything that goes wrong between enclave and worker."""


class ConnectionLost(WireError):
    """The peer closed, died or could not be reached."""


class DeadlineExceeded(WireError):
    """The peer did not answer in time."""


class UntrustedPeer(WireError):
    """The peer's certificate is not one of those pinned here, or ours is not one of those pinned there."""


class ProtocolError(WireError):
    """Bytes that break docs/spec/wire.md."""


class BadMagic(ProtocolError):
    """The first bytes are not those of our protocol."""


class UnsupportedVersion(ProtocolError):
    """No protocol version that both sides speak."""


class MalformedMessage(ProtocolError):
    """A field outside its range, or a message out of turn."""


class LimitExceeded(ProtocolError):
    """A size above the limits; refused before anything was allocated."""


class Truncated(ProtocolError):
    """The stream ended inside a message."""


class BadReply(WireError):
    """A well-formed reply that does not answer what was asked (shape, dtype, NaN)."""


class WrongProduct(WireError):
    """The worker's product is of the right form, finite, and not the product."""


class WorkerRefused(WireError):
    """The worker answered with an error."""


class UnknownMatrix(WorkerRefused):
    """The worker does not hold that matrix (any longer)."""


class AdapterLost(WorkerRefused):
    """The worker does not hold an adapter that was moved to it, or what a backward pass needs; nobody else does."""


class QuotaExceeded(WorkerRefused):
    """The worker's memory for matrices is full."""
