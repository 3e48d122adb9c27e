"""Structured logs: a JSON object a line on stderr, with service, event_id and episode_id. OpenTelemetry goes here.

The ids live in contextvars: bound at the edges (bus handler, RPC server), seen by every log line, carried on by `rpc`.
"""

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import structlog

# The ids that follow an event through the services.
ID_KEYS = ("event_id", "episode_id")

_SHARED: list[Any] = [
    structlog.contextvars.merge_contextvars,
    structlog.stdlib.add_log_level,
    structlog.processors.TimeStamper(fmt="iso", utc=True),
    structlog.processors.format_exc_info,
]

log: structlog.stdlib.BoundLogger = structlog.get_logger()


def configure(service: str, level: str = "INFO") -> None:
    """Log as `service` from `level` (DEBUG, INFO, WARNING, ERROR) up; what libraries say too, their INFO left out."""

    def name_service(_logger: Any, _method: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        event.setdefault("service", service)
        return event

    _configure([name_service, *_SHARED], level)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[name_service, *_SHARED, structlog.stdlib.add_logger_name],
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    logging.basicConfig(level="WARNING" if level == "INFO" else level, handlers=[handler], force=True)
    logging.captureWarnings(True)


def _configure(processors: list[Any], level: str) -> None:
    structlog.configure(
        processors=[*processors, structlog.processors.JSONRenderer()],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
        # Looked up at each call: stdout is for results, and stderr may be replaced after the import.
        logger_factory=lambda *_args: structlog.PrintLogger(sys.stderr),
        cache_logger_on_first_use=False,
    )


@contextmanager
def bind(*, event_id: str | None = None, episode_id: str | None = None) -> Iterator[None]:
    """Give every log line and outgoing call inside the block these ids. None leaves an outer one as it is."""
    ids = {"event_id": event_id, "episode_id": episode_id}
    with structlog.contextvars.bound_contextvars(**{key: value for key, value in ids.items() if value is not None}):
        yield


def adopt(ids: Mapping[str, str]) -> None:
    """Give the rest of the running asyncio task these ids (by the names of ID_KEYS)."""
    structlog.contextvars.bind_contextvars(**ids)


def current_ids() -> dict[str, str]:
    """The bound ids, by the names of ID_KEYS."""
    bound = structlog.contextvars.get_contextvars()
    return {key: str(bound[key]) for key in ID_KEYS if key in bound}


# Before configure() is called (command-line programs, tests) the same lines go to stderr, never to stdout.
_configure(_SHARED, "INFO")
