"""The edge of the policy: from messages to versions and back."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc

from agentiad.v1 import policy_pb2, policy_pb2_grpc
from services.chassis.rpc import Servicer, remaining
from services.policy.checkpoints import CheckpointStore
from services.policy.hosts import make_host
from services.policy.settings import PolicySettings
from services.policy.versions import Versions

Context = grpc.aio.ServicerContext[Any, Any]


class PolicyService(policy_pb2_grpc.PolicyServiceServicer):
    """Methods as in policy.proto."""

    def __init__(self, versions: Versions, checkpoints: CheckpointStore) -> None:
        self.versions, self.checkpoints = versions, checkpoints

    async def Generate(  # noqa: N802
        self, request: policy_pb2.GenerateRequest, context: Context
    ) -> policy_pb2.GenerateResponse:
        left = remaining()
        generation = await self.versions.generate(
            request.messages,
            request.sampling,
            request.policy_version,
            None if left is None else time.monotonic() + left,
        )
        return policy_pb2.GenerateResponse(generation=generation)

    async def DescribePolicy(  # noqa: N802
        self, request: policy_pb2.DescribePolicyRequest, context: Context
    ) -> policy_pb2.DescribePolicyResponse:
        return policy_pb2.DescribePolicyResponse(card=self.versions.current)

    async def LoadPolicy(  # noqa: N802
        self, request: policy_pb2.LoadPolicyRequest, context: Context
    ) -> policy_pb2.LoadPolicyResponse:
        return policy_pb2.LoadPolicyResponse(
            card=await self.load(request.checkpoint_uri, request.sha256, request.version)
        )

    async def load(self, checkpoint_uri: str, sha256: str, version: str) -> policy_pb2.PolicyCard:
        """As LoadPolicy."""
        folder = await self.checkpoints.fetch(checkpoint_uri)
        return await self.versions.load(folder, sha256=sha256, version=version)


def servicer(service: PolicyService) -> Servicer:
    """What `rpc.serve` takes."""
    name = policy_pb2.DESCRIPTOR.services_by_name["PolicyService"].full_name
    return policy_pb2_grpc.add_PolicyServiceServicer_to_server, service, name


@asynccontextmanager
async def opened(settings: PolicySettings) -> AsyncIterator[PolicyService]:
    """The service, with the configured checkpoint loaded. Raises BadInput, NotFound or Transient when it cannot be."""
    versions = Versions(make_host(settings), kept=settings.versions_kept, idle_s=settings.version_idle_s)
    try:
        checkpoints = CheckpointStore([settings.checkpoint, *settings.checkpoint_roots], settings.data_dir)
        service = PolicyService(versions, checkpoints)
        await service.load(settings.checkpoint, "", "")
        yield service
    finally:
        await versions.close()


@asynccontextmanager
async def hosted(settings: PolicySettings) -> AsyncIterator[Servicer]:
    """What `rpc.serve` takes, with the configured checkpoint loaded. Raises as `opened`."""
    async with opened(settings) as service:
        yield servicer(service)
