"""The newest head of an enclave's log: kept, followed by proof, and never taken back."""

import threading

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from starlette.applications import Starlette
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from obfuscatune.channel.audit_chain import Head
from obfuscatune.cli.verify_log import last_head
from obfuscatune.client.heads import HeadFile
from obfuscatune.errors import ChannelError, ConfigError, ConnectionLost, IntegrityError, StorageError
from obfuscatune.service.audit_log import AuditLog
from tests.client.conftest import served

KEY = Ed25519PrivateKey.generate()
SIGNER = KEY.public_key().public_bytes_raw().hex()


class Enclave:
    """A real log behind a real HTTP server; what it answers can be spoilt."""

    def __init__(self, folder):
        self.folder, self.log = folder, None
        self.status, self.cut, self.asked, self.meanwhile = 200, False, [], []
        self.restart()

    def restart(self, lines=None):
        """With the state that lies there, or with that state's first lines."""
        path = self.folder / "log"
        if self.log is not None:
            self.log.close()
        if lines is not None:
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))
        self.log = AuditLog(path, KEY)

    def work(self, count, what="event"):
        for _ in range(count):
            self.log.append("one", what)

    def app(self):
        def audit_log(request):
            since = int(request.query_params["since"])
            self.asked.append(since)
            if self.status != 200:
                return Response(status_code=self.status)
            copy = b"".join(self.log.copy_for("one", since))
            if self.meanwhile:
                self.meanwhile.pop()()
            if self.cut:
                return StreamingResponse(iter([copy[: len(copy) // 2]]), headers={"content-length": str(len(copy))})
            return StreamingResponse(iter([copy]))

        return Starlette(routes=[Route("/obfuscatune/v1/audit-log", audit_log)])


@pytest.fixture(scope="module")
def port_and_enclaves():
    """One server for all tests; each puts its own enclave behind it."""
    current = []

    async def app(scope, receive, send):
        await (current[-1].app() if current else Starlette())(scope, receive, send)

    with served(app) as port:
        yield port, current


@pytest.fixture
def enclave(tmp_path, port_and_enclaves):
    made = Enclave(tmp_path)
    made.work(5)
    port_and_enclaves[1].append(made)
    yield made
    made.log.close()


@pytest.fixture
def heads(tmp_path):
    return HeadFile(tmp_path / "heads", "enclave.example:7700")


@pytest.fixture
def look(enclave, heads, port_and_enclaves):
    """What `open_api` does: the head that the channel tells, then the proof of it."""

    def look():
        told = heads.expect(enclave.log.head, SIGNER)
        with httpx.Client(base_url=f"http://127.0.0.1:{port_and_enclaves[0]}", trust_env=False) as http:
            return heads.follow(http, SIGNER, told)

    return look


def test_a_log_that_goes_on_is_followed_and_its_newest_head_is_kept(enclave, heads, look):
    assert heads.read() is None
    assert look().count == 5
    enclave.work(300)
    assert look().count == 305
    enclave.restart()
    enclave.work(1)
    assert look().count == look().count == 306
    assert enclave.asked == [5, 5, 305, 306]
    assert heads.path.stat().st_mode & 0o777 == 0o600
    assert heads.path.parent.stat().st_mode & 0o777 == 0o700
    assert last_head(heads.path) == heads.read()  # for `verify-log --since`


def test_a_head_that_is_behind_is_refused_before_anything_else(enclave, heads, look):
    look()
    enclave.restart(lines=3)
    with pytest.raises(IntegrityError, match=r"enclave.example:7700 does not go on from the 5 entries .*it has 3 ent"):
        heads.expect(enclave.log.head, SIGNER)
    enclave.work(2)  # as many again, and others
    with pytest.raises(IntegrityError, match="the last of these is another now"):
        heads.expect(enclave.log.head, SIGNER)
    assert heads.read().count == 5


def test_a_log_that_forked_and_grew_is_refused_by_its_lines(enclave, heads, look):
    """As long as what was seen, or longer: the head alone does not show it."""
    look()
    enclave.restart(lines=3)
    enclave.work(40)
    heads.expect(enclave.log.head, SIGNER)
    with pytest.raises(IntegrityError, match=r"the chain breaks at line 6 .*Once its operator has explained"):
        look()
    assert heads.read().count == 5


def test_a_log_that_is_set_back_while_it_is_used_is_refused(enclave, heads, look, port_and_enclaves):
    told = heads.expect(enclave.log.head, SIGNER)
    look()
    enclave.restart(lines=2)
    with (
        httpx.Client(base_url=f"http://127.0.0.1:{port_and_enclaves[0]}", trust_env=False) as http,
        pytest.raises(IntegrityError, match="the log has 2 entries, and had 5 before"),
    ):
        heads.follow(http, SIGNER, told)


def test_a_head_of_another_signer_is_refused(enclave, heads, look):
    look()
    with pytest.raises(IntegrityError, match="none of the keys"):
        heads.expect(enclave.log.head, "0" * 64)
    for told in (None, {}, [], "head", {"document": {}, "key": SIGNER, "signature": ""}):
        with pytest.raises(IntegrityError):
            heads.expect(lambda told=told: told, SIGNER)


def test_an_answer_that_breaks_off_is_no_proof_of_anything(enclave, heads, look):
    """Neither for the enclave nor against it: an enclave that is killed is not refused for good."""
    look()
    enclave.cut = True
    enclave.work(50)
    with pytest.raises(ConnectionLost):
        look()
    enclave.cut, enclave.status = False, 503
    with pytest.raises(ChannelError, match="503"):
        look()
    assert heads.read().count == 5


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content.replace(b'"count":5', b'"count":2'),
        lambda content: content.replace(b"7700", b"7701"),
        lambda content: content[:40],
        lambda content: b"",
    ],
)
def test_a_kept_head_that_was_changed_is_not_used(enclave, heads, look, spoil):
    look()
    heads.path.write_bytes(spoil(heads.path.read_bytes()))
    with pytest.raises(IntegrityError, match="is not the log head that was kept"):
        look()


def test_a_file_that_others_may_write_and_a_folder_that_we_may_not(enclave, heads, look, tmp_path):
    look()
    heads.path.chmod(0o666)
    with pytest.raises(ConfigError, match="can be changed by everybody"):
        look()
    (tmp_path / "file").write_bytes(b"")
    elsewhere = HeadFile(tmp_path / "file" / "heads", "enclave.example:7700")
    with pytest.raises(StorageError):
        elsewhere.expect(enclave.log.head, SIGNER)


def test_a_head_that_another_program_kept_meanwhile_is_no_reason_to_refuse(enclave, heads, look):
    def ask():
        signed = enclave.log.head()
        enclave.work(1)
        look()  # another program is faster
        return signed

    assert heads.expect(ask, SIGNER).count == 5
    assert heads.read().count == 6


def test_a_newer_head_that_another_program_keeps_meanwhile_stays(enclave, heads, look):
    look()

    def faster():
        enclave.work(10)
        look()

    enclave.meanwhile.append(faster)
    assert look().count == heads.read().count == 15
    assert enclave.asked == [5, 5, 5, 15]


def test_programs_that_share_a_file_never_set_it_back(enclave, heads, look):
    """Each sees another length of the log; what is kept in the end is the longest."""
    failed = []

    def work():
        try:
            for _ in range(5):
                enclave.work(1)
                look()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not failed
    assert look().count == heads.read().count == 25


def test_addresses_have_files_of_their_own(tmp_path):
    names = {HeadFile(tmp_path, it).path for it in ("a:1", "a:11", "[::1]:1", "../x:1", "a%3A1:1", "a/:1")}
    assert len(names) == 6
    assert {it.parent for it in names} == {tmp_path}


def test_a_head_of_a_log_is_read_strictly():
    good = Head(5, bytes(32), 7).to_document()
    assert Head.from_document(good) == Head(5, bytes(32), 7)
    for change in (
        *({"version": 2}, {"version": True}, {"count": -1}, {"count": 2**53 + 1}, {"count": True}, {"count": "5"}),
        *({"chain": "00"}, {"chain": "0A" * 32}, {"chain": None}, {"at": -1}, {"at": 2**60}, {"more": 1}),
    ):
        with pytest.raises(IntegrityError):
            Head.from_document(good | change)
