"""Histories by seed: see `history.py` for the invariants, and `play.py` to replay one."""

from __future__ import annotations

import asyncio
import itertools
import sys

import pytest

from tests.simulation import history, probing, processes
from tests.simulation.equivalent import EQUIVALENT
from tests.simulation.history import History
from tests.simulation.install import installed
from tests.simulation.mutation import MODULES, mutants

_PROCESSES = 2
_FAULTS = history.FAULTS | probing.FAULTS | processes.FAULTS


async def _run(program: str, first: int, count: int, timeout_s: float) -> str:
    command = sys.executable, "-m", f"tests.simulation.{program}", str(first), str(count)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        said, _ = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, said.decode()
    return said.decode()


async def _play_all(first: int, count: int, timeout_s: float) -> None:
    part = count // _PROCESSES
    said = await asyncio.gather(*(_run("play", first + n * part, part, timeout_s) for n in range(_PROCESSES)))
    for of_one in said:
        assert {word.partition("=")[0] for word in of_one.split()} >= _FAULTS, of_one


@pytest.mark.timeout(600)  # they take 13 s of two cores, if there are two
def test_every_invariant_holds_in_histories_with_every_kind_of_fault() -> None:
    asyncio.run(_play_all(0, 2_000, 580))


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_every_invariant_holds_in_very_many_histories() -> None:
    asyncio.run(_play_all(1_000_000, 100_000, 3500))


@pytest.mark.soak
@pytest.mark.timeout(7200)
def test_nine_of_ten_mutants_of_the_data_plane_are_found() -> None:
    asyncio.run(_run("mutation", 1, 400, 7_000))


def test_every_mutant_that_is_judged_equivalent_exists() -> None:
    places = {mutant.place for name in MODULES for mutant in mutants(name)}

    assert places >= EQUIVALENT.keys()


def test_a_history_has_at_least_twenty_connections() -> None:
    with installed():
        for seed in range(20):
            played = History(seed)
            played.play()

            assert len(played.world.clients) >= 20, seed


def test_a_seed_replays_its_history_exactly() -> None:
    played = []
    with installed():
        for seed in range(10):  # some have probes, a worker, or a hand-over
            first, again = History(seed), History(seed)
            for each in (first, again):
                each.play()

            assert first.happened == again.happened
            assert (first.kernel.now, first.kernel.steps) == (again.kernel.now, again.kernel.steps)
            assert first.faults == again.faults
            played.append(first.happened)
    assert all(one != next_one for one, next_one in itertools.pairwise(played))
