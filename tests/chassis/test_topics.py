from agentiad.v1 import events_pb2
from services.chassis import topics


def test_every_topic_has_a_retry_topic_and_a_dlq() -> None:
    every = topics.with_failures(topics.TOPICS)
    assert len(every) == 3 * len(topics.TOPICS)
    assert every["agentiad.images.v1"].message is events_pb2.ImageCaptured
    assert every["agentiad.images.v1.retry"].partitions == topics.TOPICS[topics.IMAGES].partitions
    assert every["agentiad.images.v1.dlq"].partitions == 1


def test_only_policies_are_compacted() -> None:
    assert [name for name, spec in topics.with_failures(topics.TOPICS).items() if spec.compacted] == [topics.POLICIES]


def test_every_event_has_one_topic() -> None:
    carried = {spec.message.DESCRIPTOR.name for spec in topics.TOPICS.values()}
    assert carried == set(events_pb2.DESCRIPTOR.message_types_by_name)
