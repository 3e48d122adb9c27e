"""Rewards of a group of trajectories. Pure: the same records give the same rewards, wherever and whenever.

Invariants: a total is the exact sum of its components, rounded once; every number is finite, whatever the records hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from agentiad.v1 import reward_pb2
from agentiad.v1 import trajectory_pb2 as pb
from services.reward import presets
from services.reward.reading import read, read_truth


def score(trajectories: Sequence[pb.Trajectory], truth: pb.GroundTruth, preset: str) -> list[reward_pb2.Reward]:
    """One reward a trajectory, in their order. Trajectories are the members of one group: some components look at all.
    Raises ValueError: an unknown preset, no trajectories."""
    asked = presets.parse(preset)
    if not trajectories:
        raise ValueError("there are no trajectories to score")
    members = asked.components([read(trajectory) for trajectory in trajectories], read_truth(truth))
    return [_reward(components, asked.ablated, preset) for components in members]


def _reward(components: dict[str, float], ablated: frozenset[str], preset: str) -> reward_pb2.Reward:
    # Adding 0 makes a 0 of -0, which would be other bytes.
    counted = {name: 0.0 if name in ablated else value + 0.0 for name, value in components.items()}
    return reward_pb2.Reward(total=math.fsum(counted.values()), components=counted, preset=preset)
