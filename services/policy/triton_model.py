"""Triton's side of the policy: takes requests off Triton's hands and gives them to the same engine that runs elsewhere.

Runs in the Python stub only. `accept` just queues; an asyncio thread awaits the engine and answers (the model is
decoupled). Tensors:
- REQUEST, uint8: by the parameter `operation`: generate (a GenerateRequest), describe (anything), cancel (the id of a
  request).
- STATUS, int32: a gRPC status code, 0 for OK. RESPONSE, uint8: the serialized message, or what was wrong.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import torch
import torch.utils.dlpack
import triton_python_backend_utils as backend

from agentiad.v1 import policy_pb2
from services.chassis.statuses import to_status
from services.policy.hosts import make_engine
from services.policy.settings import EngineSettings

# Triton's stub is a process of its own already, and cannot start others: its interpreter is no program.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
# How often requests whose client vanished are looked for. A client that cancels says so at once.
_VANISHED_S = 0.5


class PolicyModel:
    """One policy version. `model_config`: JSON; its parameters are checkpoint, version and EngineSettings' fields."""

    def __init__(self, model_config: str) -> None:
        parameters = {name: value["string_value"] for name, value in json.loads(model_config)["parameters"].items()}
        checkpoint, version = Path(parameters.pop("checkpoint")), parameters.pop("version", "")
        self._engine = make_engine(EngineSettings.model_validate(parameters), checkpoint, version)
        # The requests under way, by their ids; touched by the loop's thread alone.
        self._tasks: dict[str, tuple[asyncio.Task[bytes], Any]] = {}
        self._broken = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="policy-loop", daemon=True)
        self._thread.start()
        self._watcher = asyncio.run_coroutine_threadsafe(self._watch(), self._loop)

    def accept(self, requests: Sequence[Any]) -> None:
        """Called by Triton."""
        for request in requests:
            # DLPack both ways: with numpy 2 in the stub's environment, its own conversions give wrong bytes.
            tensor = torch.utils.dlpack.from_dlpack(backend.get_input_tensor_by_name(request, "REQUEST").to_dlpack())
            body = tensor.numpy().tobytes()
            operation = json.loads(request.parameters()).get("operation", "generate")
            sender = request.get_response_sender()
            self._loop.call_soon_threadsafe(self._start, request.request_id(), operation, body, sender)

    def close(self) -> None:
        """Called by Triton when the model is unloaded: what is under way fails with UNAVAILABLE."""
        asyncio.run_coroutine_threadsafe(self._engine.close(), self._loop).result()
        self._watcher.cancel()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _start(self, key: str, operation: str, body: bytes, sender: Any) -> None:
        if operation == "cancel":
            if body.decode() in self._tasks:
                self._tasks[body.decode()][0].cancel()
            sender.send(flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
            return
        task = self._loop.create_task(self._answer(operation, body))
        self._tasks[key] = task, sender
        task.add_done_callback(partial(self._finish, key))

    async def _answer(self, operation: str, body: bytes) -> bytes:
        if operation == "describe":
            return self._engine.card.SerializeToString()
        request = policy_pb2.GenerateRequest.FromString(body)
        generation = await self._engine.generate(request.messages, request.sampling)
        return policy_pb2.GenerateResponse(generation=generation).SerializeToString()

    def _finish(self, key: str, task: asyncio.Task[bytes]) -> None:
        # Out of `_tasks` first: asking a sender that has sent its last response whether it is cancelled crashes Triton.
        _, sender = self._tasks.pop(key)
        if task.cancelled():
            _send(sender, grpc.StatusCode.CANCELLED, b"cancelled")
            self._end_if_broken()
            return
        error = task.exception()
        if error is None:
            _send(sender, grpc.StatusCode.OK, task.result())
            return
        known = to_status(error) if isinstance(error, Exception) else None
        code, details = known or (grpc.StatusCode.UNAVAILABLE, f"the engine has failed: {error!r}")
        _send(sender, code, details.encode())
        self._broken = self._broken or known is None
        self._end_if_broken()

    def _end_if_broken(self) -> None:
        """Whatever is none of the documented errors has broken the engine. All who wait hear of it; then this process
        ends, so that Triton refuses the next request and the policy service loads the model anew.
        """
        if self._broken and not self._tasks:
            os._exit(1)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_VANISHED_S)
            for task, sender in list(self._tasks.values()):
                if sender.is_cancelled():
                    task.cancel()


def _send(sender: Any, code: grpc.StatusCode, body: bytes) -> None:
    status = torch.tensor([code.value[0]], dtype=torch.int32)
    content = torch.frombuffer(bytearray(body), dtype=torch.uint8)
    tensors = [backend.Tensor.from_dlpack("STATUS", status), backend.Tensor.from_dlpack("RESPONSE", content)]
    sender.send(backend.InferenceResponse(tensors), flags=backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
