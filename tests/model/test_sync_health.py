"""Whether syncs keep up: kube-proxy's own tests (TestHealthzServer), and further cases."""

from __future__ import annotations

from tests.fakes import FakeClock
from userspace_proxy.model.sync_health import FAMILY_NAMES, SyncHealth

TIMEOUT_S = 60.0


class Rig:
    def __init__(self) -> None:
        self.clock, self.wall = FakeClock(), FakeClock(1_700_000_000.0)
        self.sync_health = SyncHealth(TIMEOUT_S, self.clock, self.wall)

    def later(self, seconds: float) -> None:
        self.clock.now_s += seconds
        self.wall.now_s += seconds

    def sync(self, *, succeeded: bool = True, takes_s: float = 0.0) -> None:
        self.sync_health.note_begin()
        self.later(takes_s)
        self.sync_health.note_end(succeeded=succeeded)

    @property
    def healthy(self) -> tuple[bool, ...]:
        return tuple(health.healthy for health in self.sync_health.of_families().values())


def test_a_proxy_without_queued_changes_stays_healthy() -> None:
    rig = Rig()
    rig.later(1_000_000)
    assert rig.healthy == (True, True)

    rig.sync_health.note_queued()
    rig.sync()
    rig.later(1_000_000)

    assert rig.healthy == (True, True)


def test_a_queued_change_is_healthy_until_the_timeout() -> None:
    rig = Rig()
    rig.sync_health.note_queued()
    rig.later(TIMEOUT_S - 0.001)
    assert rig.healthy == (True, True)

    rig.later(0.001)

    assert rig.healthy == (False, False)


def test_the_oldest_queued_change_decides_health() -> None:
    rig = Rig()
    for _ in range(7):
        rig.sync_health.note_queued()
        rig.later(TIMEOUT_S / 6)

    assert rig.healthy == (False, False)


def test_failed_syncs_keep_the_age_of_a_queued_change() -> None:
    rig = Rig()
    rig.sync_health.note_queued()
    for _ in range(6):
        assert rig.healthy == (True, True)
        rig.later(TIMEOUT_S / 6)
        rig.sync(succeeded=False)

    assert rig.healthy == (False, False)


def test_a_sync_that_hangs_makes_a_proxy_unhealthy() -> None:
    rig = Rig()
    rig.sync_health.note_queued()
    rig.sync_health.note_begin()

    rig.later(TIMEOUT_S)

    assert rig.healthy == (False, False)


def test_a_successful_sync_restores_health_and_the_next_change_has_its_own_age() -> None:
    rig = Rig()
    rig.sync_health.note_queued()
    rig.later(TIMEOUT_S * 2)
    rig.sync()
    assert rig.healthy == (True, True)

    rig.sync_health.note_queued()
    rig.later(TIMEOUT_S / 2)

    assert rig.healthy == (True, True)


def test_a_change_during_a_sync_is_queued_for_the_next_one() -> None:
    rig = Rig()
    rig.sync_health.note_queued()
    rig.sync_health.note_begin()
    rig.later(1)
    rig.sync_health.note_queued()
    rig.sync_health.note_end(succeeded=True)
    assert rig.healthy == (True, True)

    rig.later(TIMEOUT_S)

    assert rig.healthy == (False, False)


def test_a_change_during_a_failing_sync_keeps_the_age_of_the_oldest_one() -> None:
    rig = Rig()
    rig.sync_health.note_queued()
    rig.sync_health.note_begin()
    rig.later(TIMEOUT_S / 2)
    rig.sync_health.note_queued()
    rig.sync_health.note_end(succeeded=False)

    rig.later(TIMEOUT_S / 2)

    assert rig.healthy == (False, False)


def test_each_family_has_its_own_queued_changes() -> None:
    rig = Rig()
    rig.sync_health.note_queued(["IPv6"])

    rig.later(TIMEOUT_S)

    assert rig.healthy == (True, False)


def test_times_are_reported_by_the_wall_clock() -> None:
    rig = Rig()
    assert [health.updated_at for health in rig.sync_health.of_families().values()] == [None, None]

    rig.sync_health.note_queued(["IPv4"])
    rig.sync(takes_s=2)
    rig.later(5)

    assert rig.sync_health.queued_at == {"IPv4": 1_700_000_000.0}
    assert [health.updated_at for health in rig.sync_health.of_families().values()] == [1_700_000_002.0] * 2
    assert tuple(rig.sync_health.of_families()) == FAMILY_NAMES


def test_setting_the_wall_clock_does_not_change_health() -> None:
    rig = Rig()
    rig.sync_health.note_queued()

    rig.wall.now_s += 1_000_000

    assert rig.healthy == (True, True)
