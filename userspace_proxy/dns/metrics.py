"""Metrics of cluster DNS, under CoreDNS's names where they mean the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, Metric

from userspace_proxy.dns.wire import Counts

_TOTALS = {
    "hits": ("coredns_cache_hits", "queries answered with an answer that was packed before"),
    "misses": ("coredns_cache_misses", "queries for which an answer had to be packed"),
    "forwarded": ("coredns_forward_requests", "queries sent to other servers"),
    "forward_refused": ("coredns_forward_max_concurrent_rejects", "queries refused: too many under way, or no server"),
    "forward_hits": ("userspace_proxy_dns_forward_hits", "queries answered with what other servers answered before"),
    "forward_failures": ("userspace_proxy_dns_forward_failures", "queries that no other server answered"),
    "cut": ("userspace_proxy_dns_answers_cut", "answers with a part of their records: all do not fit in a message"),
}


def dns_metrics(counts: Counts, restarts: int) -> Iterator[Metric]:
    """Yield what the DNS process has counted; *restarts*: how often it was replaced."""
    asked: Counter[tuple[str, str, str]] = Counter()
    answered: Counter[str] = Counter()
    for proto, family, kind, rcode, count in counts.requests:
        asked[proto, family, kind] += count
        answered[rcode] += count
    requests = CounterMetricFamily("coredns_dns_requests", "DNS queries", labels=["proto", "family", "type"])
    for labels, count in asked.items():
        requests.add_metric(labels, count)
    responses = CounterMetricFamily("coredns_dns_responses", "DNS answers", labels=["rcode"])
    for rcode, count in answered.items():
        responses.add_metric([rcode], count)
    yield requests
    yield responses
    for key, (name, words) in _TOTALS.items():
        yield CounterMetricFamily(name, words, value=counts.totals.get(key, 0))
    yield CounterMetricFamily("userspace_proxy_dns_restarts", "DNS processes replaced", value=restarts)
