"""The verdict in the middle of a turn that the policy speaks by itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from agentiad.v1 import trajectory_pb2 as pb
from services.policy.hosts import InProcessHost
from services.policy.settings import EngineSettings
from services.vlm import checkpoint
from tests.policy import reference
from tests.policy.learnt import QUESTION, REPLY, make_learnt_checkpoint


async def test_a_spoken_verdict_has_its_probability(tmp_path: Path) -> None:
    path = make_learnt_checkpoint(tmp_path)
    policy = checkpoint.load(path)
    engine = await InProcessHost(EngineSettings()).open(path, "")
    generation = await engine.generate([QUESTION], pb.Sampling(max_new_tokens=100))
    assert (generation.text, generation.finish_reason) == (REPLY, pb.FINISH_REASON_STOP)
    assert generation.token_ids[-1] == policy.renderer.end_of_turn_id
    distributions = reference.log_probabilities(policy, [QUESTION], generation.token_ids)
    spoken = [policy.renderer.decode([token]) for token in generation.token_ids]
    place = next(index for index, word in enumerate(spoken) if word.strip() == "true")
    expected = reference.verdict_probability(policy, distributions[place])
    assert generation.anomaly_probability == pytest.approx(expected, abs=1e-4)
    assert generation.anomaly_probability > 0.5
    await engine.close()
