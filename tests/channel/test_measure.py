"""The inputs that the cloud chooses are claims: what a policy did not foresee fails."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from obfuscatune.channel.client import Attested
from obfuscatune.channel.identity import Identity
from obfuscatune.channel.measure import (
    HARMLESS,
    HARMLESS_OF_SYSTEMD,
    MOST_BYTES,
    MOST_VARIABLES,
    measure_process,
    started_environment,
)
from obfuscatune.errors import ConfigError, VerificationFailed
from tests.channel.parties import Enclave

CONFIGURATION = b"profile: private\n"
FORESEEN: dict[str, Any] = {
    "configuration": [hashlib.sha256(CONFIGURATION).hexdigest()],
    "arguments": [["obfuscatune", "serve", "--config", "service.yaml"]],
    "environment": {"OMP_NUM_THREADS": ["1", "2"], "PATH": ["/usr/bin"]},
}
ARGUMENTS = ["obfuscatune", "serve", "--config", "service.yaml"]
ENVIRONMENT = {"OMP_NUM_THREADS": "2", "PATH": "/usr/bin", "LANG": "C", "LC_ALL": "C", "TERM": "dumb", "PWD": "/"}


@pytest.mark.parametrize(
    ("configuration", "arguments", "environment", "fails"),
    [
        (CONFIGURATION, ARGUMENTS, ENVIRONMENT, None),
        (CONFIGURATION, ARGUMENTS, {}, None),
        (b"profile: paper\n", ARGUMENTS, ENVIRONMENT, "claims.configuration"),
        (CONFIGURATION, [*ARGUMENTS, "--debug"], ENVIRONMENT, "claims.arguments"),
        (CONFIGURATION, ["python", "-X", "dev", *ARGUMENTS], ENVIRONMENT, "claims.arguments"),
        (CONFIGURATION, ARGUMENTS, {**ENVIRONMENT, "OMP_NUM_THREADS": "3"}, "claims.environment.OMP_NUM_THREADS"),
        *(
            (CONFIGURATION, ARGUMENTS, {**ENVIRONMENT, name: "x"}, f"claims.environment.{name}")
            for name in ("LD_PRELOAD", "PYTHONPATH", "HOME", "OBFUSCATUNE_KERNELS", "HF_HOME", "A_NEW_ONE", "lang")
        ),
    ],
)
def test_an_enclave_that_was_started_otherwise_is_refused(
    configuration: bytes, arguments: list[str], environment: dict[str, str], fails: str | None
) -> None:
    measured = measure_process(configuration, arguments, environment)
    enclave, client = Enclave(**measured._asdict()), Identity.generate("owner")
    policy = enclave.policy(**FORESEEN)
    with enclave.server() as server:
        if fails is None:
            Attested.connect(server.address, client, policy).close()
            return
        with pytest.raises(VerificationFailed) as error:
            Attested.connect(server.address, client, policy)
    assert [check.name for check in error.value.checks if not check.passed] == [fails]


def test_a_process_measures_its_own_interpreter_and_environment() -> None:
    code = (
        "import json, os; os.environ['LD_BIND_NOW'] = '2'; os.environ['SET_SINCE'] = '';"
        "from obfuscatune.channel.measure import measure_process;"
        "print(json.dumps(measure_process(b'')._asdict()))"
    )
    command = [sys.executable, "-X", "utf8", "-c", code]
    environment = {**os.environ, "LD_BIND_NOW": "1", "LANG": "C"}
    result = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=60)
    measured = json.loads(result.stdout)
    assert measured["arguments"] == command
    assert measured["environment"]["LD_BIND_NOW"] == "1"
    assert not {"LANG", "SET_SINCE"} & set(measured["environment"])
    assert measured["configuration"] == hashlib.sha256(b"").hexdigest()


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=20), st.text(max_size=20), max_size=10))
def test_all_is_claimed_but_what_is_known_to_be_harmless(environment: dict[str, str]) -> None:
    try:
        claimed = measure_process(b"", [], environment).environment
    except ConfigError:
        assert any("\ud800" <= character <= "\udfff" for it in environment.items() for character in "".join(it))
        return
    left_out = set(environment) - set(claimed)
    assert all(name in HARMLESS | HARMLESS_OF_SYSTEMD or name.startswith("LC_") for name in left_out)
    assert all(environment[name] == value for name, value in claimed.items())


def test_what_cannot_be_claimed_is_refused() -> None:
    for arguments, environment in (
        ([], {f"V{number}": "" for number in range(MOST_VARIABLES + 1)}),
        (["x" * (MOST_BYTES + 1)], {}),
        ([], {"NAME": "\udcff"}),
    ):
        with pytest.raises(ConfigError):
            measure_process(b"", arguments, environment)


@pytest.mark.parametrize("block", [b"A=1\0A=2\0", b"A\0"])
def test_an_environment_that_is_ambiguous_is_refused(block: bytes, tmp_path: Path) -> None:
    (tmp_path / "environ").write_bytes(b"B=\0" + block)
    with pytest.raises(ConfigError, match="'A' twice"):
        started_environment(tmp_path / "environ")


def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Linux"):
        started_environment(tmp_path / "nowhere")
