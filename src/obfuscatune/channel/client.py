"""The end that verifies: no request and no secret goes out before the enclave's evidence was accepted.

Any failure closes the session, and it stays closed: a new one is verified anew.
"""

import datetime
import socket
from types import TracebackType
from typing import Any, Self

from obfuscatune import documents
from obfuscatune.attest.binding import NONCE_BYTES, Binding
from obfuscatune.attest.claims import ROLE, Claims
from obfuscatune.attest.evidence import Evidence
from obfuscatune.attest.policy import Policy
from obfuscatune.attest.verification import Verified, verify
from obfuscatune.channel.binding import release_info
from obfuscatune.channel.hpke import seal
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.messages import KINDS, Hello, MessageType, Reply, Request, parse_body
from obfuscatune.channel.session import Session, tls_context
from obfuscatune.errors import ChannelError, ConnectionLost, IntegrityError, TermsError, UntrustedPeer
from obfuscatune.protocol.endpoints import TcpAddress
from obfuscatune.protocol.limits import UNREACHABLE_SECONDS
from obfuscatune.protocol.transport import Deadline, tune

CONNECT_SECONDS = 30.0
REQUEST_SECONDS = 120.0
