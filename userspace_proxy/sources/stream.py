"""Splits a stream of chunks into lines. Pure."""


class LineSplitter:
    """Splits chunks into lines; an incomplete line is kept for the next chunk."""

    def __init__(self, longest_bytes: int) -> None:
        self._longest_bytes = longest_bytes
        self._begun: list[bytes] = []
        self._begun_bytes = 0

    def lines(self, chunk: bytes) -> list[bytes]:
        """Return the lines that end in *chunk*, without line ends and empty lines.

        Raises:
            ValueError: a line is too long; the stream cannot be used further.
        """
        head, newline, rest = chunk.partition(b"\n")
        self._begun_bytes += len(head)
        if self._begun_bytes > self._longest_bytes:
            raise ValueError(f"a line is longer than {self._longest_bytes} bytes")
        self._begun.append(head)
        if not newline:
            return []
        first = b"".join(self._begun)
        *others, last = rest.split(b"\n")
        self._begun, self._begun_bytes = [last], len(last)
        return [line for line in (first, *others) if line]
