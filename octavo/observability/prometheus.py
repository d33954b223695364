"""Metrics as a page that Prometheus reads, in its text format.

Format and escaping are prometheus_client's; the numbers are ``metrics.py``'s, taken anew at each call. Imports
prometheus_client, which only a server needs. OpenMetrics is not offered: for it prometheus_client turns the colon in
our names into an underscore, and a scraper that prefers it would find none of the names that dashboards ask for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from prometheus_client import CollectorRegistry, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from octavo.observability.metrics import HELP, MIRROR_PREFIX, OLDER_NAMES, PREFIX, Counter, Gauge, Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_TODAY = {old: new for new, old in OLDER_NAMES.items()}


def render(metrics: Iterable[Metric], *, mirror: bool = False, with_process: bool = False) -> bytes:
    """The page.

    Args:
        metrics: What to show.
        mirror: Show each a second time under vLLM's prefix.
        with_process: Add memory, CPU time and open files of this process.

    Returns:
        The body, of CONTENT_TYPE.
    """
    shown = list(metrics)
    if mirror:
        shown += _mirrored(shown)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page(shown))
    if with_process:
        ProcessCollector(registry=registry)
    return generate_latest(registry)


def _mirrored(metrics: Iterable[Metric]) -> Iterator[Metric]:
    for each in list(metrics):
        name = each.name.removeprefix(PREFIX)
        for known in (name, OLDER_NAMES.get(name)):
            if known is not None:
                yield replace(each, name=MIRROR_PREFIX + known)


class _Page:
    """A collector of one use."""

    def __init__(self, metrics: list[Metric]) -> None:
        self._metrics = metrics

    def describe(self) -> list[Family]:
        """Nothing: names need no check for doubles, the registry lives for one page."""
        return []

    def collect(self) -> Iterator[Family]:
        """One family per name, in the order of the first of each."""
        by_name: dict[str, list[Metric]] = {}
        for each in self._metrics:
            by_name.setdefault(each.name, []).append(each)
        for name, samples in by_name.items():
            yield _family(name, samples)


def _family(name: str, samples: list[Metric]) -> Family:
    plain = name.partition(":")[2]
    about = HELP[_TODAY.get(plain, plain)]
    names = list(samples[0].labels)
    first = samples[0]
    if isinstance(first, Counter):
        family: CounterMetricFamily | GaugeMetricFamily = CounterMetricFamily(name, about, labels=names)
    elif isinstance(first, Gauge):
        family = GaugeMetricFamily(name, about, labels=names)
    else:
        spread = HistogramMetricFamily(name, about, labels=names)
        for each in samples:
            assert not isinstance(each, Counter | Gauge), each
            spread.add_metric(list(each.labels.values()), list(each.buckets.items()), each.sum)
        return spread
    for each in samples:
        assert isinstance(each, Counter | Gauge) and list(each.labels) == names, each
        family.add_metric(list(each.labels.values()), each.value)
    return family
