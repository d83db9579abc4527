"""What a protected model carries with it: the link, the profile, what lies on the worker, and what crossed."""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.accountant import DEFAULT_BUDGET, Accountant, check_budget
from obfuscatune.enclave.autograd import outside_autocast
from obfuscatune.enclave.client import ClientStats, WorkerLink
from obfuscatune.enclave.experts import ProtectedExperts, add, protected
from obfuscatune.enclave.keys import RootKey, SecretStream
from obfuscatune.enclave.layers import ProtectedConv1D, ProtectedLayer, ProtectedLinear, SharedCrossing
from obfuscatune.enclave.masks import DEFAULT_MEMORY_BYTES, DEVIATION, LayerMasks, Masked, Masks
from obfuscatune.enclave.mixing import KroneckerMixer, Mixer, NoMixer
from obfuscatune.enclave.obfuscation import Obfuscated, in_range, is_finer, obfuscate
from obfuscatune.enclave.observer import Observer
from obfuscatune.enclave.product import Held, Observe, OffloadedProduct
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.remote_lora.adapters import RemoteAdapters
from obfuscatune.enclave.spill_store import Offloaded, WeightSource
from obfuscatune.enclave.target_layers import Expert, LayerGroup, experts_matrices, residual_role
from obfuscatune.enclave.tiles import narrowed
from obfuscatune.enclave.verification import Verifier
from obfuscatune.errors import ConfigError, ProtectionError
from obfuscatune.process import compute_without_compiling
from obfuscatune.protocol.tls import TlsConfig

log = logging.getLogger(__name__)

MATRIX_ID_BYTES = 16


@dataclass(frozen=True)
class Clients:
    """Who computes for a model."""

    compute: WorkerLink | None
    """Holds the matrices and multiplies; None where nothing is offloaded."""
    mask: WorkerLink | None = None
    """Multiplies the masks, where the profile has any."""
    opened: tuple[WorkerLink, ...] = ()
    """Those that were connected for this model, and end with it should it not come about."""


@dataclass(frozen=True)
class Masking:
    """How the mask worker is reached, and how masks are kept and accounted for.

    Attributes:
        tls: identity and pinned peer, for a mask worker across a network.
        memory_bytes: of masks that are drawn ahead, with their products; 0 has none drawn ahead.
        budget: the largest advantage with which the compute worker may tell two inputs apart.

    Raises:
        ConfigError: the budget is not between 0 and 1.
    """

    tls: TlsConfig | None = None
    memory_bytes: int = DEFAULT_MEMORY_BYTES
    budget: float = DEFAULT_BUDGET

    def __post_init__(self) -> None:
        check_budget(self.budget)


DEFAULT_MASKING = Masking()


@dataclass
class Protection:
    """Everything that a protected model needs besides itself; `model.protection`."""

    client: WorkerLink | None
    """None where nothing is offloaded."""
    profile: Profile
    key: RootKey
    mixer: Mixer
    masks: Masks | None = None
    """What rows are hidden under; None without masks."""
    width: int | None = None
    """Of the residual stream, where the model's configuration tells."""
    observer: Observer | None = None
    steps: int = 0
    """Optimizer steps that were told of or noticed."""
    offloaded: list[Offloaded] = field(default_factory=list)
    adapters: RemoteAdapters | None = None
    """What was moved to the worker by `move_adapter`."""
    experts: dict[str, ProtectedExperts] = field(default_factory=dict, repr=False)
    """Modules of experts that are being given their matrices, by path."""
    fingerprint: Callable[[], int] = int
    """Of the trained parameters; it differs after they changed."""
    _known: int | None = None
    _stepping: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def start(
        cls,
        clients: Clients,
        profile: Profile,
        key: RootKey | None,
        width: int | None = None,
        observer: Observer | None = None,
        masking: Masking = DEFAULT_MASKING,
    ) -> Protection:
        """The parts that a profile composes; a fresh root key where none is given."""
        compute_without_compiling()
        client = clients.compute
        stream = SecretStream.fresh()
        mixer: Mixer = NoMixer()
        if profile.mixing:
            mixer = KroneckerMixer(profile.shield_rows, stream, in_buckets=profile.buckets == "ladder")
        masks = None
        if client is not None and clients.mask is not None:
            compute = client
            accountant = Accountant(DEVIATION, masking.budget)
            masks = Masks(
                clients.mask,
                accountant,
                memory_bytes=masking.memory_bytes,
                connection=lambda: compute.stats.reconnects,
            )
        return cls(client, profile, key or RootKey.generate(), mixer, masks, width, observer)

    @property
    def stats(self) -> ClientStats:
        """Crossings, bytes, seconds of waiting, uploads, retries; since the link was opened."""
        return ClientStats() if self.client is None else self.client.stats

    @property
    def serving(self) -> str:
        """How many matrices the workers had already, once a model is loaded, in one line."""
        masks = None if self.masks is None else self.masks.client.stats
        parties = {"worker" if masks is None else "compute worker": self.stats, "mask worker": masks}
        counts = (
            f"{party} {stats.served} of {stats.served + stats.uploads}" for party, stats in parties.items() if stats
        )
        return f"matrices served by the workers themselves: {', '.join(counts)}"

    def transformed_in(self, dtype: torch.dtype, at_least: torch.dtype | None = None) -> torch.dtype:
        """In which dtype W_star of a W of that dtype is computed: a finer one where it crosses in a finer one."""
        crossing, wanted = self.profile.crossing_dtype(dtype), at_least or dtype
        if is_finer(crossing, wanted):
            return torch.promote_types(crossing, torch.float32)  # to be scaled before it is rounded
        return wanted

    def obfuscate(
        self, group: LayerGroup, W: Tensor, dtype: torch.dtype | None = None, memory: Tensor | None = None
    ) -> Obfuscated:
        """W (p, q) of a group as W_star, and the transforms that undo it.

        W_star takes W's place in memory, unless `dtype`, or what it crosses in, is finer than W's: then it is in that,
        and in `memory` where there is some (`obfuscation.obfuscate`).
        """
        dtype = self.transformed_in(W.dtype, dtype)
        side = None
        if self.profile.sides == "paper":
            first = group.targets[0]
            side = residual_role(first.name, first.in_features, first.out_features, self.width)
        with outside_autocast(W.device):
            return obfuscate(
                W, self.key, self.profile.transform_spec, group.name, only=side, dtype=dtype, memory=memory
            )

    def send(self, group: LayerGroup, obfuscated: Obfuscated, weights: WeightSource) -> Offloaded:
        """Have the worker hold W_star, whose memory is overwritten. From any thread."""
        dtype, observe = self.profile.crossing_dtype(obfuscated.dtype), self._observe(group.name)
        product = self._send(group.name, group.widths, obfuscated, weights, dtype, observe)
        crossing = SharedCrossing(product, group.widths)
        R_in, R_out = obfuscated.R_in, obfuscated.R_out
        return Offloaded(group.name, obfuscated.only, weights, crossing, R_in, R_out, observe=observe)

    def layers(self, group: LayerGroup, offloaded: Offloaded) -> dict[str, ProtectedLayer | ProtectedExperts]:
        """The layers that are to take the plain ones' places, by path, once a group was sent; group after group."""
        self.offloaded.append(offloaded)
        self._keyed(offloaded)
        layers: dict[str, ProtectedLayer | ProtectedExperts] = {}
        for target in group.targets:
            if isinstance(target.layer, Expert):
                layers[target.path] = self._with_expert(target.path, target.layer, offloaded)
                continue
            kind = ProtectedConv1D if isinstance(target.layer, Conv1D) else ProtectedLinear
            layers[target.path] = kind(offloaded.crossing, target.layer).train(target.layer.training)
        return layers

    def _with_expert(self, path: str, expert: Expert, offloaded: Offloaded) -> ProtectedExperts:
        """The protected module of experts, made with the first matrix that is sent of it, with one matrix more."""
        if path not in self.experts:
            self.experts[path] = protected(expert.experts, experts_matrices(expert.experts))
        add(self.experts[path], expert.parameter, expert.index, offloaded.crossing)
        return self.experts[path]

    @contextmanager
    def broken_off(self) -> Iterator[None]:
        """Within it, what waits for the workers in other threads fails; see `WorkerClient.broken_off`."""
        with ExitStack() as stack:
            for client in (self.client, None if self.masks is None else self.masks.client):
                if client is not None:
                    stack.enter_context(client.broken_off())
            yield

    @property
    def lora_on_worker(self) -> bool:
        """Whether the profile has LoRA on the worker."""
        return self.profile.lora_on == "worker"

    def move_adapter(self, model: nn.Module) -> RemoteAdapters:
        """Move the adapter of a PEFT model around this protected one to the worker, transformed; once.

        From then on the worker computes its part, draws its dropout, and holds its gradients; an optimizer for it
        comes from `RemoteAdapters.optimizer`. `save_pretrained` works as ever.

        Raises:
            ConfigError: the profile keeps LoRA in the enclave; or the model has a provider's adapter.
            ProtectionError: the model has no adapter, or one that the worker cannot hold.
            WireError: the worker cannot be reached, or has no room.
        """
        if not self.lora_on_worker:
            raise ConfigError(f"profile {self.profile.name!r} keeps LoRA in the enclave: there is nothing to move")
        refuse_provider_adapter(model)
        if self.adapters is None:
            with outside_autocast():
                self.adapters = RemoteAdapters(self._worker, self.offloaded, model)
        return self.adapters

    def rekey(self, progress: Callable[[int, int, str], None] | None = None) -> None:
        """Draw all transforms anew and have the worker hold the matrices under these, one after the other.

        Between two steps: what was computed before cannot be differentiated any more. Should it raise, every layer
        is under its old transforms or its new ones, and works; call it again to finish.
        An adapter on the worker is carried over, and AdamW's moments: the first exactly, the second by an estimate
        (`remote/adapter.py`). Gradients are not.

        Raises:
            WireError: the worker failed, or has no room for one more matrix.
        """
        for done, layer in enumerate(self.offloaded, start=1):
            self._rekey_one(layer)
            if progress is not None:
                progress(done, len(self.offloaded), layer.name)

    def after_step(self) -> None:
        """Re-key what is due after a step of the optimizer. Nothing without `rekey_every`.

        A few layers at a time, in turn, so that all are renewed within `rekey_every` steps and no step waits for more.
        A step that nobody told of is noticed at the next forward pass (`notice_step`).

        Raises:
            WireError: see `rekey`.
        """
        if not self.profile.rekey_every:
            return
        with self._stepping:
            self._known = self.fingerprint()
            self._take_step()

    def notice_step(self) -> None:
        """Re-key what is due where the trained parameters changed since the last step. Nothing without `rekey_every`.

        Raises:
            WireError: see `rekey`.
        """
        if not self.profile.rekey_every:
            return
        with self._stepping:
            before, self._known = self._known, self.fingerprint()
            if before is not None and before != self._known:
                self._take_step()

    def _take_step(self) -> None:
        count, every = len(self.offloaded), self.profile.rekey_every
        if not self.steps:
            log.info("an optimizer stepped: the secrets of all %d matrices are renewed every %d steps", count, every)
        due = range(self.steps * count // every, (self.steps + 1) * count // every)
        self.steps += 1
        for index in due:
            self._rekey_one(self.offloaded[index % count])

    def _rekey_one(self, layer: Offloaded) -> None:
        with outside_autocast():
            layer.epoch += 1
            outdated, W = layer.crossing.product, layer.weights.weight()
            dtype = layer.crossing.dtype or W.dtype
            spec, wide = self.profile.transform_spec, torch.promote_types(dtype, torch.float32)
            fresh = obfuscate(W, self.key, spec, layer.name, layer.epoch, layer.side, wide)
            adapter = None if self.adapters is None else self.adapters.of(layer)
            carried = None if adapter is None else adapter.take_down()
            product = self._send(layer.name, layer.crossing.widths, fresh, layer.weights, dtype, layer.observe)
            layer.R_in, layer.R_out = fresh.R_in, fresh.R_out
            self._keyed(layer)
            layer.crossing.multiply_by(product)
            if adapter is not None and carried is not None:
                adapter.put_up(carried)
            outdated.drop()

    @property
    def _worker(self) -> WorkerLink:
        if self.client is None:
            raise ProtectionError("this profile offloads nothing: there is no worker")
        return self.client

    def _keyed(self, layer: Offloaded) -> None:
        if self.observer is not None:
            self.observer.keyed(layer.name, layer.R_in, layer.R_out)

    def _observe(self, layer: str) -> Observe | None:
        observer = self.observer
        if observer is None:
            return None
        return lambda rows, transposed: observer.requested(layer, rows, transposed=transposed)

    def _send(
        self,
        layer: str,
        widths: tuple[int, ...],
        obfuscated: Obfuscated,
        weights: WeightSource,
        dtype: torch.dtype,
        observe: Observe | None,
    ) -> OffloadedProduct:
        """Have the worker, and the mask worker if there is one, hold W_star in that dtype; the product with it.

        The memory of W_star is overwritten.
        """
        client, share, masks = self._worker, self.profile.verify, self.masks
        shape = obfuscated.R_in.dim, obfuscated.R_out.dim
        again = weights.keep(obfuscated)
        widths = widths if self.profile.serves_published else ()

        def send(W_star: Tensor, dtype: torch.dtype) -> Held:
            scale = in_range(W_star, dtype) if self.profile.mixing else 1.0
            W_star, matrix_id = _rounded(W_star, scale, dtype), secrets.token_bytes(MATRIX_ID_BYTES)

            def make_again() -> Tensor:
                return _rounded(again(torch.promote_types(dtype, torch.float32)), scale, dtype)

            client.store(matrix_id, make_again, shape=shape, dtype=dtype, tensor=W_star, widths=widths)
            if masks is None:
                return Held(matrix_id, dtype, Verifier(W_star, SecretStream.fresh(), share) if share else None, scale)
            masked_id = secrets.token_bytes(MATRIX_ID_BYTES)
            masks.client.store(masked_id, make_again, shape=shape, dtype=dtype, tensor=W_star, widths=widths)
            # As fine as masks and their products.
            verifier = Verifier(W_star, SecretStream.fresh(), share, dtype=torch.float64)
            return Held(matrix_id, dtype, verifier, scale, Masked(masked_id, shape, verifier))

        with outside_autocast():
            held = send(obfuscated.W_star, dtype)
        send_in = (lambda finer: send(again(finer), finer)) if self.profile.wire_dtype == "model" else None
        R_in, R_out = obfuscated.R_in, obfuscated.R_out
        of_layer = None if masks is None else LayerMasks(masks, layer)
        return OffloadedProduct(client, held, R_in, R_out, self.mixer, send_in, observe, of_layer)

    def close(self) -> None:
        """Let the workers forget, and close the connections."""
        if self.masks is not None:
            self.masks.close()
        if self.client is not None:
            self.client.close()

    def __repr__(self) -> str:
        return f"Protection(profile={self.profile.name!r}, {self.stats})"


def _rounded(W_star: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """scale W_star in `dtype`; in its own memory, unless `dtype` is wider."""
    W_star = W_star if scale == 1 else W_star.mul_(scale)
    return narrowed(W_star, dtype) if dtype.itemsize <= W_star.itemsize else W_star.to(dtype)


def place(model: nn.Module, layers: dict[str, ProtectedLayer | ProtectedExperts]) -> None:
    """Put protected layers and experts where the plain ones are."""
    for path, layer in layers.items():
        model.set_submodule(path, layer)
        if isinstance(layer, ProtectedLayer):
            parent, _, name = path.removesuffix(".base_layer").rpartition(".")
            layer.placed_in(model.get_submodule(parent), name)


def refuse_provider_adapter(model: nn.Module) -> None:
    """Refuse to have the worker hold the LoRA factors of a model with a provider's adapter (`load_provider_adapter`).

    Raises:
        ConfigError: the model has one.
    """
    if getattr(model, "provider_sha256", None) is not None:
        raise ConfigError(
            "a profile with LoRA on the worker (paper) would show the worker the provider's adapter; take private or "
            "guarded"
        )
