"""Every number of the wire protocol, with unit and reason. docs/spec/wire.md has the same; a test compares them."""

from obfuscatune.errors import ConfigError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

VERSION = 1
"""The protocol version spoken here; also the only one."""

MAX_DIM = 2**20
"""Rows or columns of any matrix: four times the largest vocabulary in use (262,144)."""

MAX_MATRIX_BYTES = 16 * GIB
"""Payload of a STORE or a PRODUCT. A Llama-3-70B head in float64 (128,256 x 8,192 x 8) takes 8.4 GB."""

MAX_WINDOW_BYTES = 2 * GIB
"""Payload of the MULTIPLY requests of one connection that await their reply: twice 4,096 rows of 57,344 float32."""

MAX_IN_FLIGHT = 8
"""Requests of one connection that await their reply. Two hide the worker's latency; the rest is slack."""

MAX_ERROR_BYTES = 512
"""Text of an ERROR: a few lines of terminal."""

MAX_SHARED_BYTES = GIB
"""Memory that one connection shares. It is the enclave's; the worker only maps it."""

SHARED_BYTES = 256 * MIB
"""Memory that an enclave shares by default: 8 matrices of 512 x 14,336 float32. Pages never touched cost nothing."""

MAX_SLICES = 16
"""Layers whose adapters one matrix carries: q, k and v make three."""

MAX_RANK = 4096
"""Of an adapter: far above any in use, and below the width of the models that would want it."""

MAX_ADAPTERS = 16384
"""Of one session: four for each block of the deepest models, thirty times over."""

MAX_KEPT_FORWARDS = 64
"""Forward passes of one adapter whose backward pass did not come yet; the oldest is let go."""

CHUNK_BYTES = 4 * MIB
"""Most bytes handed to one system call, so that a deadline is noticed soon, and TLS works within the cache."""

SOCKET_BUFFER_BYTES = 4 * MIB
"""SO_SNDBUF and SO_RCVBUF: a 512 x 2048 float32 matrix leaves the sender in one call."""

HANDSHAKE_SECONDS = 10.0
"""From the accepted connection to a complete HELLO: a stranger who says nothing costs a thread no longer."""

MAX_HANDSHAKES = 32
"""Connections at a time that have not said HELLO yet. One more ends the oldest of the address that has most of them."""

MAX_SESSIONS = 64
"""Sessions of a worker at a time, by default. A peer that has more of them than another gives way to that one."""

MAX_SESSION_CONNECTIONS = 4
"""Connections of one session; one more ends the oldest. An enclave has one, or two while the first is half open."""

MAX_MATRICES = 16384
"""Of one session: ten times those of the deepest models. Each takes some memory besides its elements."""

EMPTY_IDLE_SECONDS = 300.0
"""A connection without a request for so long is closed where its session holds nothing."""

CONNECTION_IDLE_SECONDS = 1800.0
"""The same where it holds something. The enclave connects again, and finds its matrices, within IDLE_SECONDS more."""

IDLE_SECONDS = 3600.0
"""A session without a connection is forgotten after this. Longer than any restart of an enclave."""

REPLACED_AFTER_SECONDS = 60.0
"""Where all places are taken, a session that was idle for so long gives way to another of the same peer; one without a
connection, to any."""

KEEPALIVE_SECONDS = 15.0
"""An idle TCP connection is probed after this: sooner than a NAT forgets it (RFC 5382: two hours; many: a minute)."""

KEEPALIVE_INTERVAL_SECONDS = 5.0
"""Between two such probes without an answer."""

KEEPALIVE_PROBES = 3
"""So many without an answer, and the connection is lost."""

UNREACHABLE_SECONDS = 20.0
"""TCP_USER_TIMEOUT of the enclave: a worker whose system acknowledges nothing for so long is lost. A worker bears
STALL_SECONDS: an enclave need not read its replies at once."""

IDLE_CHECK_SECONDS = 5.0
"""Before an enclave sends on a network connection that was idle for so long, it asks for a sign of life; and waits for
it as long again, before it connects anew."""

STALL_SECONDS = 120.0
"""From the first byte of a message to its last, at the worker, besides what its size takes at the slowest rate."""

SLOWEST_BYTES_PER_SECOND = MIB
"""A link slower than 8 Mbit/s is taken for broken."""

LINGER_SECONDS = 2.0
"""How long a worker that hangs up waits for its last words to be read."""

UNITS = {"KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024 * GIB, "": 1}
"""Of sizes that people write."""


def parse_size(text: str) -> int:
    """Bytes from "8GiB", "512 MiB" or "1000000".

    Raises:
        ConfigError: anything else.
    """
    digits = text.rstrip("KMGTiB ")
    unit = text[len(digits) :].strip()
    if not digits.isascii() or not digits.isdigit() or unit not in UNITS:
        raise ConfigError(f"{text!r} is no size: write bytes, or a number with KiB, MiB, GiB or TiB, as 8GiB")
    return int(digits) * UNITS[unit]
