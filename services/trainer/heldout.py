"""Plays a checkpoint's episodes on held-out procedural parts: by the agent's own state machine, zoom's own functions
and the policy's own engine, in this process.
"""

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from services.agent import episode, protocol
from services.agent.settings import AgentSettings
from services.data import procedural
from services.data.textures import TEXTURES
from services.evaluation import metrics
from services.policy.transformers_engine import EngineLimits, TransformersEngine
from services.vlm.checkpoint import load
from services.zoom import compare, crop
from services.zoom.registration import Registration, register

# As an agent runs by default, whatever this machine's environment says.
_LIMITS = AgentSettings.model_construct().limits()
# A verdict is forced on the first view: the policy without its tools.
NO_TOOLS = pb.Limits(max_new_tokens=_LIMITS.max_new_tokens)
_AT_ONCE = 32  # the engine's best batch
_NO_TIME = timedelta()


@dataclass(frozen=True)
class Case:
    part: procedural.Part
    exemplar: Image.Image | None  # None: a query finds nothing


@dataclass(frozen=True)
class Outcome:
    part: procedural.Part
    trajectory: pb.Trajectory

    @property
    def anomalous(self) -> bool:
        return bool(self.part.defects)

    @property
    def truth(self) -> pb.GroundTruth:
        truth = pb.GroundTruth(anomaly_present=self.anomalous)
        for defect in self.part.defects:
            truth.defects.add(type=defect.type, box=_proto(defect.box))
        return truth

    @property
    def right(self) -> bool:
        return self.trajectory.verdict.anomaly_present == self.anomalous

    @property
    def plain(self) -> bool:
        """A clean texture: nothing on it draws the eye, so no tool is needed."""
        return self.part.category in TEXTURES and not self.part.defects and not self.part.benign

    @property
    def tools(self) -> list[str]:
        return episode.tools_used(self.trajectory)

    @property
    def hit(self) -> bool:
        """A closer look held the middle of a defect (or of a benign mark)."""
        boxes = [defect.box for defect in self.part.defects] or list(self.part.benign)
        regions = [
            protocol.box_tuple(answer.observation.region)
            for call, answer in itertools.pairwise(self.trajectory.turns)
            if call.tool_call.name == protocol.CROP and answer.observation.HasField("image")
        ]
        return any(_holds(region, box) for region in regions for box in boxes)


def cases(per_category: int, variants: int, first_seed: int = procedural.TRAINING_VARIANTS) -> list[Case]:
    """Unseen variants and seeds, each with a normal unit of its own variant."""
    parts = procedural.make_set(
        procedural.CATEGORIES, per_category, first_seed, range(first_seed, first_seed + variants)
    )
    return [Case(part, _normal(part.category, part.variant)) for part in parts]


def play_all(
    checkpoint: Path,
    parts: Sequence[Case],
    limits: pb.Limits = _LIMITS,
    done: Callable[[], None] = lambda: None,
    *,
    temperature: float = 0.0,
    seed: int = 0,
    probe: bool = False,
) -> list[Outcome]:
    """An episode a part, in the order of `parts`: greedy, or sampled at a temperature. `done` hears of each one that
    ends. `probe`: a verdict is forced before each tool call, as in rollouts.
    """
    way = _Way(limits, temperature, seed, probe)
    return asyncio.run(_play_all(checkpoint, parts, way, done))


def balanced_accuracy(outcomes: Sequence[Outcome]) -> float:
    truth = [outcome.anomalous for outcome in outcomes]
    return metrics.balanced_accuracy(truth, [outcome.trajectory.verdict.anomaly_present for outcome in outcomes])


@dataclass(frozen=True)
class _Way:
    """How episodes are played."""

    limits: pb.Limits
    temperature: float
    seed: int
    probe: bool

    def sampling(self, index: int) -> pb.Sampling:
        # A seed each, and far from the next one: an episode's turns count up from its own.
        return pb.Sampling(temperature=self.temperature, seed=self.seed * 1_000_000_007 + index * 1_009)


async def _play_all(checkpoint: Path, parts: Sequence[Case], way: _Way, done: Callable[[], None]) -> list[Outcome]:
    images: dict[str, Image.Image] = {}
    engine = TransformersEngine(
        load(checkpoint), lambda image: images[image.reference.uri], EngineLimits(threads=torch.get_num_threads())
    )
    places = asyncio.Semaphore(_AT_ONCE)

    async def play(index: int, case: Case) -> Outcome:
        async with places:
            outcome = await _Player(engine, case, way, images, index).play()
            done()
            return outcome

    try:
        return await asyncio.gather(*(play(index, case) for index, case in enumerate(parts)))
    finally:
        await engine.close()


class _Player:
    """One episode; its images live in `images` while it lasts."""

    def __init__(
        self, engine: TransformersEngine, case: Case, way: _Way, images: dict[str, Image.Image], index: int
    ) -> None:
        self.engine, self.case, self.images, self.name, self.probe = engine, case, images, str(index), way.probe
        task = pb.Task(image=pb.Image(reference=self._keep(case.part.image)), category=case.part.category)
        self.trajectory = episode.begin(self.name, task, way.limits, way.sampling(index), engine.card)
        self._registration: Registration | None = None

    async def play(self) -> Outcome:
        while not isinstance(step := episode.next_step(self.trajectory), episode.Finished):
            match step:
                case episode.GenerateStep():
                    generation = await self.engine.generate(step.messages, step.sampling)
                    episode.add_generation(self.trajectory, generation, _NO_TIME)
                case episode.CropStep(box, exemplar):
                    await self._force()
                    self._observe(box, compared=exemplar is not None)
                case episode.QueryStep(box):
                    await self._force()
                    self._observe(box, compared=True)
        for uri in [uri for uri in self.images if uri.startswith(f"{self.name}/")]:
            del self.images[uri]
        return Outcome(self.case.part, self.trajectory)

    async def _force(self) -> None:
        if self.probe:
            step = episode.forced_step(self.trajectory)
            episode.add_probe(self.trajectory, await self.engine.generate(step.messages, step.sampling))

    def _observe(self, box: pb.Box | None, compared: bool) -> None:
        region = None if box is None else protocol.box_tuple(box)
        try:
            observation = self._compare(region) if compared else self._crop(region or crop.WHOLE)
        except crop.ToolError as error:
            observation = pb.Observation(tool_error=str(error))
        episode.add_observation(self.trajectory, observation, _NO_TIME)

    def _crop(self, box: crop.Region) -> pb.Observation:
        image, region = crop.crop(self.case.part.image, box)
        return pb.Observation(image=self._keep(image), region=_proto(region))

    def _compare(self, box: crop.Region | None) -> pb.Observation:
        exemplar = self.case.exemplar
        if exemplar is None:
            return pb.Observation(tool_error=f"There is no normal image of {self.case.part.category}.")
        self._registration = self._registration or register(self.case.part.image, exemplar)
        found = self._registration
        composite = self.trajectory.comparison_view == pb.COMPARISON_VIEW_COMPOSITE
        view = compare.View.COMPOSITE if composite else compare.View.SIDE_BY_SIDE
        drawn = compare.compare(self.case.part.image, exemplar, box, view, found)
        return pb.Observation(
            image=self._keep(drawn.image),
            region=_proto(drawn.region),
            exemplar=self._keep(exemplar),
            registration_confidence=found.confidence,
            registered=found.registered,
        )

    def _keep(self, image: Image.Image) -> pb.ImageReference:
        uri = f"{self.name}/{sum(key.startswith(f'{self.name}/') for key in self.images)}"
        self.images[uri] = image
        # The engine knows images by their digests.
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        return pb.ImageReference(uri=uri, sha256=digest, width=image.width, height=image.height)


def _normal(category: str, variant: int) -> Image.Image:
    return procedural.make_part(category, procedural.exemplar_seed(variant), variant, None, smudged=False).image


def _proto(region: crop.Region) -> pb.Box:
    return pb.Box(x_min=region[0], y_min=region[1], x_max=region[2], y_max=region[3])


def _holds(region: crop.Region, box: procedural.Box) -> bool:
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return region[0] <= x <= region[2] and region[1] <= y <= region[3]
