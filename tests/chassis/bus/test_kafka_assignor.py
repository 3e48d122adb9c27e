"""The leader's part of a rebalance, with members as kafka-python hands them over."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

from kafka.protocol.consumer.metadata import ConsumerProtocolSubscription
from kafka.structs import TopicPartition

from services.chassis.bus.kafka_assignor import PerTopicStickyAssignor

Share = dict[str, list[int]]


class Cluster:
    """As much of kafka-python's ClusterMetadata as an assignor asks for: topic → partitions."""

    def __init__(self, **sizes: int) -> None:
        self._sizes = sizes

    def topics(self) -> set[str]:
        return set(self._sizes)

    def partitions_for_topic(self, topic: str) -> set[int]:
        return set(range(self._sizes[topic]))


def make_member(name: str, topics: list[str], owned: Share | None = None) -> Any:
    assignor = PerTopicStickyAssignor()
    if owned is not None:
        assignor.member_assignment = [TopicPartition(t, p) for t, partitions in owned.items() for p in partitions]
    metadata = ConsumerProtocolSubscription.decode(assignor.metadata(topics).encode())
    return SimpleNamespace(member_id=name, metadata=metadata)


def assign(cluster: Cluster, *members: Any) -> dict[str, Share]:
    result: dict[str, Share] = {}
    for name, assignment in PerTopicStickyAssignor().assign(cluster, list(members)).items():
        share: Share = defaultdict(list)
        for partition in type(assignment).decode(assignment.encode()).partitions():
            share[partition.topic].append(partition.partition)
        result[name] = {topic: sorted(partitions) for topic, partitions in share.items()}
    return result


def test_each_topic_is_shared() -> None:
    shares = assign(Cluster(work=6, idle=6), make_member("a", ["work", "idle"]), make_member("b", ["work", "idle"]))
    for topic in ("work", "idle"):
        assert [len(share[topic]) for share in shares.values()] == [3, 3]
        assert sorted(shares["a"][topic] + shares["b"][topic]) == list(range(6))


def test_a_new_member_gets_nothing_before_its_owner_lets_go() -> None:
    everything: Share = {"work": [0, 1, 2, 3], "idle": [0, 1, 2, 3]}
    cluster, topics = Cluster(work=4, idle=4), ["work", "idle"]
    first = assign(cluster, make_member("a", topics, everything), make_member("b", topics))
    assert [len(first["a"][topic]) for topic in topics] == [2, 2]
    assert first["b"] == {}
    second = assign(cluster, make_member("a", topics, first["a"]), make_member("b", topics))
    assert second["a"] == first["a"]
    assert [len(second["b"][topic]) for topic in topics] == [2, 2]


def test_members_may_read_different_topics() -> None:
    shares = assign(Cluster(x=2, y=2), make_member("a", ["x"]), make_member("b", ["x", "y"]))
    assert [len(shares["a"]["x"]), len(shares["b"]["x"])] == [1, 1]
    assert shares["b"]["y"] == [0, 1]
    assert "y" not in shares["a"]
