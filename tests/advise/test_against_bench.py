"""What `advise` predicts, beside what `bench` measures of the same work. It takes minutes, and an idle machine."""

import json
import os
import subprocess
import sys

import pytest

from obfuscatune.advise.work import KINDS, Kind
from obfuscatune.bench import step as step_module
from obfuscatune.bench.step import OWN_WAITING, StepBench
from obfuscatune.bench.workload import NEW_TOKENS

pytestmark = pytest.mark.long
SHAPE = {"shape": "gpt2", "layers": 3}
SIZES: dict[Kind, tuple[int, int]] = {"step": (1, 128), "forward": (1, 128), "decode": (4, 32)}
OFF_BY = 0.3
"""A prediction may be off by so much of the ratio: work and speeds are coarse models, and no round is as the last."""


@pytest.mark.parametrize("profile", ["private", "guarded"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_as_measured(kind: Kind, profile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, length = SIZES[kind]
    monkeypatch.setattr(step_module, "PLAIN_WAITING", {"brief": OWN_WAITING})
    bench = StepBench(
        work=kind,
        **SHAPE,
        batch=batch,
        length=length,
        threads=1,
        rounds=5,
        warmup=2,
        profiles=(profile,),  # type: ignore[arg-type]
    )
    measured = bench.run(lambda line: None)
    command = [sys.executable, "-m", "obfuscatune", "advise", "--shape", "gpt2", "--layers", "3", "--work", kind]
    command += ["--batch", str(batch), "--length", str(length), "--threads", "1", "--profile", profile, "--json"]
    said = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, check=True)
    predicted = json.loads(said.stdout)
    worker = predicted["workers"][0]
    calls = NEW_TOKENS if kind == "decode" else 1
    shown = {
        "plain": (predicted["plain_seconds"] * calls, measured.plain.seconds),
        "protected": (worker["seconds"] * calls, measured.protected[profile].seconds),
        "ratio": (worker["ratio"], measured.ratio(profile)),
    }
    print(kind, profile, shown, worker["parts"], measured.protected[profile].breakdown(), sep="\n")
    assert worker["ratio"] == pytest.approx(measured.ratio(profile), rel=OFF_BY)
