"""A Triton that is silent, breaks off, or is cut off: nobody waits for ever. A small server stands in for the real one,
which cannot be told to misbehave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tritonclient.grpc import service_pb2 as triton
from tritonclient.grpc import service_pb2_grpc

from services.chassis.errors import Transient
from services.policy import triton_host
from services.policy.settings import EngineSettings
from services.policy.triton_host import TritonHost

LIMITS = ("_ANSWER_S", "_LOAD_S", "_UNLOAD_S")


class Silent(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Loads models, and answers nothing that is asked of them. `hanging`: methods that do not answer either."""

    def __init__(self) -> None:
        self.hanging: set[str] = set()
        self.asked = asyncio.Event()
        self.unloaded: list[str] = []
        self.breaks_off = False

    async def ModelReady(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("ModelReady", triton.ModelReadyResponse(ready=True))

    async def RepositoryModelLoad(self, request: Any, context: Any) -> Any:  # noqa: N802
        return await self._answer("RepositoryModelLoad", triton.RepositoryModelLoadResponse())

    async def RepositoryModelUnload(self, request: Any, context: Any) -> Any:  # noqa: N802
        self.unloaded.append(request.model_name)
        return await self._answer("RepositoryModelUnload", triton.RepositoryModelUnloadResponse())

    async def ModelStreamInfer(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async for _ in requests:
            self.asked.set()
            if self.breaks_off:
                return
            yield triton.ModelStreamInferResponse()

    async def _answer(self, method: str, answer: Any) -> Any:
        if method in self.hanging:
            await asyncio.Event().wait()
        return answer


@pytest_asyncio.fixture
async def silent() -> AsyncIterator[tuple[Silent, int]]:
    """The server and its port."""
    servicer, server = Silent(), grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield servicer, port
    await server.stop(None)


@asynccontextmanager
async def connected(port: int) -> AsyncIterator[TritonHost]:
    host = TritonHost(f"127.0.0.1:{port}", EngineSettings())
    try:
        async with asyncio.timeout(30):
            yield host
    finally:
        await host.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LIMITS:
        monkeypatch.setattr(triton_host, name, 0.3)


CALLS: dict[str, Callable[[TritonHost], Coroutine[Any, Any, Any]]] = {
    "ModelReady": lambda host: host.is_loaded("one"),
    "RepositoryModelLoad": lambda host: host.load("one", Path("/models/one"), "one"),
}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("method", CALLS)
async def test_a_call_without_an_answer_ends(silent: tuple[Silent, int], method: str) -> None:
    triton_, port = silent
    triton_.hanging = {method}
    async with connected(port) as host:
        with pytest.raises(Transient):
            await CALLS[method](host)


@pytest.mark.usefixtures("impatient")
async def test_unloading_ends_without_an_answer(silent: tuple[Silent, int]) -> None:
    triton_, port = silent
    triton_.hanging = {"RepositoryModelUnload"}
    async with connected(port) as host:
        await host.unload("one")
    assert triton_.unloaded == ["one"]


@pytest.mark.usefixtures("impatient")
async def test_a_version_that_does_not_say_what_it_is_is_unloaded(
    silent: tuple[Silent, int], tiny_checkpoint: Path
) -> None:
    triton_, port = silent
    async with connected(port) as host:
        with pytest.raises(Transient, match="did not answer"):
            await host.open(tiny_checkpoint, "one")
    assert len(triton_.unloaded) == 1


async def test_a_version_whose_loading_is_cancelled_is_unloaded(
    silent: tuple[Silent, int], tiny_checkpoint: Path
) -> None:
    triton_, port = silent
    async with connected(port) as host:
        opening = asyncio.create_task(host.open(tiny_checkpoint, "one"))
        await triton_.asked.wait()
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
    assert len(triton_.unloaded) == 1


async def test_nobody_waits_on_a_stream_that_is_broken(silent: tuple[Silent, int]) -> None:
    triton_, port = silent
    triton_.breaks_off = True
    async with connected(port) as host:
        stream = host.stream()
        for _ in range(2):
            with pytest.raises(Transient, match="stream"):
                await stream.call("one", b"", "describe")


async def test_a_machine_that_vanished_is_noticed(silent: tuple[Silent, int], monkeypatch: pytest.MonkeyPatch) -> None:
    # As the real options, but fast.
    alive = ("grpc.keepalive_time_ms", "grpc.keepalive_timeout_ms", "grpc.http2.ping_timeout_ms")
    faster = [(name, value // 100 if name in alive else value) for name, value in triton_host._OPTIONS]
    monkeypatch.setattr(triton_host, "_OPTIONS", faster)
    triton_, port = silent
    async with wire(port) as (near, cut), connected(near) as host:
        call = asyncio.create_task(host.stream().call("one", b"", "describe"))
        await triton_.asked.wait()
        cut.set()
        with pytest.raises(Transient, match="broke"):
            await call


@asynccontextmanager
async def wire(far: int) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """A port that leads to the port `far`, until the event is set: then bytes vanish, and connections stay open."""
    cut, tasks = asyncio.Event(), set()

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(2**16):
            if not cut.is_set():
                writer.write(data)

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", far)
        tasks.update({asyncio.create_task(carry(reader, far_writer)), asyncio.create_task(carry(far_reader, writer))})

    async with await asyncio.start_server(connect, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1], cut
        for task in tasks:
            task.cancel()
