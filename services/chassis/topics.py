"""The Kafka topics: names, sizes and what they carry. Nothing else spells a topic's name."""

from collections.abc import Mapping
from dataclasses import dataclass

from google.protobuf.message import Message

from agentiad.v1 import events_pb2 as events

IMAGES = "agentiad.images.v1"
INSPECTIONS = "agentiad.inspections.v1"
ROLLOUT_REQUESTS = "agentiad.rollout-requests.v1"
TRAJECTORIES = "agentiad.trajectories.v1"
SCORED_TRAJECTORIES = "agentiad.scored-trajectories.v1"
POLICIES = "agentiad.policies.v1"
REVIEWS = "agentiad.reviews.v1"


@dataclass(frozen=True)
class TopicSpec:
    """How a topic is created, and the one message type that it carries."""

    partitions: int
    compacted: bool
    message: type[Message]


# Partitions bound how many consumers of a group can share a topic. Policies are few and stay in order.
TOPICS: dict[str, TopicSpec] = {
    IMAGES: TopicSpec(6, False, events.ImageCaptured),
    INSPECTIONS: TopicSpec(6, False, events.InspectionCompleted),
    ROLLOUT_REQUESTS: TopicSpec(6, False, events.RolloutRequested),
    TRAJECTORIES: TopicSpec(6, False, events.TrajectoryCompleted),
    SCORED_TRAJECTORIES: TopicSpec(6, False, events.TrajectoryScored),
    POLICIES: TopicSpec(1, True, events.PolicyPublished),
    REVIEWS: TopicSpec(3, False, events.ReviewSubmitted),
}


def retry(topic: str) -> str:
    """The topic where events of `topic` wait for another attempt."""
    return f"{topic}.retry"


def dlq(topic: str) -> str:
    """The topic where events of `topic` that cannot be handled are kept for the operator."""
    return f"{topic}.dlq"


def with_failures(topics: Mapping[str, TopicSpec]) -> dict[str, TopicSpec]:
    """The topics, each with its retry topic (as many partitions) and its DLQ (one partition), neither compacted."""
    specs = dict(topics)
    for name, spec in topics.items():
        specs[retry(name)] = TopicSpec(spec.partitions, False, spec.message)
        specs[dlq(name)] = TopicSpec(1, False, spec.message)
    return specs


def candidate_of(policy: str) -> str:
    """The policy name under which a trainer publishes versions of `policy`: rollouts follow it, inspections don't."""
    return f"{policy}-candidate"


def policy_key(policy: str, version: str) -> str:
    """Key of a PolicyPublished: compaction keeps every version that one may roll back to."""
    return f"{policy}/{version}"
