"""`obfuscatune fleet`: workers on an operator's machines, placed, kept running and published."""

import contextlib
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from obfuscatune.cli import output
from obfuscatune.cli.groups import command_group, command_of
from obfuscatune.cli.options import AsJson
from obfuscatune.cli.signals import until_told
from obfuscatune.errors import ConfigError
from obfuscatune.option import Option, parse_size

if TYPE_CHECKING:
    from obfuscatune.cluster.node import NodeSettings
    from obfuscatune.cluster.state import StateFolder
    from obfuscatune.fleet.members import Party

fleet = command_group("fleet", "Run workers on many machines, and publish who they are.")

_PROBE_SECONDS = 3.0
_WORKER, _LISTED, _ENGINE = "Each worker", "What is published", "Ray"
State = Annotated[Path, Option("Folder of the fleet: its authority, its lock, its list.")]
Operator = Annotated[str, Option("The operator's name, as the enclave's policy has it.", _LISTED)]


@dataclass(frozen=True)
class UpOptions:
    """How a fleet is to be."""

    state: State
    peer: Annotated[Path, Option("The certificates of the enclaves that may connect, one file.", _WORKER)]
    engine: Annotated[str, Option("local: processes of this machine; ray: actors.", choices=("local", "ray"))] = "local"
    workers: Annotated[int, Option("How many.", least=1, most=1024)] = 1
    name: Annotated[str, Option("Tells several fleets of one cluster apart.")] = "obfuscatune"
    listen: Annotated[
        str | None, Option("Interface that workers listen on.", _WORKER, unset="127.0.0.1; with ray 0.0.0.0")
    ] = None
    ports: Annotated[str | None, Option("Ports to choose from, as 7600-7699.", _WORKER, unset="any free one")] = None
    advertise: Annotated[
        str | None, Option("Host by which enclaves reach workers.", _WORKER, unset="each machine's address")
    ] = None
    device: Annotated[str | None, Option("cpu or cuda.", _WORKER, unset="cuda with --gpus-per-worker, else cpu")] = None
    memory: Annotated[
        str | None, Option("Memory for matrices, as 40GiB.", _WORKER, unset="80% of its machine's, and not listed")
    ] = None
    cpus_per_worker: Annotated[int, Option("Cores, in Ray's terms and as its threads.", _WORKER, least=1)] = 1
    gpus_per_worker: Annotated[int, Option("GPUs, in Ray's terms.", _WORKER, least=0)] = 0
    operator: Operator = "operator"
    party: Annotated[str, Option("What its workers may be asked.", _LISTED, choices=("compute", "mask"))] = "compute"
    authority: Annotated[
        Path | None, Option("Folder of the key that signs.", _LISTED, unset="in --state; made if missing")
    ] = None
    publish: Annotated[str, Option("Where to serve fleet.json, as HOST:PORT; port 0: any free one.", _LISTED)] = (
        "127.0.0.1:7650"
    )
    address: Annotated[str, Option("Ray's cluster: auto, HOST:PORT or ray://HOST:10001.", _ENGINE)] = "auto"
    autoscale: Annotated[bool, Option("Ask Ray's autoscaler for the machines at once.", _ENGINE)] = False
    leave_running: Annotated[
        bool, Option("When this ends, let the actors run; another `fleet up` takes them over.", _ENGINE)
    ] = False

    @property
    def place_names(self) -> list[str]:
        """Of each worker, in a fixed order."""
        return [f"{self.name}-{number}" for number in range(self.workers)]


@command_of(
    fleet,
    "obfuscatune fleet up --engine local --workers 2 --peer enclave-cert.pem --state fleet/",
    "obfuscatune fleet up --engine ray --address auto --workers 8 --gpus-per-worker 1 --memory 40GiB "
    "--operator cloud-a --peer enclave-cert.pem --publish 0.0.0.0:7650 --state fleet/",
)
def up(options: UpOptions, as_json: AsJson = False) -> None:
    """Place workers, keep them running and serve the list of them, until Ctrl-C.

    Untrusted: run it on the operator's side. Each worker makes its key where it runs; this process signs its
    certificate. Enclaves need the list's address and the authority's certificate (docs/scale.md).
    """
    from obfuscatune.cluster.authority import Authority
    from obfuscatune.cluster.list_file import listen_address
    from obfuscatune.cluster.publisher import LIST_PATH, Publisher
    from obfuscatune.cluster.state import FleetState, StateFolder
    from obfuscatune.cluster.supervisor import Identity, Supervisor
    from obfuscatune.fleet.listing import check_operator

    check_operator(options.operator)
    check_operator(options.name)
    party, settings = _party(options.party), _node_settings(options)
    memory = None if options.memory is None else parse_size(options.memory)
    folder = StateFolder(options.state)
    with folder.locked(), contextlib.ExitStack() as stack:
        authority = Authority.load_or_create(options.authority or folder.authority, options.operator)
        publisher = Publisher(listen_address(options.publish))
        stack.callback(publisher.close)
        host = publisher.address.host
        url = f"http://{f'[{host}]' if ':' in host else host}:{publisher.address.port}{LIST_PATH}"
        engine = _engine(options, settings, memory)
        if options.engine == "ray" and options.leave_running:
            stack.callback(engine.leave)
        else:
            stack.callback(_end, engine, folder)
        over = stack.enter_context(until_told())  # after Ray, which takes these signals for itself
        cluster = options.address if options.engine == "ray" else None
        folder.write(FleetState(options.name, options.engine, cluster, options.workers, url))

        def publish(data: bytes) -> None:
            publisher.publish(data)
            folder.write_list(data)

        identity = Identity(options.operator, party, memory)
        supervisor = Supervisor(engine, authority, identity, publish=publish, say=output.notice)
        ready = _Ready(options.workers, {"url": url, "authority": authority.fingerprint}, as_json)
        supervisor.run(over, lambda: ready.tell(supervisor.running))


@command_of(
    fleet, "obfuscatune fleet status --state fleet/", "obfuscatune fleet status --url http://head:7650/fleet.json"
)
def status(
    state: Annotated[Path | None, Option("Folder of the fleet.")] = None,
    url: Annotated[str | None, Option("The list's address, in place of --state.")] = None,
    as_json: AsJson = False,
) -> None:
    """Show the list as enclaves read it, and which workers can be reached from here."""
    from obfuscatune.cluster.state import StateFolder
    from obfuscatune.fleet.discovery import fetch
    from obfuscatune.fleet.listing import parse_list
    from obfuscatune.protocol.certificates import fingerprint

    if (state is None) == (url is None):
        raise ConfigError("fleet status takes --state or --url")
    where = url or StateFolder(state or Path()).read().url
    members = [
        {
            "address": it.address,
            "reachable": _is_reachable(it.address),
            "operator": it.operator,
            "party": it.party,
            "memory": it.memory,
            "key": fingerprint(it.certificate or b""),
        }
        for it in parse_list(fetch(where))
    ]
    if as_json:
        output.write_json({"url": where, "members": members})
        return
    for it in members:
        reached = "reachable" if it["reachable"] else "not reachable"
        output.write_text(f"{it['address']:<28} {it['operator']} {it['party']:<8} {reached}  key {it['key']}")


@command_of(fleet, "obfuscatune fleet down --state fleet/")
def down(state: State, as_json: AsJson = False) -> None:
    """End a fleet: its supervisor, its workers, and actors that were left running."""
    from obfuscatune.cluster.state import StateFolder

    folder = StateFolder(state)
    found = folder.read()
    with output.progress("ending the fleet"):
        stopped = folder.stop_supervisor()
        left = 0
        if found.engine == "ray" and found.cluster is not None:
            from obfuscatune.cluster.ray_engine import remove

            left = remove(found.cluster, found.name, [f"{found.name}-{it}" for it in range(found.workers)])
    folder.forget()
    result = {"supervisor_stopped": stopped, "actors_ended": left}
    output.write_result(result, "the fleet has ended", as_json=as_json)


@command_of(
    fleet,
    "obfuscatune fleet manifests --workers 8 --image registry.example/obfuscatune-worker@sha256:… --memory 40GiB "
    "--operator cloud-a --authority cloud-a/ --peer enclave-cert.pem -o overlay/",
)
def manifests(
    out: Annotated[Path, Option("Folder to write; it must not be there.", short="-o")],
    authority: Annotated[Path, Option("Folder of the key that signs (fleet authority).")],
    peer: Annotated[Path, Option("The certificates of the enclaves that may connect, one file.")],
    image: Annotated[str, Option("The worker's image, by digest: NAME@sha256:…")],
    memory: Annotated[str, Option("Memory of each worker for matrices, as 40GiB.")],
    operator: Operator = "operator",
    party: Annotated[str, Option("What its workers may be asked.", choices=("compute", "mask"))] = "compute",
    workers: Annotated[int, Option("How many.", least=1, most=1024)] = 1,
    gpus: Annotated[bool, Option("One NVIDIA GPU for each worker.")] = False,
    namespace: Annotated[str, Option("Namespace of the cluster; one for each party.")] = "obfuscatune",
    advertise: Annotated[
        str | None,
        Option("HOST:PORT by which enclaves reach worker {number}.", unset="its name inside the cluster"),
    ] = None,
    enclaves: Annotated[
        str | None, Option("Network from which workers may be reached, as 10.1.0.0/16.", unset="any")
    ] = None,
    base: Annotated[str, Option("deploy/kubernetes/base of a checkout, or its URL.")] = "deploy/kubernetes/base",
) -> None:
    """Write a Kustomize overlay for workers on Kubernetes: their identities, their list, your numbers.

    Keys are made here and go to the cluster as a Secret. Keep the folder as you keep keys.
    """
    from obfuscatune.cluster.authority import Authority
    from obfuscatune.cluster.manifests import Overlay, write_overlay
    from obfuscatune.fleet.listing import check_operator

    overlay = Overlay(
        namespace,
        workers,
        image,
        check_operator(operator),
        _party(party),
        parse_size(memory),
        gpus,
        advertise,
        enclaves,
        base,
    )
    for address in write_overlay(out, overlay, Authority.load(authority), _read_peers(peer)):
        output.write_text(address)
    output.notice(f"apply it: kubectl apply --kustomize {out}")


@command_of(
    fleet,
    "obfuscatune fleet publish --list overlay/fleet.json --publish 0.0.0.0:7650",
    "obfuscatune fleet publish --list http://cloud-a.example:7650 --list http://cloud-b.example:7650",
)
def publish(
    lists: Annotated[list[str], Option("A list: a file or another publisher's URL; may be given again.", name="list")],
    publish: Annotated[str, Option("Where to serve fleet.json, as HOST:PORT.")] = "127.0.0.1:7650",
) -> None:
    """Serve a list that lies in a file, or the lists of several operators as one, until Ctrl-C.

    Whoever runs this needs no trust: enclaves hold each member against their policy. A file may be replaced meanwhile.
    """
    from obfuscatune.cluster.list_file import listen_address, serve

    with until_told() as over:
        serve(lists, listen_address(publish), over, output.notice)


@command_of(fleet, "obfuscatune fleet authority --out cloud-a/ --operator cloud-a")
def authority(
    out: Annotated[Path, Option("Folder for cert.pem and key.pem; made if missing.")],
    operator: Operator = "operator",
    as_json: AsJson = False,
) -> None:
    """Make the key of an operator that signs the certificates of its workers.

    Enclaves trust cert.pem by their policy, for that operator's party alone: hand it over by a channel that both
    trust, and compare the fingerprints. key.pem stays where `fleet up` runs.
    """
    from obfuscatune.cluster.authority import Authority
    from obfuscatune.fleet.listing import check_operator
    from obfuscatune.protocol.certificates import CERTIFICATE

    made = Authority.create(out, check_operator(operator))
    result = {"certificate": str(out / CERTIFICATE), "fingerprint": made.fingerprint}
    output.write_result(result, output.labelled(result), as_json=as_json)


class _Ready:
    """Says once that all workers run."""

    def __init__(self, workers: int, result: dict[str, Any], as_json: bool) -> None:
        self._workers, self._result, self._as_json, self._said = workers, result, as_json, False

    def tell(self, running: int) -> None:
        if self._said or running < self._workers:
            return
        self._said = True
        if self._as_json:
            output.write_text(json.dumps({"event": "ready", "members": running, **self._result}))
        else:
            output.write_text(
                f"{running} workers run; their list is at {self._result['url']}\n"
                f"the authority's fingerprint is {self._result['authority']}; end the fleet with Ctrl-C or `fleet down`"
            )


def _node_settings(options: UpOptions) -> "NodeSettings":
    from obfuscatune.cluster.node import NodeSettings

    peers = _read_peers(options.peer)
    host = options.listen or ("0.0.0.0" if options.engine == "ray" else "127.0.0.1")  # noqa: S104  TLS, pinned
    device = options.device or ("cuda" if options.gpus_per_worker else "cpu")
    return NodeSettings(
        host, _ports(options.ports), options.advertise, device, options.memory, options.cpus_per_worker, peers
    )


def _read_peers(path: Path) -> bytes:
    from obfuscatune.protocol.files import read_trusted

    try:
        return read_trusted(path, "peer certificate")
    except OSError as error:
        raise ConfigError(f"cannot read --peer {path}: {error.strerror}") from error


def _ports(text: str | None) -> range:
    if text is None:
        return range(0)
    first, _, last = text.partition("-")
    try:
        found = range(int(first), int(last or first) + 1)
    except ValueError:
        found = range(0)
    if not found or found[0] < 1 or found[-1] > 65535:
        raise ConfigError(f"--ports {text}: write a range of ports, as 7600-7699")
    return found


def _party(text: str) -> "Party":
    if text not in ("compute", "mask"):
        raise ConfigError(f"--party: expected compute or mask, found {text}")
    return cast("Party", text)


def _engine(options: UpOptions, settings: "NodeSettings", memory: int | None) -> Any:
    if options.engine == "local":
        from obfuscatune.cluster.local import LocalEngine

        return LocalEngine(options.place_names, settings)
    if options.engine != "ray":
        raise ConfigError(f"--engine: expected local or ray, found {options.engine}")
    from obfuscatune.cluster.ray_engine import RayEngine, Resources

    resources = Resources(options.cpus_per_worker, options.gpus_per_worker, memory)
    return RayEngine(options.address, options.name, options.place_names, settings, resources, grow=options.autoscale)


def _end(engine: Any, folder: "StateFolder") -> None:
    engine.close()
    folder.forget()


def _is_reachable(address: str) -> bool:
    """Whether something takes connections there; who it is, only a handshake tells."""
    from obfuscatune.protocol.addresses import TcpAddress, parse_address

    where = parse_address(address)
    if not isinstance(where, TcpAddress):
        return False
    try:
        socket.create_connection((where.host, where.port), _PROBE_SECONDS).close()
    except OSError:
        return False
    return True
