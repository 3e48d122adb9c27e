"""Groups of scored trajectories → rollouts that a learner takes: the same pixels and ids as the policy saw."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from agentiad.v1 import trajectory_pb2 as pb
from services.chassis.images import ImageStore
from services.trainer.batching import PixelCodec, encode_rollout
from services.trainer.groups import Group
from services.trainer.learner import Rollout
from services.trainer.settings import EVEN, TokenWeights
from services.vlm.render import Renderer

# Packed images kept: each first view is shown to all members of its group.
_KEPT = 256
_Packed = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]


class RolloutEncoder:
    """Blocking; one call at a time."""

    def __init__(self, renderer: Renderer, store: ImageStore, emphasis: TokenWeights = EVEN) -> None:
        self._renderer, self._store, self._emphasis = renderer, store, emphasis
        self._codec = PixelCodec(renderer.processor.image_processor)
        self._packed: OrderedDict[str, _Packed] = OrderedDict()

    def encode(self, groups: Sequence[Group]) -> list[Rollout]:
        """One a member, in their order. Raises BadInput, NotFound or Transient: an image cannot be read."""
        return [
            self.rollout(
                scored.completed.trajectory,
                group.advantages[member],
                None if group.tail_advantages is None else group.tail_advantages[member],
            )
            for group in groups
            for member, scored in enumerate(group.members)
        ]

    def rollout(self, trajectory: pb.Trajectory, advantage: float, tail: float | None = None) -> Rollout:
        packed = [self._pack(image) for image in shown(trajectory)]
        patches = np.concatenate([patches for patches, _ in packed])
        grids = np.concatenate([grid for _, grid in packed])
        return Rollout(encode_rollout(trajectory, patches, grids, self._renderer, self._emphasis), advantage, tail)

    def _pack(self, image: pb.Image) -> _Packed:
        key = image.reference.sha256
        found = self._packed.get(key)
        if found is None:
            pixels = self._renderer.pixels([self._store.load(image)])
            found = self._codec.pack(pixels["pixel_values"].numpy()), pixels["image_grid_thw"].numpy()
            self._packed[key] = found
            if len(self._packed) > _KEPT:
                self._packed.popitem(last=False)
        return found


def shown(trajectory: pb.Trajectory) -> Iterator[pb.Image]:
    """Every image of the conversation, in order."""
    for turn in trajectory.turns:
        for segment in turn.message.segments:
            if segment.HasField("image"):
                yield segment.image
