"""Which offset of one partition may be committed, when events finish in any order. Pure."""


class Watermark:
    """Invariant: every offset below `position` that was started is done.

    Offsets are started in rising order; gaps are legal (compaction, transaction markers)."""

    def __init__(self) -> None:
        self._open: dict[int, None] = {}  # insertion order = offset order
        self._end: int | None = None

    def start(self, offset: int) -> None:
        if self._end is not None and offset < self._end:
            raise ValueError(f"offset {offset} started after {self._end - 1}")
        self._open[offset] = None
        self._end = offset + 1

    def done(self, offset: int) -> None:
        del self._open[offset]

    @property
    def position(self) -> int | None:
        """The offset to commit: the lowest unfinished one, or the one after the last. None: nothing was started."""
        return next(iter(self._open), self._end)
