"""Allocate numbers (proxy ports, cluster IPs) that stay the same after a restart.

The first candidate for a key is its remembered number, then the hash of the key, then the numbers after the hash.
Most keys therefore keep their number even if the memory is lost.
"""

import hashlib
from collections.abc import Iterator, Mapping


class Allocator:
    """Allocates numbers in ``[0, size)``, each to one key. The meaning of a number is up to the caller.

    ``changes`` counts allocations and releases. A caller that saves `memory` compares it to see whether to save again.
    """

    def __init__(self, size: int, remembered: Mapping[str, int] | None = None) -> None:
        if size < 1:
            raise ValueError(f"nothing to allocate from: size is {size}")
        self.size = size
        self._number_of: dict[str, int] = {}
        self._key_of: dict[int, str] = {}
        self._remembered = {key: number for key, number in (remembered or {}).items() if 0 <= number < size}
        self.changes = 0
        self._promised = set(self._remembered.values())

    def candidates(self, key: str) -> Iterator[int]:
        """Yield the free numbers for *key* in the order to try them; numbers remembered for other keys come last."""
        remembered = self._remembered.get(key)
        if remembered is not None and remembered not in self._key_of:
            yield remembered
        first = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) % self.size
        promised = []
        for step in range(self.size):
            number = (first + step) % self.size
            if number in self._key_of or number == remembered:
                continue
            if number in self._promised:
                promised.append(number)
            else:
                yield number
        yield from promised

    def take(self, key: str, number: int) -> bool:
        """Allocate *number* to *key*. Return False if another key holds it."""
        holder = self._key_of.get(number)
        if holder is not None:
            return holder == key
        self.release(key)
        self.changes += 1
        self._number_of[key] = number
        self._key_of[number] = key
        if self._remembered.get(key) != number:
            self._promised.discard(self._remembered.pop(key, -1))
            self._remembered[key] = number
            self._promised.add(number)
        return True

    def allocate(self, key: str) -> int | None:
        """Return the number of *key*, allocating one if needed, or None if all numbers are taken."""
        held = self._number_of.get(key)
        if held is not None:
            return held
        for number in self.candidates(key):
            self.take(key, number)
            return number
        return None

    def release(self, key: str) -> None:
        """Free the number of *key*. The number stays remembered in case the key returns."""
        number = self._number_of.pop(key, None)
        if number is None:
            return
        self.changes += 1
        del self._key_of[number]
        if len(self._remembered) > 2 * self.size:  # bounds the memory if names keep changing
            forgotten = next(k for k in self._remembered if k not in self._number_of)
            self._promised.discard(self._remembered.pop(forgotten))

    def holder(self, number: int) -> str | None:
        """Return the key that holds *number*, or None if it is free."""
        return self._key_of.get(number)

    def memory(self) -> dict[str, int]:
        """Return every number held now, for the next process to remember."""
        return dict(self._number_of)
