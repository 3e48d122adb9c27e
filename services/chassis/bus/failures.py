"""What becomes of an event whose handler failed: the retry and dead-letter records and their headers. Pure.

Key, value and headers stay as they came; the headers below are added (and taken off again before a handler sees the
event). A retry record names the group that failed: other groups that read the same topic skip it.
"""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

from services.chassis.bus import MAX_EVENT_BYTES, Event
from services.chassis.topics import dlq, retry

PREFIX = "agentiad-"
ERROR = "agentiad-error"  # class of the exception
REASON = "agentiad-reason"
SOURCE_TOPIC = "agentiad-source-topic"
SOURCE_PARTITION = "agentiad-source-partition"
SOURCE_OFFSET = "agentiad-source-offset"
GROUP = "agentiad-group"
ATTEMPTS = "agentiad-attempts"
FAILED_AT = "agentiad-failed-at"  # RFC 3339
OMITTED_BYTES = "agentiad-omitted-bytes"  # of a value too large to publish again: it lies in the source only
NOT_BEFORE = "agentiad-not-before"  # Unix seconds; retry records only

MAX_REASON_CHARACTERS = 1000


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """in_place: calls of the handler in one delivery, `back_off_s` apart, doubling. max_attempts: calls in all, then
    the dead letter. retry_delay_s: wait in the retry topic, doubling with each passage up to `max_delay_s`.

    With these defaults 10, 20, 40, 60, 60, … s and 12 hours in all: an outage is not the event's fault.
    """

    in_place: int = 3
    back_off_s: float = 0.2
    retry_delay_s: float = 10.0
    max_delay_s: float = 60.0
    max_attempts: int = 2160

    def pause_s(self, call: int) -> float:
        """Before the next call in place; call: 1 for the first of this delivery."""
        return self.back_off_s * 2.0 ** (call - 1)

    def delay_s(self, attempt: int) -> float:
        """In the retry topic, for an event that has been tried `attempt` times."""
        passages = attempt // self.in_place - 1
        return min(self.max_delay_s, self.retry_delay_s * 2.0 ** min(passages, 32))


@dataclass(frozen=True, slots=True)
class Record:
    """What to publish."""

    topic: str
    key: str
    value: bytes
    headers: dict[str, str]


@dataclass(frozen=True, slots=True)
class Retried:
    """A record of a retry topic, read back. group: "" for everyone. not_before: Unix seconds."""

    event: Event
    group: str
    not_before: float


def dead_letter(event: Event, error: BaseException, group: str, now: float) -> Record:
    headers = _failed(event, error, group, now)
    if len(event.value) <= MAX_EVENT_BYTES:
        return Record(dlq(event.topic), event.key, event.value, headers)
    return Record(dlq(event.topic), event.key, b"", headers | {OMITTED_BYTES: str(len(event.value))})


def retry_later(event: Event, error: BaseException, group: str, now: float, delay_s: float) -> Record:
    headers = _failed(event, error, group, now) | {NOT_BEFORE: repr(now + delay_s)}
    return Record(retry(event.topic), event.key, event.value, headers)


def read_retry(read: Event) -> Retried:
    """read: the event as it lies in the retry topic. A header that is missing or bad (someone else wrote the record)
    counts as "at once, for everyone, first attempt": an event is never lost for its headers."""
    headers = read.headers
    event = Event(
        topic=headers.get(SOURCE_TOPIC, read.topic.removesuffix(retry(""))),
        key=read.key,
        value=read.value,
        headers={name: text for name, text in headers.items() if not name.startswith(PREFIX)},
        partition=int(_number(headers.get(SOURCE_PARTITION), read.partition)),
        offset=int(_number(headers.get(SOURCE_OFFSET), read.offset)),
        attempt=int(_number(headers.get(ATTEMPTS), 0)) + 1,
    )
    return Retried(event, headers.get(GROUP, ""), _number(headers.get(NOT_BEFORE), 0.0))


def _number(text: str | None, default: float) -> float:
    try:
        number = float(text or "")
    except ValueError:
        return default
    return number if math.isfinite(number) else default


def _failed(event: Event, error: BaseException, group: str, now: float) -> dict[str, str]:
    return dict(event.headers) | {
        ERROR: type(error).__name__,
        REASON: str(error)[:MAX_REASON_CHARACTERS],
        SOURCE_TOPIC: event.topic,
        SOURCE_PARTITION: str(event.partition),
        SOURCE_OFFSET: str(event.offset),
        GROUP: group,
        ATTEMPTS: str(event.attempt),
        FAILED_AT: datetime.fromtimestamp(now, UTC).isoformat().replace("+00:00", "Z"),
    }
