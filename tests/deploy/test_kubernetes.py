"""The manifests of deploy/kubernetes, and overlays as `fleet manifests` writes them: hardened, valid, and of one piece.

`make test-kubernetes` has Kubernetes' own schemas; `kubectl`, where it is installed, puts an overlay together.
"""

from __future__ import annotations

import base64
import importlib.util
import shutil
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from obfuscatune.cluster.authority import Authority
from obfuscatune.cluster.list_file import listen_address
from obfuscatune.cluster.manifests import Overlay, write_overlay
from obfuscatune.errors import ConfigError
from obfuscatune.fleet.listing import parse_list
from obfuscatune.protocol.addresses import TcpAddress, parse_address
from obfuscatune.protocol.authority import check_issued, load_authority, load_one, make_authority
from tests.deploy.command_lines import check_command_line

BASE = Path(__file__).parents[2] / "deploy" / "kubernetes" / "base"
FILES = sorted(BASE.glob("*.yaml"))
DIGEST = "sha256:" + 64 * "a"
SCHEMAS = "1.37"
with_schemas = pytest.mark.skipif(
    importlib.util.find_spec("kubernetes_validate") is None, reason="kubernetes-validate: make test-kubernetes"
)
with_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")

overlay_of = partial(
    Overlay,
    namespace="cloud-a",
    workers=3,
    image=f"registry.example/obfuscatune-worker@{DIGEST}",
    operator="cloud-a",
    party="compute",
    memory=4 << 30,
    gpus=False,
    advertise=None,
    enclaves=None,
    base=str(BASE),
)


def write(folder: Path, **changes: Any) -> tuple[Path, list[str], Authority]:
    """An overlay in `folder`."""
    authority = Authority(*make_authority("cloud-a"))
    addresses = write_overlay(folder, overlay_of(**changes), authority, b"the enclaves' certificates\n")
    return folder, addresses, authority


def documents(text: str) -> dict[str, Any]:
    """Each by kind and name; generated names without their digests."""
    found = [it for it in yaml.safe_load_all(text) if it is not None]
    return {f"{it['kind']} {it['metadata']['name']}": it for it in found}


def built(folder: Path) -> dict[str, Any]:
    command = ["kubectl", "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return documents(done.stdout)


def base() -> dict[str, Any]:
    return documents("---\n".join(it.read_text("utf-8") for it in FILES if it.name != "kustomization.yaml"))


def the(found: dict[str, Any], start: str) -> Any:
    (name,) = [it for it in found if it.startswith(start)]
    return found[name]


def pods(found: dict[str, Any]) -> list[Any]:
    return [it["spec"]["template"]["spec"] for it in found.values() if it["kind"] in ("StatefulSet", "Deployment")]


def test_the_base_lists_its_files() -> None:
    resources = yaml.safe_load((BASE / "kustomization.yaml").read_text("utf-8"))["resources"]
    assert sorted([*resources, "kustomization.yaml"]) == [it.name for it in FILES]


def test_pods_are_hardened() -> None:
    assert len(pods(base())) == 2
    for pod in pods(base()):
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "serviceAccountName"} & set(pod)
        assert not any("hostPath" in volume for volume in pod["volumes"])
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["limits"]["memory"]
            assert {"readinessProbe", "livenessProbe"} <= set(container)


def test_nobody_is_asked_anything() -> None:
    policies = [it["spec"] for it in base().values() if it["kind"] == "NetworkPolicy"]
    assert len(policies) == len(pods(base()))
    for policy in policies:
        assert policy["policyTypes"] == ["Ingress", "Egress"]
        assert policy["egress"] == []
        assert all(rule["ports"] for rule in policy["ingress"])


def test_commands_exist() -> None:
    publisher, worker = (pod["containers"][0] for pod in pods(base()))
    check_command_line(["-I", "-m", "obfuscatune.worker", *worker["args"]])
    from obfuscatune.cluster import list_file

    assert publisher["command"] == ["/usr/bin/python3.11", "-I", "-m", list_file.__name__]
    assert [it.partition("=")[0] for it in publisher["args"]] == ["--list", "--publish"]
    assert listen_address(publisher["args"][1].partition("=")[2]).port == publisher["ports"][0]["containerPort"]


@with_schemas
def test_the_base_is_valid() -> None:
    import kubernetes_validate

    for it in base().values():
        kubernetes_validate.validate(it, SCHEMAS, strict=True)


@with_kubectl
@pytest.mark.parametrize(
    "changes",
    [{}, {"party": "mask", "namespace": "cloud-b-mask", "gpus": True, "enclaves": "10.1.0.0/16"}],
    ids=["compute", "mask"],
)
def test_an_overlay_is_of_one_piece(tmp_path: Path, changes: dict[str, Any]) -> None:
    folder, addresses, authority = write(tmp_path / "overlay", **changes)
    found = built(folder)
    if importlib.util.find_spec("kubernetes_validate") is not None:
        import kubernetes_validate

        for it in found.values():
            kubernetes_validate.validate(it, SCHEMAS, strict=True)
    workers, service = the(found, "StatefulSet"), found["Service obfuscatune-workers"]
    identities, listed = the(found, "Secret"), the(found, "ConfigMap obfuscatune-fleet")
    members = parse_list(listed["data"]["fleet.json"].encode())
    assert [it.address for it in members] == addresses
    assert workers["spec"]["replicas"] == len(members) == 3

    # The name of each pod, which leads enclaves to it, picks its key.
    namespace = workers["metadata"]["namespace"]
    assert workers["spec"]["serviceName"] == service["metadata"]["name"]
    assert service["spec"]["clusterIP"] == "None"
    for number, member in enumerate(members):
        pod, address = f"{workers['metadata']['name']}-{number}", parse_address(member.address)
        assert isinstance(address, TcpAddress)
        assert address.host == f"{pod}.{service['metadata']['name']}.{namespace}.svc.cluster.local"
        assert address.port == service["spec"]["ports"][0]["port"]
        files = {name: base64.b64decode(data) for name, data in identities["data"].items()}
        assert files[f"{pod}.cert.pem"] == member.certificate
        certificate = load_one(files[f"{pod}.cert.pem"])
        assert load_pem_private_key(files[f"{pod}.key.pem"], None).public_key() == certificate.public_key()
        check_issued(certificate, load_authority(authority.certificate))

    (container,) = workers["spec"]["template"]["spec"]["containers"]
    assert container["image"] == f"registry.example/obfuscatune-worker@{DIGEST}"
    mounts = {it["mountPath"]: it for it in container["volumeMounts"]}
    assert mounts["/run/identity/key.pem"]["subPathExpr"] == "$(POD_NAME).key.pem"
    volumes = {it["name"]: it for it in workers["spec"]["template"]["spec"]["volumes"]}
    secret = volumes["identities"]["secret"]
    assert (secret["secretName"], secret["defaultMode"]) == (identities["metadata"]["name"], 0o440)
    assert volumes["enclaves"]["configMap"]["name"] == the(found, "ConfigMap obfuscatune-enclaves")["metadata"]["name"]
    check_command_line(["-I", "-m", "obfuscatune.worker", *container["args"]])
    assert f"--quota={4 << 30}" in container["args"]
    assert int(container["resources"]["limits"]["memory"]) > 4 << 30
    assert ("nvidia.com/gpu" in container["resources"]["limits"]) == bool(changes)
    (rule,) = found["NetworkPolicy obfuscatune-workers"]["spec"]["ingress"]
    assert rule.get("from", []) == ([{"ipBlock": {"cidr": "10.1.0.0/16"}}] if changes else [])
    assert {it.party for it in members} == {changes.get("party", "compute")}


def test_keys_are_for_nobody_else(tmp_path: Path) -> None:
    folder, _, authority = write(tmp_path / "overlay")
    assert {it.stat().st_mode & 0o777 for it in (folder / "identities").iterdir()} == {0o600}
    assert not any(authority.key in it.read_bytes() for it in folder.rglob("*") if it.is_file())
    with pytest.raises(ConfigError, match="not overwritten"):
        write(tmp_path / "overlay")


def test_enclaves_outside_are_told_other_addresses(tmp_path: Path) -> None:
    _, addresses, _ = write(tmp_path / "overlay", advertise="worker-{number}.cloud-a.example:443", workers=2)
    assert addresses == ["tcp:worker-0.cloud-a.example:443", "tcp:worker-1.cloud-a.example:443"]


@pytest.mark.parametrize(
    "changes",
    [
        {"namespace": "Cloud"},
        {"image": "obfuscatune-worker:latest"},
        {"image": f"{DIGEST}"},
        {"advertise": "worker.example:7600"},
        {"enclaves": "10.0.0.1/8"},
        {"base": "/nowhere"},
    ],
    ids=str,
)
def test_what_cannot_be_used_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        write(tmp_path / "overlay", **changes)
    assert not (tmp_path / "overlay").exists()
