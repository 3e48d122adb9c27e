"""What travels with a call: deadlines, ids; what is tried again, and what ends with its caller."""

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from agentiad.v1 import zoom_pb2, zoom_pb2_grpc
from services.chassis import rpc, telemetry
from services.chassis.errors import BadInput, Exhausted, Transient
from tests.chassis.rpc_site import Behaviour, make_site, nothing, outcome, raising

# gRPC sends a deadline with three digits at most, rounded up.
WIRE_ROUNDING = 1.02


@pytest.fixture
def bind(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/folder/to/make/s.sock"


async def test_unavailable_is_retried_where_a_call_may_be_repeated(bind: str) -> None:
    async with make_site(bind, raising(Transient("not yet"))) as site:

        async def succeed_at_third() -> None:
            if site.zoom.calls < 3:
                raise Transient("not yet")

        site.zoom.behaviour = succeed_at_third
        await site.crop()
        assert site.zoom.calls == 3
        assert isinstance(await outcome(site.inspect()), Transient)
        assert site.agent.calls == 1


@pytest.mark.parametrize("error", [BadInput("no"), Exhausted("full"), KeyError("bug")])
async def test_nothing_else_is_retried(error: Exception, bind: str) -> None:
    async with make_site(bind, raising(error)) as site:
        await outcome(site.crop())
        assert site.zoom.calls == 1


async def test_a_server_that_comes_back_is_found_again(bind: str) -> None:
    async with rpc.channel(bind) as channel:
        stub = zoom_pb2_grpc.ZoomServiceStub(channel)
        assert isinstance(await outcome(stub.Crop(zoom_pb2.CropRequest(), timeout=5)), Transient)
        async with make_site(bind, nothing):
            await stub.Crop(zoom_pb2.CropRequest(), timeout=10, wait_for_ready=True)


@pytest.fixture
def seen() -> list[Any]:
    return []


def watching(seen: list[Any]) -> Behaviour:
    async def watch() -> None:
        seen.append((rpc.remaining(), telemetry.current_ids()))

    return watch


@pytest.mark.parametrize(
    ("own", "outer", "expected"),
    [(None, None, rpc.DEFAULT_DEADLINE_S), (5, None, 5), (None, 7, 7), (5, 7, 5), (9, 7, 7), (100, None, 100)],
)
async def test_every_call_has_the_nearest_deadline(
    own: float | None, outer: float | None, expected: float, bind: str, seen: list[Any]
) -> None:
    async with make_site(bind, watching(seen)) as site:
        for call in (site.crop, site.inspect):
            if outer is None:
                await call(timeout=own)
            else:
                with rpc.deadline(outer):
                    await call(timeout=own)
    assert all(0.8 * expected < left <= WIRE_ROUNDING * expected for left, _ in seen)
    assert rpc.remaining() is None


async def test_deadline_and_ids_go_on_to_the_next_service(bind: str, tmp_path: Path, seen: list[Any]) -> None:
    async with make_site(f"unix://{tmp_path}/inner.sock", watching(seen)) as inner:

        async def call_inner() -> None:
            await asyncio.gather(inner.crop(), inner.inspect(timeout=1000))

        async with make_site(bind, call_inner) as outer:
            with telemetry.bind(event_id="größe\n1", episode_id="x" * 1000):
                await outer.crop(timeout=20)
            await outer.crop(timeout=20)
    assert [ids for _, ids in seen] == [{"event_id": "größe\n1", "episode_id": "x" * 256}] * 2 + [{}] * 2
    assert all(left <= 20 * WIRE_ROUNDING**2 for left, _ in seen)


async def test_a_raw_client_without_a_deadline_is_served(bind: str, seen: list[Any]) -> None:
    async with make_site(bind, watching(seen)), grpc.aio.insecure_channel(bind) as plain:
        await zoom_pb2_grpc.ZoomServiceStub(plain).Crop(zoom_pb2.CropRequest())
    assert seen == [(None, {})]


@pytest.mark.parametrize("streams", [False, True])
async def test_a_passed_deadline_frees_the_servers_place(streams: bool, bind: str) -> None:
    cancelled = asyncio.Event()

    async def wait_forever() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with make_site(bind, wait_forever, max_concurrent=1) as site:
        call = site.inspect if streams else site.crop
        assert isinstance(await outcome(call(timeout=0.2)), Transient)
        await asyncio.wait_for(cancelled.wait(), 10)
        site.zoom.behaviour = nothing
        await site.crop()


async def test_a_client_that_goes_away_frees_the_servers_place(bind: str) -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait_forever() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with make_site(bind, wait_forever, max_concurrent=1) as site:
        task = asyncio.create_task(site.inspect())
        await started.wait()
        task.cancel()
        await asyncio.wait_for(cancelled.wait(), 10)
        site.zoom.behaviour = nothing
        await site.crop()
