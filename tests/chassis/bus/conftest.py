from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.chassis.bus.stores import Store


@pytest.fixture(params=["sqlite", pytest.param("kafka", marks=pytest.mark.kafka)])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Store]:
    """Both buses, one after the other."""
    place = request.getfixturevalue("kafka") if request.param == "kafka" else str(tmp_path / "bus.db")
    store = Store(request.param, place)
    yield store
    for bus in store.made:
        await bus.close()
