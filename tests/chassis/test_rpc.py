"""The server's side: errors to statuses, health, reflection, the bound on calls, stopping."""

import asyncio
import socket
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from agentiad.v1 import zoom_pb2, zoom_pb2_grpc
from agentiad.v1.trajectory_pb2 import Image
from services.chassis import rpc, telemetry
from services.chassis.errors import BadInput, Exhausted, NotFound, Transient
from tests.chassis.rpc_site import AGENT, ZOOM, Behaviour, Site, make_site, nothing, outcome, raising


@pytest.fixture
def bind(tmp_path: Path) -> str:
    return f"unix://{tmp_path}/folder/to/make/s.sock"


@pytest.mark.parametrize(
    ("error", "expected", "details"),
    [
        (BadInput("box is empty → mend it"), BadInput, "box is empty → mend it"),
        (NotFound("no such category"), NotFound, "no such category"),
        (Exhausted("queue is full"), Exhausted, "queue is full"),
        (Transient("store is away"), Transient, "store is away"),
        (TimeoutError("secret"), Transient, "timed out"),
        (KeyError("secret"), Transient, "internal error"),
        (BadInput("x" * 100_000), BadInput, "x" * 1000),
        (BadInput("name \udce9"), BadInput, "name \\udce9"),
        (BadInput("two\nlines"), BadInput, "two\nlines"),
        (BadInput(), BadInput, "INVALID_ARGUMENT"),
    ],
)
async def test_errors_come_back_as_they_were(
    error: Exception, expected: type[Exception], details: str, bind: str
) -> None:
    async with make_site(bind, raising(error)) as site:
        for call in (site.crop(), site.inspect()):
            received = await outcome(call)
            assert type(received) is expected
            assert str(received) == details


async def test_a_bug_is_logged_with_its_ids_and_not_told(bind: str, capsys: pytest.CaptureFixture[str]) -> None:
    async with make_site(bind, raising(KeyError("secret"))) as site:
        with telemetry.bind(event_id="e-1"):
            await outcome(site.crop())
        assert (await site.health.Check(health_pb2.HealthCheckRequest())).status == 1
    logged = capsys.readouterr().err
    assert "KeyError" in logged
    assert '"event_id": "e-1"' in logged
    assert f"/{ZOOM}/Crop" in logged


async def test_an_error_of_a_call_made_while_serving_is_passed_on(bind: str, tmp_path: Path) -> None:
    async with make_site(f"unix://{tmp_path}/inner.sock", raising(BadInput("from within"))) as inner:

        async def call_inner() -> None:
            await inner.crop()

        async with make_site(bind, call_inner) as outer:
            received = await outcome(outer.crop())
    assert (type(received), str(received)) == (BadInput, "from within")


async def test_a_method_that_is_not_there_is_no_error_of_ours(bind: str) -> None:
    async with make_site(bind, nothing) as site:
        call = site.channel.unary_unary(f"/{ZOOM}/Nothing")
        received = await outcome(call(b""))
    assert isinstance(received, grpc.aio.AioRpcError)
    assert received.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("behaviour", [nothing, raising(BadInput("no"))])
async def test_too_large_a_message_is_bad_input(behaviour: Behaviour, bind: str) -> None:
    async with make_site(bind, behaviour) as site:
        large = zoom_pb2.CropRequest(image=Image(content=bytes(rpc.MAX_MESSAGE_BYTES)))
        assert isinstance(await outcome(site.stub.Crop(large)), BadInput)
        async with grpc.aio.insecure_channel(bind) as unlimited:
            assert isinstance(await outcome(zoom_pb2_grpc.ZoomServiceStub(unlimited).Crop(large)), BadInput)


async def test_too_many_calls_are_exhausted_while_health_answers(bind: str) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        started.set()
        await go.wait()

    async with make_site(bind, wait, max_concurrent=1) as site:
        first = asyncio.create_task(site.crop())
        await started.wait()
        assert isinstance(await outcome(site.crop()), Exhausted)
        assert isinstance(await outcome(site.inspect()), Exhausted)
        assert await site.is_serving("")
        go.set()
        await first
        await site.crop()


async def test_health_of_each_service_and_of_all(bind: str) -> None:
    async with make_site(bind, nothing) as site:
        assert [await site.is_serving(name) for name in (ZOOM, AGENT, "")] == [True, True, True]
        await site.server.set_serving(ZOOM, False)
        assert [await site.is_serving(name) for name in (ZOOM, AGENT, "")] == [False, True, False]
        await site.server.set_serving(ZOOM, True)
        assert await site.is_serving("")
        assert isinstance(await outcome(site.is_serving("nobody")), NotFound)
        with pytest.raises(KeyError):
            await site.server.set_serving("nobody", True)


async def test_reflection_names_the_services(bind: str) -> None:
    async with make_site(bind, nothing) as site:
        stub = reflection_pb2_grpc.ServerReflectionStub(site.channel)
        call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
        [response] = [response async for response in call]
    assert {ZOOM, AGENT, "grpc.health.v1.Health"} <= {one.name for one in response.list_services_response.service}


async def test_stop_says_so_first_and_lets_calls_finish(bind: str) -> None:
    started, go = asyncio.Event(), asyncio.Event()

    async def wait() -> None:
        started.set()
        await go.wait()

    site_is_up, leave = asyncio.Event(), asyncio.Event()
    sites: list[Site] = []

    async def host() -> None:
        async with make_site(bind, wait) as site:
            sites.append(site)
            site_is_up.set()
            await leave.wait()

    hosting = asyncio.create_task(host())
    await site_is_up.wait()
    async with rpc.channel(bind) as channel:
        watch = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest(service=ZOOM))
        states = aiter(watch)
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.SERVING
        call = asyncio.ensure_future(zoom_pb2_grpc.ZoomServiceStub(channel).Crop(zoom_pb2.CropRequest()))
        await started.wait()
        leave.set()
        assert (await anext(states)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        watch.cancel()
        go.set()
        await call
        await hosting


async def test_stop_does_not_wait_longer_than_the_grace(bind: str) -> None:
    started = asyncio.Event()

    async def wait_forever() -> None:
        started.set()
        await asyncio.Event().wait()

    async with rpc.channel(bind) as channel:
        async with make_site(bind, wait_forever, grace_s=0.1):
            call = zoom_pb2_grpc.ZoomServiceStub(channel).Crop(zoom_pb2.CropRequest(), timeout=200)
            stuck = asyncio.create_task(outcome(call))
            await started.wait()
        assert isinstance(await stuck, Transient)


async def test_a_free_port_and_a_taken_one() -> None:
    async with make_site("127.0.0.1:0", nothing) as site:
        assert int(site.server.address.rpartition(":")[2]) > 0
        await site.crop()
        with pytest.raises(RuntimeError):
            async with make_site(site.server.address, nothing):
                pass


async def test_a_socket_left_by_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with make_site(f"unix://{path}", nothing) as site:
        await site.crop()
