"""Redis that is away, or there and takes nothing now, as Transient."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from redis import exceptions

from services.chassis.errors import Transient

# A failover, a full memory or disk.
_UNAVAILABLE = (
    exceptions.ConnectionError,
    exceptions.TimeoutError,
    exceptions.ReadOnlyError,
    exceptions.OutOfMemoryError,
    exceptions.TryAgainError,
    exceptions.ClusterDownError,
    exceptions.MasterDownError,
)


@contextmanager
def transient() -> Iterator[None]:
    """Raises Transient for what may work soon; other errors pass."""
    try:
        yield
    except _UNAVAILABLE as error:
        raise Transient(f"Redis: {error}") from error
    except exceptions.ResponseError as error:
        if str(error).startswith("MISCONF"):  # it cannot write to its disk; redis-py has no class for it
            raise Transient(f"Redis: {error}") from error
        raise
