"""The overlay of deploy/kubernetes for one operator's numbers: identities, the list, and a kustomization.

The workers' keys are made here, by the operator, and handed to the cluster as a Secret: on Kubernetes a worker that
made its own would need a right in the cluster, or a service that signs. Names of a StatefulSet's pods stay, so the list
is known before the first pod runs.
"""

import ipaddress
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from obfuscatune.cluster.authority import Authority
from obfuscatune.errors import ConfigError
from obfuscatune.fleet.listing import format_list
from obfuscatune.fleet.members import Member, Party
from obfuscatune.protocol.authority import make_request
from obfuscatune.protocol.files import write_new

WORKER, SERVICE, PORT = "obfuscatune-worker", "obfuscatune-workers", 7600
_NAMESPACE = re.compile(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?")
_IMAGE = re.compile(r"(?P<name>[a-z0-9][a-z0-9._/:-]{0,200})@(?P<digest>sha256:[0-9a-f]{64})")
SPARE_MEMORY = 2 << 30
"""Of a pod, beside its worker's matrices: Python, torch, requests in flight."""


@dataclass(frozen=True)
class Overlay:
    """What is the operator's own."""

    namespace: str
    workers: int
    image: str
    """By digest, as registry.example/obfuscatune-worker@sha256:…"""
    operator: str
    party: Party
    memory: int
    """Bytes for matrices, of each worker."""
    gpus: bool
    advertise: str | None
    """HOST:PORT with {number} in it, by which enclaves outside reach a worker; None for its name in the cluster."""
    enclaves: str | None
    """The network from which workers may be reached, as 10.0.0.0/8; None for any."""
    base: str
    """The folder deploy/kubernetes/base."""


def write_overlay(folder: Path, overlay: Overlay, authority: Authority, peers: bytes) -> list[str]:
    """Write it into a folder that is not there yet.

    Returns:
        The workers' addresses.

    Raises:
        ConfigError: a number or a name that cannot be used, or the folder is there.
    """
    image = _check(overlay)
    names = [f"{WORKER}-{number}" for number in range(overlay.workers)]
    members, files = [], {}
    for number, name in enumerate(names):
        request, key = make_request(name)
        certificate = authority.issue(request, f"{overlay.operator} {name}")
        files[f"identities/{name}.key.pem"] = key
        files[f"identities/{name}.cert.pem"] = certificate
        host = f"{name}.{SERVICE}.{overlay.namespace}.svc.cluster.local:{PORT}"
        address = f"tcp:{host if overlay.advertise is None else overlay.advertise.replace('{number}', str(number))}"
        members.append(Member(address, certificate, overlay.operator, overlay.party, overlay.memory))
    files["fleet.json"] = format_list(members, ["cuda" if overlay.gpus else "cpu"] * len(members))
    files["peers.pem"] = peers
    files[".gitignore"] = b"identities/\n"
    files["kustomization.yaml"] = _kustomization(folder, overlay, image, sorted(files))
    try:
        (folder / "identities").mkdir(parents=True, mode=0o700)
        for name, content in files.items():
            write_new(folder / name, content, 0o600 if name.startswith("identities/") else 0o644)
    except FileExistsError:
        raise ConfigError(f"{folder} exists and is not overwritten: its keys may be in use") from None
    except OSError as error:
        raise ConfigError(f"cannot write to {folder}: {error.strerror}") from error
    return [it.address for it in members]


def _check(overlay: Overlay) -> "re.Match[str]":
    """The parts of the image's name. Raises ConfigError: something cannot be used."""
    if not _NAMESPACE.fullmatch(overlay.namespace):
        raise ConfigError(f"--namespace {overlay.namespace}: small letters, digits and dashes, at most 63")
    image = _IMAGE.fullmatch(overlay.image)
    if image is None:
        raise ConfigError("--image: name it by its digest, as registry.example/obfuscatune-worker@sha256:…")
    if overlay.advertise is not None and overlay.workers > 1 and "{number}" not in overlay.advertise:
        raise ConfigError("--advertise needs {number} where there are several workers, as worker-{number}.example:7600")
    if overlay.enclaves is not None:
        try:
            ipaddress.ip_network(overlay.enclaves)
        except ValueError as error:
            raise ConfigError(f"--enclaves {overlay.enclaves}: {error}") from None
    if "://" not in overlay.base and not (Path(overlay.base) / "kustomization.yaml").is_file():
        raise ConfigError(f"--base {overlay.base}: not there; it is the folder deploy/kubernetes/base of a checkout")
    return image


def _kustomization(folder: Path, overlay: Overlay, image: "re.Match[str]", files: list[str]) -> bytes:
    remote = "://" in overlay.base
    base = overlay.base if remote else os.path.relpath(Path(overlay.base).resolve(), folder.resolve())
    found: dict[str, Any] = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": overlay.namespace,
        "resources": [base],
        "components": [re.sub(r"base(?=/?(\?|$))", "gpu", base)] if overlay.gpus else [],
        "replicas": [{"name": WORKER, "count": overlay.workers}],
        "images": [{"name": WORKER, "newName": image["name"], "digest": image["digest"]}],
        "secretGenerator": [
            {"name": "obfuscatune-identities", "files": [it for it in files if it.startswith("identities/")]}
        ],
        "configMapGenerator": [
            {"name": "obfuscatune-fleet", "files": ["fleet.json"]},
            {"name": "obfuscatune-enclaves", "files": ["peers.pem"]},
        ],
        "patches": [_patch("StatefulSet", WORKER, _memory(overlay.memory))],
    }
    if overlay.enclaves is not None:
        network = [{"op": "add", "path": "/spec/ingress/0/from", "value": [{"ipBlock": {"cidr": overlay.enclaves}}]}]
        found["patches"].append(_patch("NetworkPolicy", SERVICE, network))
    heading = f"# {overlay.operator}, party {overlay.party}: apply with `kubectl apply --kustomize`. docs/scale.md\n"
    return (heading + yaml.safe_dump(found, sort_keys=False, width=120)).encode()


def _memory(quota: int) -> list[dict[str, Any]]:
    container = "/spec/template/spec/containers/0"
    pod = str(quota + SPARE_MEMORY)
    return [
        {"op": "add", "path": f"{container}/args/-", "value": f"--quota={quota}"},
        {"op": "replace", "path": f"{container}/resources/requests/memory", "value": pod},
        {"op": "replace", "path": f"{container}/resources/limits/memory", "value": pod},
    ]


def _patch(kind: str, name: str, operations: list[dict[str, Any]]) -> dict[str, Any]:
    return {"target": {"kind": kind, "name": name}, "patch": yaml.safe_dump(operations, sort_keys=False)}
