"""The edge of reward for callers without Kafka."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

from agentiad.v1 import reward_pb2, reward_pb2_grpc
from services.chassis.errors import BadInput
from services.chassis.rpc import Servicer
from services.reward.scoring import score

Context = grpc.aio.ServicerContext[Any, Any]


class RewardService(reward_pb2_grpc.RewardServiceServicer):
    """Scores what it is given; keeps nothing."""

    async def Score(self, request: reward_pb2.ScoreRequest, context: Context) -> reward_pb2.ScoreResponse:  # noqa: N802
        # A truth that nobody set would read as "normal".
        if not request.HasField("ground_truth"):
            raise BadInput("ground_truth is missing")
        try:
            rewards = await asyncio.to_thread(score, request.trajectories, request.ground_truth, request.preset)
        except ValueError as error:
            raise BadInput(str(error)) from error
        return reward_pb2.ScoreResponse(rewards=rewards)


def servicer() -> Servicer:
    """What `rpc.serve` takes."""
    return (
        reward_pb2_grpc.add_RewardServiceServicer_to_server,
        RewardService(),
        reward_pb2.DESCRIPTOR.services_by_name["RewardService"].full_name,
    )
