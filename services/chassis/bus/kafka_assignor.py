"""How a Kafka group shares its partitions: cooperative-sticky, topic by topic."""

from types import SimpleNamespace
from typing import Any

from kafka.coordinator.assignors.cooperative_sticky import CooperativeStickyAssignor
from kafka.protocol.consumer.metadata import ConsumerProtocolAssignment, ConsumerProtocolSubscription


class PerTopicStickyAssignor(CooperativeStickyAssignor):  # type: ignore[misc]
    """kafka-python's algorithm evens out the *number* of partitions over all topics: of two members one may get all the
    partitions of a topic and the other all those of its (idle) retry topic. Run for each topic by itself, every topic's
    load is shared. Same name and wire format: the leader decides, the others need not know."""

    def assign(self, cluster: Any, members: list[Any]) -> dict[str, ConsumerProtocolAssignment]:
        shares: dict[str, list[tuple[str, list[int]]]] = {member.member_id: [] for member in members}
        for topic in sorted({topic for member in members for topic in member.metadata.topics}):
            subscribed = [_restricted(member, topic) for member in members if topic in member.metadata.topics]
            for member_id, assignment in super().assign(cluster, subscribed).items():
                shares[member_id] += assignment.assigned_partitions
        return {
            member_id: ConsumerProtocolAssignment(self.version, sorted(share), b"")
            for member_id, share in shares.items()
        }


def _restricted(member: Any, topic: str) -> SimpleNamespace:
    """The member as if it were subscribed to this topic only."""
    metadata = member.metadata
    owned = [partitions for partitions in metadata.owned_partitions or () if partitions.topic == topic]
    subscription = ConsumerProtocolSubscription(
        version=metadata.version, topics=[topic], user_data=b"", owned_partitions=owned
    )
    return SimpleNamespace(member_id=member.member_id, metadata=subscription)
