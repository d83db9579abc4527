"""Prometheus metrics of a service, in a registry of their own: sums over all owners, nothing of a request's content.

No label names an owner, a model, a file or a job: a scrape tells how busy the service is, and nothing of whom.
"""

from collections.abc import Callable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 30.0, 60.0, 300.0)


class Metrics:
    """What is counted."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "obfuscatune_requests", "HTTP requests, by route and status.", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "obfuscatune_request_seconds", "Time to answer.", ["route"], buckets=_SECONDS, registry=self.registry
        )
        self.tokens = Counter("obfuscatune_tokens", "Tokens, by kind.", ["kind"], registry=self.registry)
        self.refused = Counter(
            "obfuscatune_refused", "Requests that a limit or a term refused.", ["reason"], registry=self.registry
        )
        self.running = Gauge("obfuscatune_completions_running", "Completions under way.", registry=self.registry)

    def observe(self, name: str, help_text: str, read: Callable[[], Mapping[str, float]], label: str) -> None:
        """A gauge that is read when it is scraped: a value for each value of a label."""
        self.registry.register(_Read(name, help_text, read, label))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class _Read(Collector):
    def __init__(self, name: str, help_text: str, read: Callable[[], Mapping[str, float]], label: str) -> None:
        self._name, self._help, self._read, self._label = name, help_text, read, label

    def describe(self) -> list[GaugeMetricFamily]:
        return [GaugeMetricFamily(self._name, self._help, labels=[self._label])]

    def collect(self) -> list[GaugeMetricFamily]:
        family = GaugeMetricFamily(self._name, self._help, labels=[self._label])
        for value, number in self._read().items():
            family.add_metric([value], number)
        return [family]
