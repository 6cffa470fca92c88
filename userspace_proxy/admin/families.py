"""Metric families: one function for counters and gauges, with or without labels."""

from collections.abc import Callable, Iterable, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from userspace_proxy.model.histogram import Histogram

BY_FAMILY = ("ip_family",)


def family(
    name: str, text: str, labels: Sequence[str], values: Iterable[tuple[Sequence[str], float]], *, rises: bool
) -> Metric:
    """Return the counter (if it *rises*) or gauge *name* with a value for each tuple of label values."""
    make: Callable[..., CounterMetricFamily | GaugeMetricFamily] = CounterMetricFamily if rises else GaugeMetricFamily
    made = make(name, text, labels=labels)
    for label_values, value in values:
        made.add_metric(label_values, value)
    return made


def single(name: str, text: str, value: float, *, rises: bool) -> Metric:
    """Return the counter (if it *rises*) or gauge *name* with one value and no labels."""
    return family(name, text, (), [((), value)], rises=rises)


def durations(name: str, text: str, histograms: Mapping[str, Histogram]) -> Metric:
    """Return the histogram *name*, in seconds, with one of *histograms* for each IP family."""
    made = HistogramMetricFamily(name, text, labels=BY_FAMILY)
    for ip_family, histogram in histograms.items():
        made.add_metric([ip_family], histogram.buckets(), histogram.total_s)
    return made


def by_family(name: str, text: str, values: Mapping[str, float], *, rises: bool = True) -> Metric:
    """Return the counter (if it *rises*) or gauge *name* with a value for each IP family."""
    return family(name, text, BY_FAMILY, (((ip_family,), value) for ip_family, value in values.items()), rises=rises)
