"""Engines in Triton: each policy version is a Triton model, loaded explicitly; one stream carries all requests.

Triton's own errors become Transient: its process may be gone and come back. Then the stream breaks, everything under
way fails, and the next request opens a new stream and loads the model again if Triton has forgotten it.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Sequence
from pathlib import Path

import grpc
from google.protobuf import json_format, text_format
from tritonclient.grpc import model_config_pb2, service_pb2_grpc
from tritonclient.grpc import service_pb2 as triton

from agentiad.v1 import policy_pb2
from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.chassis.errors import BadInput, Transient
from services.chassis.rpc import MAX_MESSAGE_BYTES
from services.policy.settings import EngineSettings
from services.policy.triton_stream import ModelGoneError, Stream
from services.vlm.checkpoint import sha256_of

_MODEL = Path(__file__).parent / "model_repository" / "agentiad_policy"
_OPTIONS = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Not the 30 s of services.chassis.rpc: as it comes, Triton allows a ping in five minutes while it sends nothing,
    # and breaks the connection at the third that is too early: under a long load, or on an idle stream.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without this, gRPC 1.85 waits a minute for the answer to a ping.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.initial_reconnect_backoff_ms", 200),
    # How long an attempt to connect may take, too: on a busy machine more than an instant.
    ("grpc.min_reconnect_backoff_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    ("grpc.enable_http_proxy", 0),
]
# What Triton answers from memory takes milliseconds; more than this, and it hangs or its machine is gone.
_ANSWER_S = 30.0
# Weights of 100 GB from a network's disk take ten minutes.
_LOAD_S = 900.0
# Triton calls a model ready whose process is dead, and says nothing to those who wait for it: somebody must ask.
_PROBE_S = 2.0
# The requests under way end first; the stub that holds torch takes seconds to go.
_UNLOAD_S = 30.0


class TritonHost:
    """`url`: host:port of Triton's gRPC endpoint, in explicit model control mode. Belongs to one event loop."""

    def __init__(self, url: str, settings: EngineSettings) -> None:
        self._channel = grpc.aio.insecure_channel(url, options=_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._parameters = _parameters(settings)
        self._stream: Stream | None = None

    async def open(self, checkpoint: Path, version: str) -> TritonEngine:
        """See services.policy.engine.Host."""
        try:
            digest = await asyncio.to_thread(sha256_of, checkpoint)
        except (OSError, ValueError) as error:
            raise BadInput(str(error)) from error
        # Named after its weights too: two checkpoints may call themselves the same.
        model = model_name(f"{version or checkpoint.name}-{digest[:12]}")
        engine = TritonEngine(self, model, checkpoint.resolve(), version)
        try:
            await self.load(model, checkpoint.resolve(), version)
            await engine.describe()
        except BaseException:  # cancelled, too: nobody else would take it out of Triton
            await engine.close()
            raise
        return engine

    async def close(self) -> None:
        """See services.policy.engine.Host."""
        if self._stream is not None:
            await self._stream.close()
        await self._channel.close(None)

    def stream(self) -> Stream:
        """The open stream; a new one if the last has broken."""
        if self._stream is None or self._stream.broken:
            self._stream = Stream(self._stub)
        return self._stream

    async def is_loaded(self, model: str) -> bool:
        """Raises Transient: Triton is gone."""
        try:
            answer = await self._stub.ModelReady(triton.ModelReadyRequest(name=model), timeout=_ANSWER_S)
        except grpc.aio.AioRpcError as error:
            raise Transient(f"Triton is gone: {error.details()}") from error
        return bool(answer.ready)

    async def load(self, model: str, checkpoint: Path, version: str) -> None:
        """Loads the Triton model, or loads it again. Raises BadInput: Triton cannot; Transient: Triton is gone or
        takes too long."""
        try:
            parameters = {**self._parameters, "checkpoint": str(checkpoint), "version": version}
            request = triton.RepositoryModelLoadRequest(model_name=model)
            request.parameters["config"].string_param = _config(model, parameters)
            # With its code in the request, a version needs no folder of its own in Triton's repository.
            request.parameters["file:1/model.py"].bytes_param = (_MODEL / "1" / "model.py").read_bytes()
            await self._stub.RepositoryModelLoad(request, timeout=_LOAD_S)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise Transient(f"Triton is gone: {error.details()}") from error
            # Python's traceback follows the first line.
            reason = (error.details() or "").partition("\n")[0]
            raise BadInput(f"Triton cannot load {checkpoint}: {reason}") from error

    async def unload(self, model: str) -> None:
        """Takes the model out of Triton; a Triton that is gone has none."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            request = triton.RepositoryModelUnloadRequest(model_name=model)
            await self._stub.RepositoryModelUnload(request, timeout=_UNLOAD_S)


class TritonEngine:
    """One policy version in Triton. Made by TritonHost.open. A model whose process died is loaded anew."""

    def __init__(self, host: TritonHost, model: str, checkpoint: Path, version: str) -> None:
        self.card = PolicyCard()
        self._host, self._model, self._checkpoint, self._version = host, model, checkpoint, version
        # The stream on which the model was last seen loaded.
        self._seen_on: Stream | None = None
        # Its process may be dead.
        self._suspected = False
        self._loading = asyncio.Lock()
        self._under_way = 0
        self._probing: asyncio.Task[None] | None = None

    async def describe(self) -> None:
        """Reads the card. Raises Transient: Triton is gone or silent."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                answer = await self._call(b"", operation="describe")
        except TimeoutError as error:
            raise Transient(f"Triton did not answer within {_ANSWER_S:.0f} s") from error
        self.card = PolicyCard.FromString(answer)

    async def generate(
        self, messages: Sequence[pb.Message], sampling: pb.Sampling, deadline: float | None = None
    ) -> pb.Generation:
        """See services.policy.engine.Engine."""
        request = policy_pb2.GenerateRequest(messages=messages, sampling=sampling)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        self._under_way += 1
        if self._probing is None:
            self._probing = asyncio.get_running_loop().create_task(self._probe())
        try:
            async with asyncio.timeout(left):
                answer = await self._call(request.SerializeToString(), operation="generate")
        except TimeoutError as error:
            raise Transient("the deadline has passed") from error
        finally:
            self._under_way -= 1
        return policy_pb2.GenerateResponse.FromString(answer).generation

    async def close(self) -> None:
        """See services.policy.engine.Engine."""
        if self._probing is not None:
            self._probing.cancel()
        await self._host.unload(self._model)

    async def _call(self, body: bytes, operation: str) -> bytes:
        stream = await self._ready()
        try:
            return await stream.call(self._model, body, operation)
        except ModelGoneError as error:
            self._suspect(stream, error)
            raise Transient(str(error)) from error

    async def _ready(self) -> Stream:
        """The stream, with the model loaded behind it."""
        stream = self._host.stream()
        if self._suspected or self._seen_on is not stream:
            async with self._loading:
                if self._suspected and not await self._answers(stream):
                    # A load alone would wait for the dead process's requests.
                    await self._host.unload(self._model)
                if not await self._host.is_loaded(self._model):
                    await self._host.load(self._model, self._checkpoint, self._version)
                self._suspected, self._seen_on = False, stream
        return stream

    def _suspect(self, stream: Stream, error: Exception) -> None:
        """The model is dead, or an error came late: whoever waits is told, and the next request finds out."""
        self._suspected = True
        stream.fail(self._model, Transient(f"the model's process is gone: {error}"))

    async def _answers(self, stream: Stream) -> bool:
        try:
            async with asyncio.timeout(_PROBE_S):
                await stream.call(self._model, b"", "describe")
        except (ModelGoneError, Transient, TimeoutError):
            return False
        return True

    async def _probe(self) -> None:
        """While requests are under way: asks whether the model lives, and fails them if it does not."""
        try:
            while self._under_way:
                await asyncio.sleep(_PROBE_S)
                stream = self._host.stream()
                if self._suspected or self._seen_on is not stream:  # being loaded, or the stream has told them
                    continue
                try:
                    async with asyncio.timeout(_ANSWER_S):
                        await stream.call(self._model, b"", "describe")
                except (ModelGoneError, TimeoutError) as error:
                    self._suspect(stream, error)
                except Transient:  # the stream broke: all heard of it
                    pass
        finally:
            self._probing = None


def model_name(version: str) -> str:
    """A Triton model name for a policy version."""
    return "agentiad_policy." + re.sub(r"[^A-Za-z0-9_.-]", lambda match: f"~{ord(match[0]):x}", version)


def _parameters(settings: EngineSettings) -> dict[str, str]:
    """The engine's settings by name, as EngineSettings reads them back."""
    values = {name: getattr(settings, name) for name in EngineSettings.model_fields}
    return {
        name: ",".join(value) if isinstance(value, tuple) else str(value)
        for name, value in values.items()
        if value is not None
    }


def _config(model: str, parameters: dict[str, str]) -> str:
    """The repository's configuration under another name and with these parameters, as the JSON that a load takes."""
    config = text_format.Parse((_MODEL / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())
    config.name = model
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    return json_format.MessageToJson(config, preserving_proto_field_name=True)
