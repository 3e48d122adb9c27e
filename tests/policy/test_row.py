from __future__ import annotations

import pytest

from services.policy.row import asks_for_verdict


@pytest.mark.parametrize(
    "text",
    ['{"anomaly_present":', '<answer>{"anomaly_present": ', '{"anomaly_present" :\n', '{"a":1,"anomaly_present":'],
)
def test_the_verdict_comes_next(text: str) -> None:
    assert asks_for_verdict(text)


@pytest.mark.parametrize("text", ["", '"anomaly_present"', '"anomaly_present":t', "anomaly_present:", '"top_anomaly":'])
def test_something_else_comes_next(text: str) -> None:
    assert not asks_for_verdict(text)
