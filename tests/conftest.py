"""The real parts that tests run against: each is started once, when the first test asks for it, and stopped at the end.
One that cannot be started fails the tests that need it, with what to install."""

from collections.abc import Iterator

import pytest

from tests.harness.kafka import kafka as real_kafka
from tests.harness.milvus import milvus as real_milvus
from tests.harness.redis import redis as real_redis
from tests.harness.triton import triton as real_triton


@pytest.fixture(scope="session")
def kafka() -> Iterator[str]:
    """host:port of a real Apache Kafka broker."""
    with real_kafka() as broker:
        yield broker.address


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """URL of a real Redis server."""
    with real_redis() as url:
        yield url


@pytest.fixture(scope="session")
def milvus_uri() -> Iterator[str]:
    """URI of a real Milvus server."""
    with real_milvus() as uri:
        yield uri


@pytest.fixture(scope="session")
def triton() -> Iterator[str]:
    """host:port of a real Triton's gRPC endpoint."""
    with real_triton() as url:
        yield url
