"""Results made by hand: of one load, and of a whole run."""

from __future__ import annotations

import random

from userspace_proxy.compare.modes import IPTABLES, IPVS, NFTABLES, USERSPACE, USERSPACE_COPY
from userspace_proxy.compare.results import DIRECT, DIRECT_AGAIN, Kind, ModeRun, Results, Sample, Timeline

KINDS: dict[str, Kind] = {
    DIRECT: "none",
    DIRECT_AGAIN: "none",
    NFTABLES: "kernel",
    IPTABLES: "kernel",
    IPVS: "kernel",
    USERSPACE: "proxy",
    USERSPACE_COPY: "proxy",
}


def results_of(case: str, figure: str, rounds: dict[str, list[float]]) -> Results:
    """Return results with one figure of one case: for each mode its value in each round."""
    modes = [ModeRun(name, name, KINDS[name], ours=KINDS[name] != "none") for name in rounds]
    results = Results("1.0", "2026-01-01T00:00:00+00:00", {}, 60.0, 3, 1.0, modes)
    add_rounds(results, case, figure, rounds)
    return results


def add_rounds(results: Results, case: str, figure: str, rounds: dict[str, list[float]]) -> None:
    """Add one more figure, for modes that took part."""
    results.samples += [
        Sample(case, mode, number, {figure: value})
        for mode, values in rounds.items()
        for number, value in enumerate(values, 1)
    ]


# For each mode: its share of the rate of direct connections, and its CPU for a request in microseconds.
_SPEEDS = {
    DIRECT: (1.0, 0.0),
    DIRECT_AGAIN: (0.97, 0.0),
    NFTABLES: (0.92, 0.0),
    IPTABLES: (0.9, 0.0),
    USERSPACE: (0.55, 14.0),
    USERSPACE_COPY: (0.5, 15.0),
    "haproxy": (0.54, 13.5),
    "nginx": (0.5, 14.5),
}

# Case, rate of direct connections, connections.
_LOADS = (("keepalive-1", 18e3, 1), ("new-1", 5e3, 1), ("keepalive-64", 38e3, 64), ("new-64", 9e3, 64))


def whole_run() -> Results:
    """Return a run with every case, three rounds, and a mode that did not take part: the shape of a real one."""
    chance = random.Random(1)
    modes = [ModeRun(name, name, KINDS.get(name, "proxy"), ours=name in KINDS) for name in _SPEEDS]
    modes.append(ModeRun(IPVS, IPVS, "kernel", ours=True, reason="this kernel has no IPVS"))
    machine = {"processors": "2 x example", "kernel": "6.12", "python": "3.11", "load before": "0.1"}
    run = Results("0.1.0", "2026-01-01T00:00:00+00:00", machine, 120.0, 3, 0.2, modes)
    for name, (speed, cpu_us) in _SPEEDS.items():
        for number in (1, 2, 3):
            for case, rate, clients in _LOADS:
                rate *= speed * chance.uniform(0.95, 1.05)
                latency = {f"{at}_ms": clients / rate * 1e3 * n for at, n in (("p50", 1), ("p99", 2), ("p999", 4))}
                costs = {
                    "proxy_cpu_s": cpu_us / 1e6,
                    "machine_cpu_s": (60 + cpu_us) / 1e6,
                    "switches": 2.0 * (cpu_us > 0),
                }
                run.samples.append(Sample(case, name, number, {"rate": rate, **costs, **latency, "failed": 0.0}))
            for case in ("bulk-1", "bulk-8"):
                costs = {"proxy_cpu_s": cpu_us / 40, "machine_cpu_s": 0.5 + cpu_us / 40, "switches": 100 * cpu_us}
                run.samples.append(
                    Sample(case, name, number, {"rate": 3 * speed * chance.uniform(0.95, 1.05), **costs})
                )
        if not name.startswith(DIRECT):
            for case in ("calls-request", "calls-connection", "calls-mb"):
                calls = {"recvfrom": 2.0, "sendto": 2.0, "epoll_wait": 0.1} if cpu_us else {"restart_syscall": 0.001}
                run.samples.append(Sample(case, name, 1, calls))
        if name != DIRECT_AGAIN:
            lost = 0 if cpu_us else 4
            run.timelines += [
                Timeline(event, name, 1, 0.1, 1.0, 3.0, [6] * 10 + [6 - lost] * 20, [0] * 30, [0] * 10 + [lost] * 20)
                for event in ("dies", "silent", "leaves")
            ]
    for services in (10, 1_000, 5_000):
        for name, added_us in ((NFTABLES, 10.0), (IPTABLES, 10.0 + services / 100), (USERSPACE, 150.0)):
            load = {"rules": 69.0, "load_s": services / 2e3, "load_cpu_s": services / 4e3, "change_ms": 50.0}
            dial = {
                "new_connection_ms": 0.08 + added_us / 1e3,
                "added_us": added_us,
                "direct_ms": 0.08,
                "spread_us": 5.0,
            }
            run.samples.append(Sample(f"services-{services}", name, 1, {**load, **dial}))
    return run
