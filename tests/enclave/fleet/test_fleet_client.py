"""A fleet acts as one worker: products are the products, whoever answers, fails, hangs or lies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from obfuscatune.enclave.fleet import open_fleet, roster
from obfuscatune.enclave.fleet.link import State
from obfuscatune.errors import ConfigError, ConnectionLost, ProtectionError, QuotaExceeded, WrongProduct
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.fleet.placement import ALL, Plan
from obfuscatune.protocol.endpoints import UnixAddress
from tests.enclave.fleet.members import Made, holders, made, members, stored
from tests.worker.serving import serving

NARROW = 16
"""So that small matrices are cut."""


def product(fleet: Made, matrix_id: bytes, rows: torch.Tensor, *, transpose: bool = False) -> torch.Tensor:
    return fleet.client.multiply(matrix_id, rows, transpose=transpose)


@pytest.mark.parametrize("replicas", [1, 2, ALL])
def test_products_are_those_of_the_matrix(replicas: int) -> None:
    with made(3, Plan(replicas, least_columns=NARROW)) as fleet:

        @settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(
            st.integers(1, 40), st.integers(1, 60), st.integers(1, 200),
            st.sampled_from([torch.float32, torch.float64, torch.bfloat16]), st.booleans(),
        )  # fmt: skip
        def check(m: int, p: int, q: int, dtype: torch.dtype, transpose: bool) -> None:
            W = torch.randn(p, q).to(dtype)
            rows = torch.randn(m, q if transpose else p).to(dtype)
            matrix_id = stored(fleet.client, W)
            came = product(fleet, matrix_id, rows, transpose=transpose)
            exact = rows.double() @ (W.double().T if transpose else W.double())
            size = rows.double().norm() * W.double().norm()
            assert came.dtype == dtype
            assert (came.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * size, "as exact as one product"
            fleet.client.forget(matrix_id)

        check()
        assert fleet.notices == []


def test_sums_over_shards_do_not_depend_on_who_is_first() -> None:
    """Backward products are summed in the order of the columns."""
    W, g = torch.randn(24, 96), torch.randn(5, 96)
    with made(3, Plan(least_columns=NARROW)) as fleet:
        matrix_id = stored(fleet.client, W)
        assert len(holders(fleet)) == 3
        first = product(fleet, matrix_id, g, transpose=True)
        slow = fleet.members[fleet.client.placement()[0].holders[0]]
        slow.free.clear()
        pending = fleet.client.submit(matrix_id, g, transpose=True)
        deadline = time.monotonic() + 20
        while len(pending.undone) > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
        slow.free.set()
        assert torch.equal(pending.result(), first)


def test_a_late_answer_is_asked_of_another_replica_and_the_first_counts() -> None:
    W, x = torch.randn(20, 40), torch.randn(3, 20)
    with made(2, Plan(2, shard=False)) as fleet:
        matrix_id = stored(fleet.client, W)
        for it in fleet.members.values():
            it.free.clear()
        pending = fleet.client.submit(matrix_id, x, transpose=False)
        (asked,) = pending.parts[0].asked
        for it in fleet.members.values():
            if it is not fleet.members[asked.name]:
                it.free.set()
        for _ in range(3):
            started = time.monotonic()
            came = pending.result()
            assert time.monotonic() - started < 3
            torch.testing.assert_close(came, x @ W)
            pending = fleet.client.submit(matrix_id, x, transpose=False)
        assert fleet.client.stats.hedged >= 1
        assert fleet.client.stats.lost == 0, "it answers probes: it is slow, not dead"
        fleet.members[asked.name].free.set()
        torch.testing.assert_close(product(fleet, matrix_id, 2 * x), 2 * x @ W)


def test_without_hedging_a_late_answer_is_waited_for() -> None:
    W, x = torch.randn(20, 40), torch.randn(3, 20)
    with made(2, Plan(2, shard=False), hedge=False) as fleet:
        matrix_id = stored(fleet.client, W)
        for it in fleet.members.values():
            it.free.clear()
        pending = fleet.client.submit(matrix_id, x, transpose=False)
        assert not pending.arrived.wait(0.2)
        for it in fleet.members.values():
            it.free.set()
        torch.testing.assert_close(pending.result(), x @ W)
        assert fleet.client.stats.hedged == 0


@pytest.mark.parametrize("transpose", [False, True])
@pytest.mark.parametrize("plan", [Plan(least_columns=NARROW), Plan(2, shard=False)], ids=["shards", "replicas"])
def test_who_answers_wrongly_is_named_and_left_for_good(plan: Plan, transpose: bool) -> None:
    """As a check of the whole product has it: `corrected` finds who was wrong, and has the right product."""
    W, x = torch.randn(20, 96), torch.randn(3, 96 if transpose else 20)
    with made(3, plan) as fleet:
        matrix_id = stored(fleet.client, W)
        liar = holders(fleet)[0][0]
        fleet.members[liar].lie = 1e-2
        exact = x @ (W.T if transpose else W)
        for _ in range(20):  # a replica may answer in its place
            pending = fleet.client.submit(matrix_id, x, transpose=transpose)
            if not torch.allclose(pending.result(), exact, atol=1e-3):
                break
        came = fleet.client.corrected(pending, WrongProduct("a check refused it"), None)
        torch.testing.assert_close(came, exact)
        assert fleet.named("answered wrongly") == [liar]
        assert fleet.client.stats.left_wrong == 1
        before = fleet.members[liar].products
        for _ in range(20):
            torch.testing.assert_close(product(fleet, matrix_id, x, transpose=transpose), exact)
        assert fleet.members[liar].products == before, "it is asked nothing any more"
        assert not any(liar in of_shard for of_shard in holders(fleet))


def test_what_a_liar_answered_and_nobody_used_is_asked_again() -> None:
    W, x = torch.randn(20, 96), torch.randn(3, 20)
    with made(3, Plan(least_columns=NARROW)) as fleet:
        matrix_id = stored(fleet.client, W)
        liar = holders(fleet)[1][0]
        fleet.members[liar].lie = 1e-2
        first, second = (fleet.client.submit(matrix_id, rows, transpose=False) for rows in (x, 2 * x))
        first.result()
        deadline = time.monotonic() + 20
        while second.undone and time.monotonic() < deadline:
            time.sleep(0.001)
        fleet.client.corrected(first, WrongProduct("a check refused it"), None)
        torch.testing.assert_close(second.result(), 2 * x @ W)


def test_when_all_were_wrong_nothing_is_asked_any_more() -> None:
    W, x = torch.randn(20, 40), torch.randn(3, 20)
    with made(2, Plan(shard=False)) as fleet:
        matrix_id = stored(fleet.client, W)
        for it in fleet.members.values():
            it.lie = 1.0
        for _ in range(2):
            pending = fleet.client.submit(matrix_id, x, transpose=False)
            pending.result()
            try:
                fleet.client.corrected(pending, WrongProduct("a check refused it"), None)
            except WrongProduct:
                break
        with pytest.raises(WrongProduct, match="load or protect the model anew"):
            fleet.client.submit(matrix_id, x, transpose=False)
        with pytest.raises(WrongProduct, match="load or protect the model anew"):
            stored(fleet.client, W, b"n" * 16)


def test_a_product_that_is_not_finite_is_never_taken() -> None:
    W, x = torch.randn(20, 96), torch.randn(3, 20)
    with made(3, Plan(least_columns=NARROW)) as fleet:
        matrix_id = stored(fleet.client, W)
        liar = holders(fleet)[0][0]
        fleet.members[liar].lie = float("nan")
        torch.testing.assert_close(product(fleet, matrix_id, x), x @ W)
        assert fleet.named("answered wrongly") == [liar]


def test_who_is_slow_again_and_again_is_left_for_a_while() -> None:
    W, x = torch.randn(20, 40), torch.randn(3, 20)
    with made(3, Plan(ALL, shard=False)) as fleet:
        matrix_id = stored(fleet.client, W)
        slow = sorted(fleet.members)[0]
        member = fleet.members[slow]
        honest = member.multiply

        def slowly(*args: torch.Tensor, transpose: bool) -> None:
            time.sleep(0.15)
            honest(*args, transpose=transpose)

        for _ in range(30):
            product(fleet, matrix_id, x)
        member.multiply = slowly  # type: ignore[method-assign]
        pending = [fleet.client.submit(matrix_id, x, transpose=False) for _ in range(150)]
        for it in pending:
            torch.testing.assert_close(it.result(), x @ W)
        deadline = time.monotonic() + 20
        while not fleet.named("slow again and again") and time.monotonic() < deadline:
            product(fleet, matrix_id, x)
        assert fleet.named("slow again and again") == [slow]
        assert fleet.client.stats.left_slow == 1
        assert not any(slow in of_shard for of_shard in holders(fleet))


def test_memory_is_kept_to_and_too_little_of_it_is_said() -> None:
    with made(2, Plan(least_columns=NARROW)) as fleet:
        links = fleet.client.links
        links[0].full_at, links[1].full_at = 20 * 32 * 4, 20 * 96 * 4
        W = torch.randn(20, 128)
        matrix_id = stored(fleet.client, W)
        columns = {shard.holders[0]: shard.columns for shard in fleet.client.placement()}
        assert columns == {links[0].name: 32, links[1].name: 96}
        x = torch.randn(2, 20)
        torch.testing.assert_close(product(fleet, matrix_id, x), x @ W)
        with pytest.raises(QuotaExceeded, match="add workers, or memory"):
            stored(fleet.client, W, b"n" * 16)
        torch.testing.assert_close(product(fleet, matrix_id, x), x @ W)


def test_who_refused_a_matrix_for_its_quota_is_sent_no_more_than_it_has(tmp_path: Path) -> None:
    """Nobody said beforehand how much memory it has; the other member holds what it refused, and all that comes."""
    W, x = torch.randn(64, 64), torch.randn(2, 64)
    folders = [tmp_path / name for name in ("small", "large")]
    for folder in folders:
        folder.mkdir()
    quota = 300_000  # the matrix that measures its speed takes 262,144 of it for a while
    with serving(folders[0], quota_bytes=quota) as small, serving(folders[1]) as large:
        fleet = replace(Fleet.of_addresses([str(it.address) for it in (small, large)]), plan=Plan(shard=False))
        with open_fleet(fleet) as client:
            (of_small,) = [it for it in client.links if it.name == str(small.address)]
            for link in client.links:
                link.timing.speed = 1e9  # the same, whatever else this machine does: each is given half
            for number in range(1, 40):
                matrix_id = stored(client, W, bytes([number]) * 16)
                torch.testing.assert_close(client.multiply(matrix_id, x, transpose=False), x @ W)
            held = [shard for shard in client.placement() if of_small.name in shard.holders]
            assert of_small.full_at == len(held) * W.nbytes <= quota
            sent = of_small.worker.stats.uploads  # type: ignore[union-attr]
            for number in range(40, 50):
                stored(client, W, bytes([number]) * 16)
            assert of_small.worker.stats.uploads == sent, "it is sent nothing that it has no room for"  # type: ignore[union-attr]


def test_members_that_are_to_be_waited_for_are_there_before_anything_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("obfuscatune.enclave.fleet.client.OPENING_SECONDS", 0.0)
    late = UnixAddress(tmp_path / "late.sock")
    with members(1) as them, ThreadPoolExecutor(1) as pool:
        (first,) = them.values()
        fleet = replace(Fleet.of_addresses([*them, str(late)]), wait_for={"compute": 2})
        with pytest.raises(ConnectionLost, match="1 workers of the fleet answer, and 2 are to be waited for"):
            open_fleet(fleet, patience_s=0.05)
        opened = pool.submit(open_fleet, fleet)
        deadline = time.monotonic() + 20
        while not first.products and time.monotonic() < deadline:
            time.sleep(0.001)
        assert not opened.done()
        with serving(tmp_path, listen=late), opened.result(20) as client:
            assert client.stats.workers == 2


def test_who_fails_as_soon_as_it_has_joined_is_let_alone_for_longer_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is sent its shards each time: one that dies of them, or means to, must not take all of the enclave's link."""
    monkeypatch.setattr(roster, "FIRST_PAUSE", 0.01)
    with made(2, Plan()) as fleet:
        link, pauses = fleet.client.links[0], []
        for steady in (False, False, False, True):
            if steady:
                link.active_since -= roster.STEADY_SECONDS
            fleet.client._roster.failed(link, ConnectionLost("it died"), [])
            pauses.append(link.pause)
            deadline = time.monotonic() + 20
            while link.state is not State.ACTIVE and time.monotonic() < deadline:
                time.sleep(0.001)
        assert pauses == [0.01, 0.02, 0.04, 0.01]


def test_who_cannot_be_told_anything_does_not_stop_the_work() -> None:
    """As when stderr is a pipe that nobody reads any more."""
    W, x = torch.randn(20, 96), torch.randn(3, 20)

    def notice(line: str) -> None:
        raise BrokenPipeError(line)

    with members(3) as them:
        fleet = replace(Fleet.of_addresses(list(them)), plan=Plan(least_columns=NARROW))
        with open_fleet(fleet, notice=notice) as client:
            matrix_id = stored(client, W)
            liar = client.placement()[0].holders[0]
            them[liar].lie = float("nan")
            torch.testing.assert_close(client.multiply(matrix_id, x, transpose=False), x @ W)
            assert client.stats.left_wrong == 1


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_failure_of_our_own_is_told_and_nobody_waits_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    W, x = torch.randn(20, 96), torch.randn(3, 20)
    with made(2, Plan(shard=False)) as fleet:
        matrix_id = stored(fleet.client, W)
        for name in ("answered", "failed"):

            def broken(*_: object) -> None:
                raise RuntimeError("a mistake of ours")

            monkeypatch.setattr(roster.Roster, name, broken)
        with pytest.raises(ProtectionError, match="failed in the enclave itself"):
            product(fleet, matrix_id, x)


def test_nothing_is_asked_after_close() -> None:
    W = torch.randn(20, 40)
    with made(2, Plan()) as fleet:
        matrix_id = stored(fleet.client, W)
        with pytest.raises(ConfigError, match="no matrix was stored"):
            product(fleet, b"x" * 16, torch.randn(2, 20))
        fleet.client.close()
        fleet.client.close()
        with pytest.raises(ProtectionError, match="closed"):
            product(fleet, matrix_id, torch.randn(2, 20))
