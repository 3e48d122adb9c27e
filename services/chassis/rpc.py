"""gRPC servers and channels (asyncio) as every service has them.

Server: health for each service and for all ('' is healthy when all are), reflection, one error → status map
(`statuses`), a bound on calls under way, message limits, graceful stop. Client: retries on UNAVAILABLE for calls that
may be repeated, and a deadline for every call, never later than that of the call being served (`calls`).
"""

import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.chassis.calls import DEFAULT_DEADLINE_S, ServerCalls, StreamCalls, UnaryCalls, deadline, remaining
from services.chassis.statuses import from_rpc_error

__all__ = [
    "DEFAULT_DEADLINE_S",
    "MAX_MESSAGE_BYTES",
    "Server",
    "Servicer",
    "channel",
    "deadline",
    "from_rpc_error",
    "remaining",
    "serve",
]

# (add_…_to_server, the servicer, its full name). Methods are coroutines, or async generators where they stream.
Servicer = tuple[Callable[[Any, Any], None], object, str]

# Bounds images that are sent as content; those in a shared store travel as references.
MAX_MESSAGE_BYTES = 64 * 2**20

# Calls without a lasting effect, or with the same one when made twice.
_IDEMPOTENT = {
    "agentiad.v1.PolicyService": ["Generate", "DescribePolicy"],
    "agentiad.v1.ZoomService": ["Crop", "Compare"],
    "agentiad.v1.RetrievalService": ["QueryExemplars", "ListExemplars"],
    "agentiad.v1.RewardService": ["Score"],
}
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": [
                {"service": name, "method": method} for name, methods in _IDEMPOTENT.items() for method in methods
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # When most calls fail, retries would only add to the load: they stop until calls succeed again.
    "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.5},
}
_MESSAGE_LIMITS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]
_SERVER_OPTIONS = [
    *_MESSAGE_LIMITS,
    # Two processes on one port would share its calls by chance, without a word.
    ("grpc.so_reuseport", 0),
    # Lets clients ask every 30 s whether a long call's connection still stands.
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
]
_CHANNEL_OPTIONS = [
    *_MESSAGE_LIMITS,
    ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
    # A machine that vanished is noticed after 40 s, not at the deadline.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # A server that was restarted is found again within 2 s; gRPC's own maximum is 2 minutes.
    ("grpc.initial_reconnect_backoff_ms", 200),
    # How long an attempt to connect may take, too: on a busy machine more than an instant.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Calls between services never go through a company's web proxy.
    ("grpc.enable_http_proxy", 0),
]


class Server:
    """A running server: where it listens, and what it says of its health."""

    def __init__(self, address: str, services: Sequence[str], servicer: Any) -> None:
        self.address = address
        self._serving = dict.fromkeys(services, True)
        self._health = servicer

    async def set_serving(self, name: str, serving: bool) -> None:
        """Say whether one service (by its full name) can answer calls now. Calls are let through in any case."""
        if name not in self._serving:
            raise KeyError(name)
        self._serving[name] = serving
        await self._publish()

    async def _publish(self) -> None:
        for name, serving in (*self._serving.items(), ("", all(self._serving.values()))):
            await self._health.set(name, _HEALTH[serving])


_HEALTH = {
    True: health_pb2.HealthCheckResponse.SERVING,
    False: health_pb2.HealthCheckResponse.NOT_SERVING,
}


@asynccontextmanager
async def serve(
    bind: str, servicers: Sequence[Servicer], *, max_concurrent: int = 256, grace_s: float = 10.0
) -> AsyncIterator[Server]:
    """Serve until the block ends; then health says NOT_SERVING, and calls under way have grace_s seconds to finish.

    bind: unix:///PATH (its folder is made) or host:port, port 0 for any free one. More than max_concurrent calls under
    way: RESOURCE_EXHAUSTED. RuntimeError when it cannot listen there.
    """
    names = [name for _, _, name in servicers]
    grpc_server = grpc.aio.server(interceptors=[ServerCalls(set(names), max_concurrent)], options=_SERVER_OPTIONS)
    for add_to_server, servicer, _ in servicers:
        add_to_server(servicer, grpc_server)
    health_servicer = health.aio.HealthServicer()  # type: ignore[attr-defined]
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, grpc_server)
    reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], grpc_server)
    server = Server(_listen(grpc_server, bind), names, health_servicer)
    await server._publish()
    await grpc_server.start()
    try:
        yield server
    finally:
        await health_servicer.enter_graceful_shutdown()
        await grpc_server.stop(grace_s)


def _listen(grpc_server: grpc.aio.Server, bind: str) -> str:
    if bind.startswith("unix:"):
        Path(bind.removeprefix("unix:").removeprefix("//")).parent.mkdir(parents=True, exist_ok=True)
        grpc_server.add_insecure_port(bind)
        return bind
    port = grpc_server.add_insecure_port(bind)
    return f"{bind.rpartition(':')[0]}:{port}"


def channel(address: str) -> grpc.aio.Channel:
    """A channel to unix:///PATH or host:port; close it. Errors of its calls are AioRpcError: see from_rpc_error."""
    return grpc.aio.insecure_channel(
        address,
        options=_CHANNEL_OPTIONS,
        interceptors=[UnaryCalls(), StreamCalls()],  # type: ignore[list-item]
    )
