"""Play histories, and say which seeds break an invariant.

`python -m tests.simulation.play FIRST COUNT` plays COUNT histories, by the seeds from FIRST on. A history is replayed
by its seed alone: `python -m tests.simulation.play SEED 1`.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter

from tests.simulation.history import History
from tests.simulation.install import installed

# More of them say nothing new.
_BROKEN_MAX = 5


def play(first: int, count: int, broken_max: int = _BROKEN_MAX) -> tuple[Counter[str], dict[int, str]]:
    """Play *count* histories. Return how often each kind of fault occurred, and what is broken by seed."""
    faults: Counter[str] = Counter()
    broken: dict[int, str] = {}
    with installed():
        for seed in range(first, first + count):
            history = History(seed)
            try:
                faults += history.play()
            except Exception as error:  # noqa: BLE001 - it is told
                broken[seed] = f"{history.kind}: {type(error).__name__}: {error}"
                if len(broken) == broken_max:
                    break
    return faults, broken


def main() -> int:
    gc.freeze()
    gc.set_threshold(50_000)
    faults, broken = play(*map(int, sys.argv[1:3]))
    for seed, what in broken.items():
        sys.stdout.write(f"seed {seed}: {what}\n")
    sys.stdout.write(" ".join(f"{kind}={count}" for kind, count in sorted(faults.items()) if kind) + "\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main())
