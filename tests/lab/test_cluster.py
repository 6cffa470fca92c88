"""What the simulated cluster reads of the proxy."""

from __future__ import annotations

from tests.admin.scrape import every_metric
from userspace_proxy.lab.cluster import timestamps


def test_the_times_of_the_last_change_and_of_the_last_sync_are_found_in_the_metrics_of_the_proxy() -> None:
    queued, synced = timestamps(every_metric().encode())

    assert queued >= 0
    assert synced >= 0
