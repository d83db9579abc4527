"""Load, and kill -9 at random moments: no job is lost or doubled, no file, nothing of one owner reaches another."""

import json
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from obfuscatune.client.jobs import submit
from obfuscatune.errors import ObfuscaTuneError
from tests.parties.world import MODEL, World, run

pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]
CLIENTS = 50
SECONDS = 60
KILLS = 20
OWNERS = ("alice", "bob", "carol")
PATIENCE_S = 300.0


def canary(owner: str) -> str:
    return f"canary-of-{owner}-5f1d"


def records(owner: str, count: int = 8) -> bytes:
    lines = ({"prompt": f"{canary(owner)} {n}", "completion": f" is {n}"} for n in range(count))
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


class Client(threading.Thread):
    """One that asks until it is told to end; counts answers and failures, and looks for what is another's."""

    def __init__(self, owner: str, service, over: threading.Event) -> None:
        super().__init__(daemon=True)
        self.owner, self.service, self.over = owner, service, over
        self.answers = self.tokens = 0
        self.refused: dict[int, int] = {}
        self.strange: list[str] = []

    def run(self) -> None:
        others = [canary(it) for it in OWNERS if it != self.owner]
        asked = {"model": MODEL, "prompt": f"{canary(self.owner)} 1", "max_tokens": 8, "temperature": 0}
        while not self.over.is_set():
            with suppress(httpx.TransportError):
                reply = self.service.http.post("/v1/completions", json=asked)
                if any(it in reply.text for it in others):
                    self.strange.append(reply.text)
                if reply.status_code == 200:
                    self.answers += 1
                    self.tokens += reply.json()["usage"]["completion_tokens"]
                else:
                    self.refused[reply.status_code] = self.refused.get(reply.status_code, 0) + 1


def wait_until_ready(world: World, owner: str) -> None:
    ends = time.monotonic() + PATIENCE_S
    with world.service(owner) as service:
        asked = {"model": MODEL, "prompt": "note", "max_tokens": 1}
        while service.http.post("/v1/completions", json=asked).status_code != 200:
            assert time.monotonic() < ends
            time.sleep(0.1)


def test_fifty_clients_for_a_minute(tmp_path: Path, record_property) -> None:
    world, over = World(tmp_path, OWNERS), threading.Event()
    with world.running():
        wait_until_ready(world, "alice")
        services = [world.service(owner) for owner in OWNERS]
        opened = [it.__enter__() for it in services]
        clients = [Client(OWNERS[n % 3], opened[n % 3], over) for n in range(CLIENTS)]
        for client in clients:
            client.start()
        over.wait(SECONDS)
        over.set()
        for client in clients:
            client.join(60)
        for service in services:
            service.__exit__(None, None, None)
        refused = {status for client in clients for status in client.refused}
        answers = sum(client.answers for client in clients)
        print(f"{answers} answers, {sum(it.tokens for it in clients) / SECONDS:.1f} tokens/s, refused {refused}")
        assert answers > CLIENTS
        assert all(client.answers for client in clients)  # nobody starves
        assert refused <= {429, 503}
        assert not any(client.strange for client in clients)


def upload(service, owner: str) -> str:
    files = {"file": (f"{canary(owner)}.jsonl", records(owner), "application/jsonl")}
    return str(service.document("POST", "/v1/files", data={"purpose": "fine-tune"}, files=files)["id"])


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    draw = random.Random(19)
    world = World(tmp_path, OWNERS)
    kept: dict[str, dict[str, str]] = {owner: {} for owner in OWNERS}
    jobs: dict[str, list[str]] = {owner: [] for owner in OWNERS}
    with world.running():
        wait_until_ready(world, "alice")
        for kill in range(KILLS):
            stop = threading.Event()
            workers = [threading.Thread(target=_work, args=(world, owner, stop, kept, jobs)) for owner in OWNERS]
            for thread in workers:
                thread.start()
            stop.wait(draw.uniform(0.5, 6.0))
            victims = draw.choice((["service"], ["worker"], ["service", "worker"]))
            for victim in victims:
                world.kill(victim)
            stop.set()
            for thread in workers:
                thread.join(60)
            if "worker" in victims:
                world.start_worker()
            if "service" in victims:
                world.start_service()
                world.grant()
            for owner in OWNERS:
                _nothing_is_lost(world, owner, kept[owner], jobs[owner], kill)
        ends = time.monotonic() + PATIENCE_S
        for owner in OWNERS:
            with world.service(owner) as service:
                while any(job["status"] in ("queued", "running", "validating_files") for job in _jobs(service)):
                    assert time.monotonic() < ends
                    time.sleep(0.5)
                assert {job["status"] for job in _jobs(service)} <= {"succeeded"}
                for job in jobs[owner]:
                    assert service.request("GET", f"/obfuscatune/v1/jobs/{job}/receipt").status_code == 200
        run("owner", "audit-log", *world.options("alice"), "--out", tmp_path / "audit.jsonl")
        assert "entries" in run("verify-log", tmp_path / "audit.jsonl", "--policy", tmp_path / "policy.yaml")
    text = canary("")[:10].encode()
    for path in (tmp_path / "cloud").rglob("*"):
        assert not path.is_file() or text not in path.read_bytes(), path


def _work(world: World, owner: str, stop: threading.Event, kept: dict, jobs: dict) -> None:
    """Upload, start jobs and ask, until the service is gone. What it acknowledged must be there for ever."""
    with suppress(ObfuscaTuneError, httpx.HTTPError), world.service(owner) as service:
        while not stop.is_set():
            file = upload(service, owner)
            kept[owner][file] = records(owner).decode()
            if len(jobs[owner]) < 5:
                path = world.root / owner / "data.jsonl"
                path.write_bytes(records(owner))
                hyperparameters = {"n_epochs": 1, "batch_size": 4}
                jobs[owner].append(submit(service, path, MODEL, hyperparameters=hyperparameters, seed=1)["id"])
            asked = {"model": MODEL, "prompt": canary(owner), "max_tokens": 4}
            service.http.post("/v1/completions", json=asked)


def _jobs(service) -> list[dict]:
    return service.document("GET", "/v1/fine_tuning/jobs", params={"limit": 100})["data"]


def _nothing_is_lost(world: World, owner: str, kept: dict[str, str], jobs: list[str], kill: int) -> None:
    with world.service(owner) as service:
        found = [job["id"] for job in _jobs(service)]
        assert len(set(found)) == len(found)
        assert set(jobs) <= set(found), f"after kill {kill}"
        files = list(kept)
        with ThreadPoolExecutor(4) as pool:
            contents = pool.map(lambda it: service.request("GET", f"/v1/files/{it}/content").text, files)
        assert dict(zip(files, contents, strict=True)) == kept, f"after kill {kill}"
        others = [canary(it) for it in OWNERS if it != owner]
        assert not any(it in json.dumps(_jobs(service)) for it in others)
