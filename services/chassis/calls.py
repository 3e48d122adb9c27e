"""What travels along with a call: its deadline and the ids of the event it serves. The interceptors of `rpc`.

Each served call runs in an asyncio task of its own, so what is bound here ends with it and is never unbound.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn
from urllib.parse import quote, unquote

import grpc

from services.chassis import telemetry
from services.chassis.statuses import to_status

# For calls that nobody gave a deadline: longer than any answer should take, and still an end.
DEFAULT_DEADLINE_S = 60.0
_METADATA = {key: f"agentiad-{key.replace('_', '-')}" for key in telemetry.ID_KEYS}
# Ids come from outside; longer ones are cut, so that they cannot fill the metadata.
_MAX_ID = 256
_deadline: ContextVar[float | None] = ContextVar("deadline", default=None)

Context = grpc.aio.ServicerContext[Any, Any]


def remaining() -> float | None:
    """Seconds left to the work under way; None: no end. Never negative."""
    end = _deadline.get()
    return None if end is None else max(0.0, end - time.monotonic())


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Calls made inside the block end within `seconds`, or sooner if an outer deadline says so."""
    outer = remaining()
    token = _deadline.set(time.monotonic() + (seconds if outer is None else min(seconds, outer)))
    try:
        yield
    finally:
        _deadline.reset(token)


class ServerCalls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    """Around each call of `services`: bind deadline and ids, bound the calls under way, turn errors into statuses.

    The bound is kept here and not by gRPC's maximum_concurrent_rpcs, which would refuse health checks too: a busy
    server would be restarted for being busy.
    """

    def __init__(self, services: set[str], max_concurrent: int) -> None:
        self._services = services
        self._max_concurrent = max_concurrent
        self._under_way = 0

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler = await continuation(handler_call_details)
        method = str(handler_call_details.method)
        if handler is None or method.split("/")[1] not in self._services:
            return handler
        if handler.request_streaming:
            raise NotImplementedError(f"{method}: calls that stream requests are not served")
        make = (
            grpc.unary_stream_rpc_method_handler if handler.response_streaming else grpc.unary_unary_rpc_method_handler
        )
        wrap = self._stream if handler.response_streaming else self._unary
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary
        return make(wrap(method, inner), handler.request_deserializer, handler.response_serializer)

    def _unary(self, method: str, inner: Callable[[Any, Context], Awaitable[Any]]) -> Any:
        async def serve(request: Any, context: Context) -> Any:
            await self._begin(context)
            try:
                return await inner(request, context)
            except Exception as error:
                await _abort(method, error, context)
            finally:
                self._under_way -= 1

        return serve

    def _stream(self, method: str, inner: Callable[[Any, Context], AsyncIterator[Any]]) -> Any:
        async def serve(request: Any, context: Context) -> AsyncIterator[Any]:
            await self._begin(context)
            try:
                async for response in inner(request, context):
                    yield response
            except Exception as error:
                await _abort(method, error, context)
            finally:
                self._under_way -= 1

        return serve

    async def _begin(self, context: Context) -> None:
        left = context.time_remaining()
        _deadline.set(None if left is None else time.monotonic() + left)
        received = {key: str(value) for key, value in context.invocation_metadata() or ()}
        telemetry.adopt({key: unquote(received[name]) for key, name in _METADATA.items() if name in received})
        if self._under_way >= self._max_concurrent:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_concurrent} calls are under way already"
            )
        self._under_way += 1


async def _abort(method: str, error: Exception, context: Context) -> NoReturn:
    if isinstance(error, grpc.aio.AbortError):
        raise error
    status = to_status(error)
    if status is None:
        telemetry.log.error("bug while serving a call", method=method, exc_info=error)
        status = grpc.StatusCode.INTERNAL, "internal error"
    await context.abort(*status)


class UnaryCalls(grpc.aio.UnaryUnaryClientInterceptor):  # type: ignore[type-arg]
    """Sends deadline and ids along with calls that answer once."""

    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_context(client_call_details), request)


class StreamCalls(grpc.aio.UnaryStreamClientInterceptor):  # type: ignore[type-arg]
    """Sends deadline and ids along with calls that answer in a stream."""

    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await continuation(_with_context(client_call_details), request)


def _with_context(details: Any) -> Any:
    limits = [limit for limit in (details.timeout, remaining()) if limit is not None]
    ids = [(_METADATA[key], quote(value[:_MAX_ID])) for key, value in telemetry.current_ids().items()]
    return details._replace(
        timeout=min(limits, default=DEFAULT_DEADLINE_S),
        metadata=grpc.aio.Metadata(*(details.metadata or ()), *ids),
    )
