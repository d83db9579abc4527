"""The service under `guarded`: what was sent under masks counts on after a restart."""

import json
import time

import pytest

from tests.parties.world import MODEL, World

pytestmark = pytest.mark.long


def ask(world: World) -> str:
    """An answer, once the model is there."""
    ends = time.monotonic() + 120
    asked = {"model": MODEL, "prompt": "note 3:", "max_tokens": 8, "temperature": 0}
    with world.service("alice") as service:
        while (reply := service.http.post("/v1/completions", json=asked)).status_code != 200:
            assert time.monotonic() < ends, reply.text
            time.sleep(0.1)
    return str(reply.json()["choices"][0]["text"])


def rows(world: World) -> int:
    (path,) = (world.cloud / "state" / "masks").glob("*/masks.json")
    return int(json.loads(path.read_text())["rows"])


def test_the_account_goes_on_after_a_restart(tmp_path) -> None:
    world = World(tmp_path, ("alice",), profile="guarded")
    with world.running():
        text = ask(world)
        before = rows(world)
        assert before > 0
        world.kill("service")
        world.start_service()
        world.grant()
        assert ask(world) == text
        assert rows(world) > before
