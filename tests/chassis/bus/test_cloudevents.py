from datetime import UTC, datetime, timedelta, timezone

import pytest

from services.chassis.bus import cloudevents
from services.chassis.bus.cloudevents import Attributes
from services.chassis.errors import BadInput

TIME = datetime(2026, 11, 22, 8, 30, tzinfo=UTC)


def make_headers(**changed: str | None) -> dict[str, str]:
    headers = cloudevents.headers("7", "agentiad.v1.ImageCaptured", "/plant/line-1", TIME, "00-ab-cd-01")
    return {name: text for name, text in (headers | changed).items() if text is not None}


def test_binary_mode() -> None:
    assert make_headers() == {
        "ce_id": "7",
        "ce_source": "/plant/line-1",
        "ce_type": "agentiad.v1.ImageCaptured",
        "ce_specversion": "1.0",
        "ce_time": "2026-11-22T08:30:00Z",
        "content-type": "application/protobuf",
        "traceparent": "00-ab-cd-01",
    }


def test_round_trip() -> None:
    expected = Attributes("7", "agentiad.v1.ImageCaptured", "/plant/line-1", TIME, "00-ab-cd-01")
    assert cloudevents.parse(make_headers()) == expected


def test_time_of_another_zone() -> None:
    local = TIME.astimezone(timezone(timedelta(hours=2)))
    assert cloudevents.headers("7", "t", "s", local)["ce_time"] == "2026-11-22T08:30:00Z"


def test_optional_attributes() -> None:
    attributes = cloudevents.parse(make_headers(ce_time=None, traceparent=None, **{"content-type": None}))
    assert (attributes.time, attributes.traceparent) == (None, "")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"ce_id": None}, "ce_id missing"),
        ({"ce_id": ""}, "ce_id missing"),
        ({"ce_type": None, "ce_source": None}, "ce_source, ce_type missing"),
        ({"ce_specversion": None}, "ce_specversion missing"),
        ({"ce_specversion": "0.3"}, "version '0.3'"),
        ({"content-type": "application/json"}, "application/json"),
        ({"ce_time": "yesterday"}, "not an RFC 3339"),
        ({"ce_time": "2026-11-22T08:30:00"}, "no time zone"),
    ],
)
def test_bad_headers(changed: dict[str, str | None], reason: str) -> None:
    with pytest.raises(BadInput, match=reason):
        cloudevents.parse(make_headers(**changed))


def test_content_type_with_parameters() -> None:
    cloudevents.parse(make_headers(**{"content-type": "Application/Protobuf; messageType=x"}))
