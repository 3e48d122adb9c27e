"""Errors that a person can mend, as one sentence each, for all commands.

Anything else is a bug and keeps its traceback.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

# By name: importing the classes takes seconds (torch, pymilvus), and only those that are imported can have been raised.
_SAID = frozenset({
    "services.chassis.errors.BadInput",
    "services.chassis.errors.Exhausted",
    "services.chassis.errors.Transient",
    "services.data.readers.BadDataError",
    "services.retrieval.library.LibraryError",
})  # fmt: skip


def sentence(error: Exception) -> str | None:
    """What to tell the person, on one line; None for a bug."""
    import grpc
    from pydantic import ValidationError

    from services.chassis.statuses import from_rpc_error

    if isinstance(error, grpc.aio.AioRpcError):
        error = from_rpc_error(error)
    words: str | None = None
    if any(f"{kind.__module__}.{kind.__qualname__}" in _SAID for kind in type(error).__mro__):
        words = str(error)
    elif isinstance(error, ValidationError):
        words = "; ".join(
            f"{'.'.join(map(str, item['loc'])).upper()}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_input=False)
        )
    elif isinstance(error, OSError) and error.filename is not None:
        words = f"{error.filename}: {error.strerror}"
    return None if words is None else " ".join(words.split())


def run(app: Callable[[], object]) -> None:
    """A command-line program: exit status 2 and one sentence for whatever a person can mend."""
    try:
        app()
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        print(said, file=sys.stderr)
        sys.exit(2)
