"""What an agent is told at its start."""

from typing import Literal

from pydantic import Field

from agentiad.v1 import trajectory_pb2 as pb
from services.agent.inspection import DecisionRule
from services.chassis.settings import Address, BusSettings, RedisSettings, RpcSettings


class AgentSettings(BusSettings, RedisSettings, RpcSettings):
    bind: Address = "127.0.0.1:50054"
    policy_address: Address = "127.0.0.1:50051"
    zoom_address: Address = "127.0.0.1:50052"
    retrieval_address: Address = "127.0.0.1:50053"
    work: Literal["inspection", "rollout"] = (
        "inspection"  # image events to verdicts, or rollout requests to trajectories
    )
    max_in_flight: int = Field(default=32, ge=1)  # episodes at once; the policy batches across them
    max_turns: int = Field(default=6, ge=0)  # replies of the policy before its verdict is forced; 0: at once
    max_tool_calls: int = Field(default=3, ge=0)  # as the paper's code runs
    max_new_tokens: int = Field(default=512, ge=8)  # a turn
    threshold: float = Field(default=0.5, ge=0, le=1)  # scores from here on reject
    review_band: float = Field(default=0.0, ge=0, le=1)  # scores this near to the threshold go to a person

    def limits(self) -> pb.Limits:
        return pb.Limits(
            max_turns=self.max_turns, max_tool_calls=self.max_tool_calls, max_new_tokens=self.max_new_tokens
        )

    def rule(self) -> DecisionRule:
        return DecisionRule(self.threshold, self.review_band)
