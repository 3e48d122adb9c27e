import pytest

from services.chassis.bus import MAX_EVENT_BYTES, Event
from services.chassis.bus.failures import MAX_REASON_CHARACTERS, RetryPolicy, dead_letter, read_retry, retry_later
from services.chassis.errors import BadInput, Transient


def make_event(value: bytes = b"body", attempt: int = 3) -> Event:
    return Event("images", "line", value, {"ce_id": "7", "traceparent": "00-ab"}, 2, 41, attempt)


def test_retry_record_gives_the_event_back() -> None:
    event = make_event()
    record = retry_later(event, Transient("later"), "inspection", now=1000.0, delay_s=10)
    assert (record.topic, record.key, record.value) == ("images.retry", "line", b"body")
    read = Event(record.topic, record.key, record.value, record.headers, 0, 5)
    retried = read_retry(read)
    assert (retried.group, retried.not_before) == ("inspection", 1010.0)
    assert retried.event == make_event(attempt=4)


@pytest.mark.parametrize("text", ["", "nan", "inf", "soon", "1e999"])
def test_bad_retry_headers_do_not_lose_the_event(text: str) -> None:
    headers = {"agentiad-attempts": text, "agentiad-not-before": text, "agentiad-source-offset": text, "ce_id": "7"}
    retried = read_retry(Event("images.retry", "k", b"v", headers, 1, 9))
    assert retried.event == Event("images", "k", b"v", {"ce_id": "7"}, 1, 9, 1)
    assert (retried.group, retried.not_before) == ("", 0.0)


def test_dead_letter_keeps_the_event() -> None:
    record = dead_letter(make_event(), BadInput("x" * 5000), "inspection", now=0.0)
    assert (record.topic, record.key, record.value) == ("images.dlq", "line", b"body")
    assert record.headers["ce_id"] == "7"
    assert len(record.headers["agentiad-reason"]) == MAX_REASON_CHARACTERS
    assert record.headers["agentiad-failed-at"] == "1970-01-01T00:00:00Z"


def test_dead_letter_of_a_failed_dead_letter_names_the_last_failure() -> None:
    """An operator put a dead letter back into its topic, headers and all."""
    event = Event("images", "k", b"", {"agentiad-reason": "old", "agentiad-attempts": "6"}, 0, 9)
    headers = dead_letter(event, BadInput("new"), "inspection", now=0.0).headers
    assert (headers["agentiad-reason"], headers["agentiad-attempts"]) == ("new", "1")


def test_too_large_body_is_left_out() -> None:
    record = dead_letter(make_event(bytes(MAX_EVENT_BYTES + 1)), BadInput("large"), "g", now=0.0)
    assert (record.value, record.headers["agentiad-omitted-bytes"]) == (b"", str(MAX_EVENT_BYTES + 1))


def test_delays_double() -> None:
    policy = RetryPolicy()
    assert [policy.pause_s(call) for call in (1, 2)] == [0.2, 0.4]
    assert [policy.delay_s(attempt) for attempt in (3, 6, 9, 12, 2157)] == [10.0, 20.0, 40.0, 60.0, 60.0]
