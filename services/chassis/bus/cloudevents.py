"""CloudEvents 1.0, Kafka protocol binding, binary mode: attributes are headers with the prefix `ce_`, the body is the
protobuf.

Source: https://github.com/cloudevents/spec/blob/v1.0.2/cloudevents/bindings/kafka-protocol-binding.md, section 3.2.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from services.chassis.errors import BadInput

SPEC_VERSION = "1.0"
CONTENT_TYPE = "application/protobuf"
TRACEPARENT = "traceparent"


@dataclass(frozen=True, slots=True)
class Attributes:
    """time: aware; None if the producer gave none. traceparent: W3C trace context, "" if none."""

    event_id: str
    type_name: str
    source: str
    time: datetime | None
    traceparent: str


def headers(event_id: str, type_name: str, source: str, time: datetime, traceparent: str = "") -> dict[str, str]:
    """Headers of an event. type_name: full protobuf name; source: URI reference of the publisher, such as
    `/agentiad/agent`; time: aware datetime of the occurrence."""
    made = {
        "ce_id": event_id,
        "ce_source": source,
        "ce_type": type_name,
        "ce_specversion": SPEC_VERSION,
        "ce_time": time.astimezone(UTC).isoformat().replace("+00:00", "Z"),
        "content-type": CONTENT_TYPE,
    }
    if traceparent:
        made[TRACEPARENT] = traceparent
    return made


def parse(headers: Mapping[str, str], expected: str = "") -> Attributes:
    """`expected`: the only type that is accepted; empty: any. Raises BadInput, naming what is wrong: a required
    attribute is missing or empty, another spec version or type, a bad time, a body that is not protobuf."""
    missing = [name for name in ("ce_id", "ce_source", "ce_type", "ce_specversion") if not headers.get(name)]
    if missing:
        raise BadInput(f"not a CloudEvent: header {', '.join(missing)} missing")
    if headers["ce_specversion"] != SPEC_VERSION:
        raise BadInput(f"CloudEvents version {headers['ce_specversion']!r}, expected {SPEC_VERSION}")
    content_type = headers.get("content-type", CONTENT_TYPE)
    if content_type.split(";")[0].strip().lower() != CONTENT_TYPE:
        raise BadInput(f"content-type {content_type!r}, expected {CONTENT_TYPE}")
    attributes = Attributes(
        event_id=headers["ce_id"],
        type_name=headers["ce_type"],
        source=headers["ce_source"],
        time=_parse_time(headers.get("ce_time", "")),
        traceparent=headers.get(TRACEPARENT, ""),
    )
    if expected and attributes.type_name != expected:
        raise BadInput(f"ce_type {attributes.type_name!r}, expected {expected}")
    return attributes


def _parse_time(text: str) -> datetime | None:
    if not text:
        return None
    try:
        time = datetime.fromisoformat(text)
    except ValueError as error:
        raise BadInput(f"ce_time {text!r} is not an RFC 3339 time") from error
    if time.tzinfo is None:
        raise BadInput(f"ce_time {text!r} has no time zone")
    return time
