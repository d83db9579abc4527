"""A protected model as lm-evaluation-harness (0.4) sees it: `--model obfuscatune`.

Everything but how the model comes to be is the harness's own `HFLM`. To import this module is to register it, and
takes the extra `lm-eval`.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from obfuscatune.enclave.keys import RootKey
from obfuscatune.enclave.loading import find_directory, load
from obfuscatune.enclave.profiles import Profile, resolve
from obfuscatune.enclave.protect import open_clients
from obfuscatune.enclave.protection import DEFAULT_MASKING, Masking
from obfuscatune.enclave.published import Base
from obfuscatune.errors import ConfigError
from obfuscatune.fleet.fleet_file import Fleet
from obfuscatune.option import parse_size
from obfuscatune.protocol.tls import TlsConfig
from obfuscatune.training.adapter import load_adapter
from obfuscatune.training.provider_adapter import load_provider_adapter, refuse_lora_on_worker

NAME = "obfuscatune"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64, "auto": None}
_KNOBS = frozenset(field.name for field in fields(Profile)) - {"name"}
_NOT_OURS = frozenset(
    {"parallelize", "device_map", "tp_plan", "delta", "autogptq", "gptqmodel", "gguf_file", "subfolder", "load_in_8bit"}
)
"""Arguments of `HFLM` about how it loads a model, which it would ignore: it does not load ours."""


@register_model(NAME)
class ProtectedLM(HFLM):  # type: ignore[misc]  # the harness is not annotated for us
    """`HFLM` over a model that is under protection from the start."""

    def __init__(
        self,
        pretrained: str,
        profile: str = "private",
        worker: str | None = None,
        fleet: str | None = None,
        peft: str | None = None,
        provider_adapter: str | None = None,
        dtype: str = "float32",
        revision: str | None = None,
        tokenizer: str | None = None,
        key_file: str | None = None,
        tls_cert: str | None = None,
        tls_key: str | None = None,
        peer: str | None = None,
        mask_worker: str | None = None,
        mask_peer: str | None = None,
        mask_memory: str | int | None = None,
        mask_budget: float | None = None,
        enclave_device: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        base: Base | None = None,
        **others: Any,
    ) -> None:
        """Load, protect, and hand over.

        Args:
            pretrained: a directory with `config.json` and safetensors, or a hub id.
            profile: name of a profile; its knobs may stand beside it: `first_blocks=0`, `transform=haar`.
            worker: address of a running worker; one is started on this machine, and ends with this object, if None.
            fleet: file that names many workers, in the place of one (docs/fleet.md); with tls_cert and tls_key.
            peft: directory of a LoRA adapter.
            provider_adapter: directory of a provider's LoRA adapter, under that one.
            dtype: float32, bfloat16, float64, or auto for that of the model's configuration.
            revision, tokenizer: as `HFLM`.
            key_file: root key of the transforms; a fresh one if None.
            tls_cert, tls_key, peer: for a worker on another machine.
            mask_worker, mask_peer: the worker that multiplies the masks, under profile guarded, and its certificate.
            mask_memory: for masks that are drawn ahead, as 512MiB; 1 GiB if None.
            mask_budget: the largest advantage in telling two inputs apart that the worker may ever have; 0.01 if None.
            enclave_device: where the enclave's own part lies: cpu, or cuda:N, a confidential GPU.
            trust_remote_code: refused: an enclave runs no code that comes with a model.
            device: not used: the harness says `cuda:0` where its user says nothing, and an enclave's part on a GPU that
                is not confidential shows it. That is said by `enclave_device`.
            base: closed or public, as for `load`; `public_base=True`, beside profile guarded, where the weights
                themselves are published.
            others: for `HFLM`: batch_size, max_length, add_bos_token, ...

        Raises:
            ConfigError: an argument that cannot be used.
            ModelFileError, WireError: as `obfuscatune.load`.
        """
        if trust_remote_code:
            raise ConfigError("trust_remote_code: an enclave runs no code that comes with a model; leave it out")
        if dtype not in _DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(_DTYPES)}, found {dtype}")
        if ignored := sorted(_NOT_OURS & others.keys()):
            raise ConfigError(
                f"{ignored[0]} says how lm-evaluation-harness is to load a model; this one is loaded by us"
            )
        knobs = {name: others.pop(name) for name in sorted(_KNOBS & others.keys())}
        resolved = resolve(profile, **knobs)
        if provider_adapter is not None:
            refuse_lora_on_worker(resolved.lora_on == "worker")
        directory = find_directory(pretrained, revision)
        cert, cert_key, worker_peer, other_peer = (
            None if path is None else Path(path) for path in (tls_cert, tls_key, peer, mask_peer)
        )
        tls = TlsConfig.from_options(cert, cert_key, worker_peer) if peer or not (mask_peer or fleet) else None
        if fleet is not None:
            if worker or mask_worker or peer or mask_peer:
                raise ConfigError("fleet names all workers and their certificates: leave out worker, mask_worker, peer")
            tls = None if cert is None or cert_key is None else TlsConfig(cert, cert_key, b"")
        masking = Masking(
            TlsConfig.from_options(cert, cert_key, other_peer) if mask_peer else None,
            DEFAULT_MASKING.memory_bytes if mask_memory is None else parse_size(str(mask_memory)),
            DEFAULT_MASKING.budget if mask_budget is None else mask_budget,
        )
        workers = worker if fleet is None else Fleet.read(fleet)
        clients = open_clients(workers, mask_worker, resolved, tls, masking, deadline_s=120.0, retry=None)
        with ExitStack() as stack:
            for client in clients.opened:
                stack.callback(client.close)
            key = None if key_file is None else RootKey.from_file(Path(key_file))
            model = load(
                directory,
                clients.compute,
                resolved,
                dtype=_DTYPES[dtype],
                key=key,
                base=base,
                mask_worker=clients.mask,
                device=enclave_device,
                masking=masking,
            )
            if provider_adapter is not None:
                model = load_provider_adapter(model, Path(provider_adapter))
            if peft is not None:
                model = load_adapter(model, Path(peft))
            super().__init__(pretrained=model, tokenizer=tokenizer or str(directory), **others)
            self.close = weakref.finalize(self, stack.pop_all().close)
            """Forget the matrices and end a worker that was started here; done at exit, if not before."""
