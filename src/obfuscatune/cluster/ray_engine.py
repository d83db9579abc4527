"""Workers as actors of a Ray cluster. Ray chooses the machines, restarts actors, and asks its autoscaler for more.

Run where Ray is installed, on the operator's side. Ray pickles what its own processes say to each other; nothing of
that reaches an enclave, which reads the published list and speaks the wire protocol.
"""

import contextlib
import os
from dataclasses import dataclass
from typing import Any

from obfuscatune.cluster.node import Node, NodeSettings, Report
from obfuscatune.errors import ConfigError, ConnectionLost

NAMESPACE = "obfuscatune"
_ANSWER_SECONDS = 5.0
_BUSY = "the actor does not answer"


@dataclass(frozen=True)
class Resources:
    """What one worker takes of a cluster, in Ray's terms."""

    cpus: float
    gpus: float
    memory: int | None
    """Bytes that Ray sets aside."""

    @property
    def bundle(self) -> dict[str, float]:
        """For a placement group; without what is 0, as Ray wants it."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory or 0)}
        return {name: amount for name, amount in amounts.items() if amount}


class RayPlace:
    """An actor, or the wish for one."""

    def __init__(self, name: str, engine: "RayEngine", number: int) -> None:
        self.name = name
        self._engine, self._number = engine, number
        self._actor: Any = None

    def report(self) -> Report | None:
        """See `Place`."""
        if self._actor is None:
            self._actor = self._engine.actor(self.name, self._number)
        found: Report | None = self._call("report") if self._actor is not None else None
        return found

    def request(self) -> bytes:
        """See `Place`."""
        return bytes(self._call("request", needed=True))

    def start(self, certificate: bytes) -> None:
        """See `Place`."""
        self._call("start", certificate, needed=True)

    def close(self) -> None:
        """See `Place`."""
        if self._actor is not None:
            self._call("close")
            self._engine.kill(self._actor)
            self._actor = None

    def _call(self, method: str, *arguments: Any, needed: bool = False) -> Any:
        """What the actor answers; None where it does not in time, or `needed` raises ConnectionLost."""
        from ray import exceptions, get

        try:
            return get(getattr(self._actor, method).remote(*arguments), timeout=_ANSWER_SECONDS)
        except exceptions.RayActorError as error:
            if not isinstance(error, exceptions.ActorUnavailableError):
                self._actor = None  # it is not restarted any more: another is made
        except exceptions.RayTaskError as error:
            raise ConnectionLost(f"the actor failed: {type(error.cause).__name__}") from None
        except exceptions.RayError:
            pass
        if needed:
            raise ConnectionLost(_BUSY)
        return None


class RayEngine:
    """A placement group of one bundle for each worker, spread over machines, and a detached actor in each.

    Actors that an earlier supervisor left running are taken over.
    """

    def __init__(
        self, cluster: str, fleet: str, names: list[str], settings: NodeSettings, resources: Resources, *, grow: bool
    ) -> None:
        """Connect to the cluster.

        Args:
            grow: Ask the autoscaler for the machines at once.

        Raises:
            ConfigError: Ray is not installed, or there is no such cluster.
        """
        self._ray = connect(cluster)
        self._settings, self._resources = settings, resources
        self._group_name = fleet
        self._group = self._placement_group([resources.bundle] * len(names))
        self._grow = grow
        if grow:
            self._request([resources.bundle] * len(names))
        self.places = [RayPlace(name, self, number) for number, name in enumerate(names)]

    def actor(self, name: str, number: int) -> Any:
        """The actor of that name, made in its bundle where there is none; None while there is no machine for it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        try:
            return self._ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            pass
        if not self._group.wait(0):
            return None
        it = self._resources
        return (
            self._ray.remote(Node)
            .options(
                name=name,
                namespace=NAMESPACE,
                lifetime="detached",
                max_restarts=-1,
                max_task_retries=0,
                num_cpus=it.cpus,
                num_gpus=it.gpus,
                memory=it.memory,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=number),
            )
            .remote(name, self._settings)
        )

    def kill(self, actor: Any) -> None:
        """End an actor for good; its worker ends with it."""
        self._ray.kill(actor, no_restart=True)

    def close(self) -> None:
        """End the fleet: actors, placement group, the wish for machines."""
        for place in self.places:
            place.report()  # finds an actor that this process did not use yet
            place.close()
        self._ray.util.remove_placement_group(self._group)
        if self._grow:
            self._request([])
        self._ray.shutdown()

    def leave(self) -> None:
        """Let the workers run, for a later supervisor."""
        self._ray.shutdown()

    def _placement_group(self, bundles: list[dict[str, float]]) -> Any:
        util = self._ray.util
        try:
            group = util.get_placement_group(self._group_name)
        except ValueError:
            return util.placement_group(bundles, strategy="SPREAD", name=self._group_name, lifetime="detached")
        if len(group.bundle_specs) != len(bundles):
            raise ConfigError(
                f"the fleet {self._group_name} has {len(group.bundle_specs)} workers on this cluster already: "
                "`obfuscatune fleet down` ends it; or choose another --name"
            )
        return group

    def _request(self, bundles: list[dict[str, float]]) -> None:
        from ray.autoscaler.sdk import request_resources

        request_resources(bundles=[{name: int(value) for name, value in it.items()} for it in bundles])


def connect(cluster: str) -> Any:
    """Ray's module, connected to the cluster.

    Raises:
        ConfigError: Ray is not installed here, or there is no such cluster.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        import ray
    except ModuleNotFoundError:
        raise ConfigError(
            '--engine ray takes Ray, on the operator\'s machine: pip install "obfuscatune[ray]"'
        ) from None
    try:
        ray.init(address=cluster, namespace=NAMESPACE, log_to_driver=False, logging_level="ERROR")
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"no Ray cluster at {cluster}: {' '.join(str(error).split())[:300]}") from error
    return ray


def remove(cluster: str, fleet: str, names: list[str]) -> int:
    """End what a supervisor that has gone left running. Returns how many actors there were."""
    ray = connect(cluster)
    count = 0
    for name in names:
        try:
            actor = ray.get_actor(name, namespace=NAMESPACE)
        except ValueError:
            continue
        with contextlib.suppress(ray.exceptions.RayError):  # it is ended all the same
            ray.get(actor.close.remote(), timeout=_ANSWER_SECONDS)
        ray.kill(actor, no_restart=True)
        count += 1
    with contextlib.suppress(ValueError):  # there is none
        ray.util.remove_placement_group(ray.util.get_placement_group(fleet))
    ray.shutdown()
    return count
