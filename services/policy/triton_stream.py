"""One stream to Triton, on which the requests of all models travel and find their answers."""

from __future__ import annotations

import asyncio
import itertools
import uuid
from typing import Any

import grpc
from tritonclient.grpc import service_pb2 as triton

from services.chassis.errors import BadInput, Exhausted, NotFound, Transient

# As the model's 1/model.py writes them.
_ERRORS: dict[int, type[Exception]] = {
    grpc.StatusCode.INVALID_ARGUMENT.value[0]: BadInput,
    grpc.StatusCode.NOT_FOUND.value[0]: NotFound,
    grpc.StatusCode.RESOURCE_EXHAUSTED.value[0]: Exhausted,
    grpc.StatusCode.UNAVAILABLE.value[0]: Transient,
}


class ModelGoneError(Exception):
    """Triton could not run the model."""


class Stream:
    """One bidirectional ModelStreamInfer call; answers find their requests by id."""

    def __init__(self, stub: Any) -> None:
        self.broken = False
        # Unique among all clients of this Triton: the model finds the request to cancel by it.
        self._ids = map(f"{uuid.uuid4().hex}-{{}}".format, itertools.count())
        self._waiting: dict[str, tuple[str, asyncio.Future[bytes]]] = {}  # the model and its answer, by request
        self._outbox: asyncio.Queue[triton.ModelInferRequest] = asyncio.Queue()
        self._rpc = stub.ModelStreamInfer(self._requests())
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def call(self, model: str, body: bytes, operation: str) -> bytes:
        """The serialized answer. When the awaiting task is cancelled, the model is told so.

        Raises Transient: the stream broke, before the call or during it.
        """
        if self.broken:  # nobody would read the answer
            raise Transient("the stream to Triton is broken")
        key = next(self._ids)
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._waiting[key] = model, answer
        self._outbox.put_nowait(_request(model, key, body, operation))
        try:
            return await answer
        except asyncio.CancelledError:
            if not self.broken:
                self._outbox.put_nowait(_request(model, next(self._ids), key.encode(), "cancel"))
            raise
        finally:
            self._waiting.pop(key, None)

    def fail(self, model: str, error: Exception) -> None:
        """Whoever waits for an answer of `model` gets `error`."""
        for waited, answer in self._waiting.values():
            if waited == model and not answer.done():
                answer.set_exception(error)

    async def close(self) -> None:
        """Ends the call."""
        self._rpc.cancel()
        await asyncio.wait([self._reader])

    async def _requests(self) -> Any:
        while True:
            yield await self._outbox.get()

    async def _read(self) -> None:
        error = "an answer of Triton's could not be read"
        try:
            async for message in self._rpc:
                self._answer(message)
            error = "Triton closed the stream"
        except (grpc.aio.AioRpcError, asyncio.CancelledError) as failure:
            error = f"the stream to Triton broke: {failure}"
        finally:  # also where an answer could not be read
            self.broken = True
            for model in {model for model, _ in self._waiting.values()}:
                self.fail(model, Transient(error))

    def _answer(self, message: Any) -> None:
        response = message.infer_response
        _, answer = self._waiting.get(response.id, ("", None))
        if answer is None or answer.done():  # cancelled meanwhile
            return
        if message.error_message:
            answer.set_exception(ModelGoneError(message.error_message))
            return
        tensors = {
            output.name: content for output, content in zip(response.outputs, response.raw_output_contents, strict=True)
        }
        code, body = int.from_bytes(tensors["STATUS"], "little"), tensors["RESPONSE"]
        if code == 0:
            answer.set_result(body)
        else:
            kind = _ERRORS.get(code, RuntimeError)
            answer.set_exception(kind(body.decode("utf-8", "replace")))


def _request(model: str, key: str, body: bytes, operation: str) -> triton.ModelInferRequest:
    request = triton.ModelInferRequest(model_name=model, id=key, raw_input_contents=[body or b"\0"])
    request.inputs.add(name="REQUEST", datatype="UINT8", shape=[len(body or b"\0")])
    request.parameters["operation"].string_param = operation
    return request
