"""Every error of ObfuscaTune.

    ObfuscaTuneError
    ├── ConfigError               an option, a profile, an address or a run file that cannot be used
    ├── DataError                 a data set that cannot be read; carries file and line
    ├── ModelFileError            a model directory that cannot be read as what it claims to be
    ├── StorageError              the disk refused: full, read-only, gone
    ├── RunStopped                a run of fine-tuning ended early because it was asked to; a checkpoint is written
    ├── IntegrityError            a sealed or signed document that is not what was sealed or signed
    ├── TermsError                a grant, a consent or a quota does not allow what was asked for
    ├── ServiceError              a request that the service does not answer
    │   ├── Overloaded            as many requests wait as it takes
    │   ├── RequestTimeout        the answer was not there in time
    │   └── ServiceClosed         it takes no more requests, or stopped at a failure
    ├── AttestationError          evidence
    │   ├── EvidenceError         bytes that are no evidence of their kind, or a platform that gives none
    │   └── VerificationFailed    well-formed evidence that a policy refuses; carries every check
    ├── ProtectionError           the enclave cannot keep its promise and stops
    │   ├── BudgetExceeded        one more request would show more than the mask budget allows
    │   └── NonFiniteError        NaN or infinity arose inside the enclave, before anything was sent
    └── WireError                 between enclave and worker
        ├── ConnectionLost        the peer closed, died or could not be reached
        ├── DeadlineExceeded      the peer did not answer in time
        ├── ChannelError          bytes that break docs/spec/attested-channel.md
        ├── UntrustedPeer         the peer's certificate is not a pinned one, or ours is not for the peer
        ├── DiscoveryError        a fleet's list that cannot be fetched, or is no list that can be used
        ├── ProtocolError         bytes that break docs/spec/wire.md
        │   ├── BadMagic          not our protocol
        │   ├── UnsupportedVersion
        │   ├── MalformedMessage  a field outside its range, or a message out of turn
        │   ├── LimitExceeded     a size above the limits, refused before allocation
        │   └── Truncated         the stream ended inside a message
        ├── BadReply              well-formed, but not an answer to what was asked
        ├── WrongProduct          well-formed and finite, and not the product
        └── WorkerRefused         the worker answered with an error
            ├── UnknownMatrix     it does not hold that matrix (any longer)
            ├── AdapterLost       it does not hold that adapter (any longer), and nobody else does
            └── QuotaExceeded     its memory is full

A message says what was expected, what came, and what to do. Only errors of this tree cross a
package's boundary; the command line prints their text and nothing else.
"""

from typing import Any


class ObfuscaTuneError(Exception):
    """The root of the tree. Not raised itself.

    What to do:
        Catch it where any failure of ObfuscaTune is handled alike; the command line does.
    """


class ConfigError(ObfuscaTuneError):
    """An option, a profile, an address or a run file that cannot be used.

    What to do:
        Correct the option or key that the message names; `--help` and docs/profiles.md list what there is.
    """


class DataError(ObfuscaTuneError):
    """A data set that cannot be read. The message names file and line.

    What to do:
        Open the file at the line that the message names; `obfuscatune finetune --preview` shows what is read.
    """


class ModelFileError(ObfuscaTuneError):
    """A model directory that cannot be read as what it claims to be.

    What to do:
        Look at the file that the message names. Models are directories with `config.json` and safetensors;
        convert others by `save_pretrained(directory, safe_serialization=True)`.
    """


class StorageError(ObfuscaTuneError):
    """The disk refused: full, read-only or gone.

    What to do:
        Make room, or name another folder (`--out`, `--store`, `TMPDIR`); then resume the run.
    """


class RunStopped(ObfuscaTuneError):
    """A run of fine-tuning ended early because it was asked to. Its newest checkpoint is of the step it ended at.

    What to do:
        Nothing is lost: the same command with `--resume` goes on.
    """


class IntegrityError(ObfuscaTuneError):
    """A sealed or signed document that is not what was sealed or signed: changed, cut off, reordered, or an older one.

    What to do:
        Fetch it again. If it is still refused, whoever keeps it has changed it: do not use what it holds.
    """


class TermsError(ObfuscaTuneError):
    """A grant, a consent or a quota does not allow what was asked for.

    What to do:
        The message names the term. The provider widens it by a new grant, the owner by a consent.
    """


class ServiceError(ObfuscaTuneError):
    """A request that the service does not answer, through no fault of the request.

    What to do:
        Read the subclass. Where it is this class itself, something failed that should not have: the service's log has
        the kind of failure, and other requests are answered.
    """


class Overloaded(ServiceError):
    """As many requests wait for their answer as the service lets wait.

    What to do:
        Ask again a little later; clients of OpenAI's API do so by themselves.
    """


class RequestTimeout(ServiceError):
    """The answer was not complete within the time that a request may take.

    What to do:
        Ask for fewer tokens, or ask again when the service has less to do.
    """


class ServiceClosed(ServiceError):
    """The service takes no more requests: it is shutting down, or it stopped at a failure.

    What to do:
        Ask again when it is started again. If it stopped at a failure, its log says which.
    """


class AttestationError(ObfuscaTuneError):
    """Anything about evidence. Not raised itself.

    What to do:
        Read the subclass. Nothing was released.
    """


class EvidenceError(AttestationError):
    """Bytes that are no evidence of the kind they claim to be, or a platform that gives none.

    What to do:
        The message says which field, or which interface of the system was looked for. docs/attestation.md lists
        what each platform needs.
    """


class VerificationFailed(AttestationError):
    """Well-formed evidence that a policy refuses.

    What to do:
        Run `obfuscatune verify`, which shows every check, line by line. Widen the policy only where you know why.
    """

    def __init__(self, message: str, checks: "tuple[Any, ...]" = ()) -> None:
        super().__init__(message)
        self.checks = checks
        """Every `attest.checks.Check`, passed or not, in order."""


class ProtectionError(ObfuscaTuneError):
    """The enclave cannot keep its promise, and stops rather than send.

    What to do:
        The message says which layer or setting. `obfuscatune inspect` shows what of a model can be
        protected.
    """


class BudgetExceeded(ProtectionError):
    """One more request under masks could show the compute worker more than the mask budget allows.

    What to do:
        Save the adapter. Raise `--mask-budget` only if your data protection allows it: docs/guarded.md says what the
        number means.
    """


class NonFiniteError(ProtectionError):
    """NaN or infinity arose inside the enclave, before anything was sent.

    What to do:
        As with a plain model that diverges: lower the learning rate, look at the data, use float32.
    """


class WireError(ObfuscaTuneError):
    """Anything that goes wrong between enclave and worker.

    What to do:
        Read the subclass. Requests were tried again already, as `RetryPolicy` says.
    """


class ConnectionLost(WireError):
    """The peer closed, died or could not be reached.

    What to do:
        Is the worker running, and is the address right? Its stderr says why it ended. A run of `finetune`
        goes on with `--resume`.
    """


class DeadlineExceeded(WireError):
    """The peer did not answer in time.

    What to do:
        The worker is overloaded, or hangs: look at its machine, or give it longer by `deadline_s`.
    """


class ChannelError(WireError):
    """Bytes that break docs/spec/attested-channel.md, or a message out of turn.

    What to do:
        Run the same version on both sides. If it comes again, the other side is broken or hostile.
    """


class UntrustedPeer(WireError):
    """The peer's certificate is not one of those pinned here, or ours is not one of those pinned there.

    What to do:
        Compare fingerprints over a channel that you trust, then name the other side's `cert.pem` as `--peer`.
        If both files are right, somebody is between you.
    """


class DiscoveryError(WireError):
    """A fleet's list of members that cannot be fetched, is malformed, or names nobody whom the policy accepts.

    What to do:
        Is `obfuscatune fleet up` running, and the address of its list right? Compare the authority's fingerprint with
        the one in the policy. While a list is no good, the members known before are used.
    """


class ProtocolError(WireError):
    """Bytes that break docs/spec/wire.md.

    What to do:
        Run the same version on both sides. If it comes again, the worker is broken or hostile: use another.
    """


class BadMagic(ProtocolError):
    """The first bytes are not those of our protocol.

    What to do:
        The address is another program's, or one side speaks TLS and the other does not; the message says which.
    """


class UnsupportedVersion(ProtocolError):
    """No protocol version that both sides speak.

    What to do:
        Install the same version of ObfuscaTune on both sides.
    """


class MalformedMessage(ProtocolError):
    """A field outside its range, or a message out of turn.

    What to do:
        As for `ProtocolError`.
    """


class LimitExceeded(ProtocolError):
    """A size above the limits; refused before anything was allocated.

    What to do:
        Send less at once (`--batch-size`); if a worker's reply was too large, use another worker.
    """


class Truncated(ProtocolError):
    """The stream ended inside a message.

    What to do:
        The peer died in the middle of a message: as for `ConnectionLost`.
    """


class BadReply(WireError):
    """A well-formed reply that does not answer what was asked (shape, dtype, NaN).

    What to do:
        The worker is broken or hostile: use another, and keep a transcript (`obfuscatune worker --record`).
    """


class WrongProduct(WireError):
    """The worker's product is of the right form, finite, and not the product.

    Where there are two workers, the message begins with the one that it came from.

    What to do:
        Do not use this worker any more. The run stopped before the product was used; resume it elsewhere.
    """


class WorkerRefused(WireError):
    """The worker answered with an error.

    What to do:
        The message has the worker's reason; its own stderr says more.
    """


class UnknownMatrix(WorkerRefused):
    """The worker does not hold that matrix (any longer).

    What to do:
        Nothing: matrices that a worker forgot are sent again by themselves. If it comes all the time, the
        worker has too little memory (`--quota`).
    """


class AdapterLost(WorkerRefused):
    """The worker does not hold an adapter that was moved to it, or what a backward pass needs; nobody else does.

    What to do:
        Resume from the last checkpoint. Only `profile="paper"` keeps adapters on the worker.
    """


class QuotaExceeded(WorkerRefused):
    """The worker's memory for matrices is full.

    What to do:
        Start the worker with a larger `--quota`, or with `--when-full evict`; or use another worker.
    """
