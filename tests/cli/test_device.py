"""Commands with a device of this machine as the worker, and the enclave's own part on one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from obfuscatune.enclave import placement
from obfuscatune.enclave.placement import enclave_device
from obfuscatune.errors import ConfigError
from obfuscatune.service.settings import Settings, Worker

Run = Callable[..., Any]
ONE_HAND = "both workers run on this machine, in one hand"


def test_generate_as_without_protection(obfuscatune: Run) -> None:
    text = ("generate", "--prompt", "Once upon a time", "--max-new-tokens", 6, "--json")
    plain = obfuscatune(*text, "--plain").document["text"]
    private = obfuscatune(*text, "--worker", "device:cpu", "--enclave-device", "cpu")
    assert private.document["text"] == plain
    assert private.document["link"]["uploads"] > 0
    assert ONE_HAND not in private.stderr
    guarded = obfuscatune(*text, "--profile", "guarded", "--worker", "device:cpu", "--mask-worker", "device:cpu:1")
    assert guarded.document["text"] == plain
    assert ONE_HAND in guarded.stderr


def test_a_run_file_names_devices(obfuscatune: Run, notes: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "run.yaml", tmp_path / "out"
    file.write_text(f"data: {notes}\nout: {out}\nworker: device:cpu\nenclave_device: cpu\nmax_steps: 2\n")
    assert obfuscatune("finetune", "--config", file).code == 0
    assert "enclave_device: cpu" in (out / "recipe.yaml").read_text()
    for said, error in {
        "worker: device:cup": "'device:cup' cannot be used: write device:cuda:N",
        "enclave_device: tpu": "enclave device tpu: write cpu, cuda or cuda:N",
    }.items():
        file.write_text(f"data: {notes}\nout: {tmp_path / 'other'}\n{said}\n")
        ran = obfuscatune("finetune", "--config", file)
        assert ran.code == 2
        assert error in ran.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--worker", "device:cpu", "--profile", "paper"), "a device only multiplies"),
        (("--worker", "device:cpu", "--profile", "guarded"), "name both"),
        (
            ("--worker", "device:cpu", "--mask-worker", "device:cpu:0", "--profile", "guarded"),
            "whoever holds both sees through the masks",
        ),
        (("--worker", "device:cpu", "--enclave-device", "tpu"), "write cpu, cuda or cuda:N"),
    ],
)
def test_what_does_not_go_together(obfuscatune: Run, options: tuple[str, ...], said: str) -> None:
    ran = obfuscatune("generate", "--prompt", "x", *options)
    assert (ran.code, ran.stdout) == (2, "")
    assert said in ran.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("option", ["--worker=device:cuda:0", "--enclave-device=cuda:0"])
def test_a_gpu_that_is_not_there(obfuscatune: Run, option: str) -> None:
    ran = obfuscatune("generate", "--prompt", "x", option)
    assert ran.code == 2
    assert "this machine has no CUDA device" in ran.stderr


def test_the_enclaves_own_gpu_is_no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """On whatever machine: the GPU is only named."""
    monkeypatch.setattr(placement, "find_device", lambda name, said: torch.device("cuda", int(name[5:] or 0)))
    assert enclave_device("cuda:1", "device:cuda:0", "device:cpu") == torch.device("cuda:1")
    for workers in (("device:cuda",), ("unix:/x", "device:cuda:0")):
        with pytest.raises(ConfigError, match="cannot be both"):
            enclave_device("cuda:0", *workers)


def test_a_service_takes_no_two_devices_for_two_hands() -> None:
    """A demonstration may; a service's clients believe its profile."""
    with pytest.raises(ValueError, match="in one hand"):
        Settings._consistent(
            Settings.model_construct(
                profile="guarded", worker=Worker(address="device:cuda:0"), mask_worker=Worker(address="device:cpu")
            )
        )
    with pytest.raises(ValueError, match="write device:cuda:N"):
        Worker(address="device:gpu")
