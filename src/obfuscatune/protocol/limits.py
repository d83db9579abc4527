"""The limits of the wire protocol, each with its unit and reason. A test compares them with docs/spec/wire.md."""

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

VERSION = 1
"""The only version of the protocol so far."""

MAX_DIM = 2**20
"""Most rows or columns of a matrix: four times the largest vocabulary in use (262,144)."""

MAX_MATRIX_BYTES = 16 * GIB
"""Largest payload of a STORE or a PRODUCT. A Llama-3-70B head in float64 (128,256 x 8,192 x 8) takes 8.4 GB."""

MAX_WINDOW_BYTES = 2 * GIB
"""Most payload of all MULTIPLY requests in flight on one connection: twice 4,096 rows of 57,344 float32."""

MAX_IN_FLIGHT = 8
"""Most requests in flight on one connection. Two hide the worker's latency; the others are reserve."""

MAX_ERROR_BYTES = 512
"""Longest text of an ERROR: a few lines on a terminal."""

MAX_SHARED_BYTES = GIB
"""Most shared memory of one connection. The enclave allocates it; the worker only maps it."""

SHARED_BYTES = 256 * MIB
"""Default shared memory of a connection: 8 matrices of 512 x 14,336 float32. Untouched pages take no memory."""

MAX_JOINED = 16
"""Most published weights that lie side by side in one matrix: q, k and v are three."""

MAX_SLICES = 16
"""Most slices of an adapter: layers that share one matrix. q, k and v are three."""

MAX_RANK = 4096
"""Largest rank of an adapter: far above any in use."""

MAX_ADAPTERS = 16384
"""Most adapters of one session: thirty times those of the deepest models, with four in each block."""

MAX_KEPT_FORWARDS = 64
"""Most forward passes of one adapter that wait for their backward pass; the oldest is dropped."""

CHUNK_BYTES = 4 * MIB
"""Most bytes in one system call: deadlines are checked between calls, and TLS works within the cache."""

SOCKET_BUFFER_BYTES = 4 * MIB
"""SO_SNDBUF and SO_RCVBUF: a 512 x 2048 float32 matrix is sent in one call."""

HANDSHAKE_SECONDS = 10.0
"""Longest time from accepting a connection to a complete HELLO: a silent peer holds a thread no longer."""

MAX_HANDSHAKES = 32
"""Most connections before their HELLO. One more closes the oldest one of the address that has most of them."""

MAX_SESSIONS = 64
"""Most sessions of a worker, by default. Beyond, a new one replaces a session of a peer that has more of them."""

MAX_SESSION_CONNECTIONS = 4
"""Most connections of one session; one more closes the oldest. An enclave has one, or two while it reconnects."""

MAX_MATRICES = 16384
"""Most matrices of one session: ten times those of the deepest models. Each takes memory besides its elements."""

EMPTY_IDLE_SECONDS = 300.0
"""A worker closes a connection without a request for this time, if its session holds nothing."""

CONNECTION_IDLE_SECONDS = 1800.0
"""The same, if its session holds matrices. They stay for IDLE_SECONDS more, for an enclave that reconnects."""

IDLE_SECONDS = 3600.0
"""A worker drops a session without a connection after this time: longer than the restart of an enclave."""

REPLACED_AFTER_SECONDS = 60.0
"""When a worker's sessions are all taken, a new one may replace a session of the same peer that was idle for this
time, or of any peer if it has no connection either."""

KEEPALIVE_SECONDS = 15.0
"""TCP_KEEPIDLE: idle time before the first probe. NATs forget a connection after minutes (RFC 5382: two hours)."""

KEEPALIVE_INTERVAL_SECONDS = 5.0
"""TCP_KEEPINTVL: time between two unanswered probes."""

KEEPALIVE_PROBES = 3
"""TCP_KEEPCNT: unanswered probes after which the connection is lost."""

UNREACHABLE_SECONDS = 20.0
"""TCP_USER_TIMEOUT of the enclave: the connection is lost when sent data is not acknowledged for this time. That of a
worker is STALL_SECONDS, since an enclave need not read its replies at once."""

IDLE_CHECK_SECONDS = 5.0
"""An enclave probes a network connection that was idle for this time before it sends on it. Without an answer within
this time again, it reconnects."""

STALL_SECONDS = 120.0
"""Longest time for a worker to receive one message, plus its size over SLOWEST_BYTES_PER_SECOND."""

SLOWEST_BYTES_PER_SECOND = MIB
"""A link slower than this (8 Mbit/s) counts as broken."""

LINGER_SECONDS = 2.0
"""How long a worker that hangs up waits for its last words to be read."""
