"""A tiny policy that has learnt one reply by heart, so that it reaches its verdict and ends its turn by itself."""

from __future__ import annotations

from pathlib import Path

import torch

from services.vlm import checkpoint
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.policy.conversations import user

QUESTION = user("Image 1: bottle.")
REPLY = '<think></think><answer>{"anomaly_present": true,"top_anomaly":"scratch"}</answer>'


def make_learnt_checkpoint(path: Path) -> Path:
    make_tiny_checkpoint(path, version="learnt")
    policy = checkpoint.load(path)
    renderer, model = policy.renderer, policy.model.train()
    prompt = renderer.expand(renderer.render([QUESTION]), [])
    reply = [*renderer.encode(REPLY), renderer.end_of_turn_id]
    ids = torch.tensor([prompt + reply])
    labels = torch.tensor([[-100] * len(prompt) + reply])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss
        if loss < 0.05:  # every token of the reply is by far the most probable
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    else:
        raise AssertionError(f"the reply was not learnt: loss {loss}")
    model.save_pretrained(path)
    return path
