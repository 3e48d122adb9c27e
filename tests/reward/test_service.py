"""Score through the wire, on a unix socket."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from agentiad.v1 import reward_pb2
from agentiad.v1.reward_pb2_grpc import RewardServiceStub
from services.chassis import rpc
from services.reward.scoring import score
from services.reward.service import servicer
from tests.reward.trajectories import DEFECT, NORMAL, crop, make_trajectory, make_truth, make_verdict, query

TRUTH = make_truth(DEFECT, types=["scratch"])
GROUP = [
    make_trajectory(crop(DEFECT), verdict=make_verdict(True, "scratch", DEFECT)),
    make_trajectory(crop(DEFECT, probe=0.9), query(probe=0.2), verdict=make_verdict(False)),
]


@pytest.fixture
async def reward(tmp_path: Path) -> AsyncIterator[RewardServiceStub]:
    address = f"unix://{tmp_path}/reward.sock"
    async with rpc.serve(address, [servicer()]), rpc.channel(address) as channel:
        yield RewardServiceStub(channel)


@pytest.mark.parametrize("preset", ["", "gated-type", "paper", "paper-as-run"])
async def test_one_reward_a_trajectory_in_their_order(reward: RewardServiceStub, preset: str) -> None:
    request = reward_pb2.ScoreRequest(trajectories=GROUP, ground_truth=TRUTH, preset=preset)
    response = await reward.Score(request)
    assert list(response.rewards) == score(GROUP, TRUTH, preset)
    assert response.rewards[0].total > response.rewards[1].total


async def test_a_normal_truth_is_a_truth(reward: RewardServiceStub) -> None:
    response = await reward.Score(reward_pb2.ScoreRequest(trajectories=GROUP, ground_truth=NORMAL))
    assert [each.components["verdict"] for each in response.rewards] == [0, 1]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (reward_pb2.ScoreRequest(trajectories=GROUP, ground_truth=TRUTH, preset="best"), "no reward preset 'best'"),
        (reward_pb2.ScoreRequest(trajectories=GROUP, ground_truth=TRUTH, preset="gated-x"), "no component 'x'"),
        (reward_pb2.ScoreRequest(ground_truth=TRUTH), "no trajectories"),
        (reward_pb2.ScoreRequest(trajectories=GROUP), "ground_truth is missing"),
    ],
)
async def test_bad_requests_are_statuses(
    reward: RewardServiceStub, request_: reward_pb2.ScoreRequest, reason: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await reward.Score(request_)
    assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason in (raised.value.details() or "")
