"""What a protected model carries with it: the link, the profile, the account of what crossed."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from obfuscatune.enclave.keys import RootKey, SecretStream
from obfuscatune.enclave.linear import OffloadedProduct
from obfuscatune.enclave.link import LinkStats, MatrixSource, WorkerLink
from obfuscatune.enclave.mixing import KroneckerMixer, Mixer, NoMixing
from obfuscatune.enclave.modules import ProtectedConv1D, ProtectedLinear, SharedCrossing
from obfuscatune.enclave.obfuscate import Obfuscated, obfuscate
from obfuscatune.enclave.profiles import Profile
from obfuscatune.enclave.sites import SiteGroup

MATRIX_ID_BYTES = 16


@dataclass
class Protection:
    """Everything that a protected model needs besides itself; `model.protection`."""

    link: WorkerLink
    profile: Profile
    key: RootKey
    mixer: Mixer

    @classmethod
    def start(cls, link: WorkerLink, profile: Profile, key: RootKey | None) -> Protection:
        """The parts that a profile composes; a fresh root key where none is given."""
        stream = SecretStream.fresh()
        mixer = KroneckerMixer(profile.shield_rows, stream) if profile.mixing else NoMixing()
        return cls(link, profile, key or RootKey.generate(), mixer)

    @property
    def stats(self) -> LinkStats:
        """Crossings, bytes, seconds of waiting, uploads, retries; since the link was opened."""
        return self.link.stats

    def obfuscate(self, W: Tensor, group: SiteGroup) -> Obfuscated:
        """W_star and the transforms of one group, from the root key."""
        return obfuscate(W, self.key, self.profile.transform_spec, group.name)

    def offload(self, group: SiteGroup, obfuscated: Obfuscated, source: MatrixSource) -> dict[str, nn.Module]:
        """Send W_star; the layers that are to take the plain ones' places, by path."""
        matrix_id = secrets.token_bytes(MATRIX_ID_BYTES)
        W_star = obfuscated.W_star
        p, q = W_star.shape
        self.link.store(matrix_id, source, shape=(p, q), dtype=W_star.dtype, tensor=W_star)
        product = OffloadedProduct(self.link, matrix_id, obfuscated.R_in, obfuscated.R_out, self.mixer)
        crossing = SharedCrossing(product, group.widths)
        layers: dict[str, nn.Module] = {}
        for site in group.sites:
            kind = ProtectedConv1D if isinstance(site.layer, Conv1D) else ProtectedLinear
            layers[site.path] = kind(crossing, site.layer).train(site.layer.training)
        return layers

    def close(self) -> None:
        """Let the worker forget, and close the connection."""
        self.link.close()

    def __repr__(self) -> str:
        return f"Protection(profile={self.profile.name!r}, {self.stats})"


def place(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Put protected layers where the plain ones are."""
    for path, layer in layers.items():
        model.set_submodule(path, layer)
