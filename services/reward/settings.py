"""What the reward service is told at its start."""

from pydantic import Field

from services.chassis.settings import Address, BusSettings, RedisSettings, RpcSettings


class RewardSettings(BusSettings, RedisSettings, RpcSettings):
    bind: Address = "127.0.0.1:50055"
    max_in_flight: int = Field(default=32, ge=1)  # trajectories at once
