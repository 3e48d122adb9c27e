"""The policy over the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio

from agentiad.v1 import policy_pb2 as pb
from agentiad.v1.events_pb2 import PolicyPublished
from agentiad.v1.policy_pb2_grpc import PolicyServiceStub
from services.chassis import rpc
from services.chassis.bus.sqlite import SqliteBus
from services.chassis.topics import POLICIES, TOPICS
from services.policy.following import follow
from services.policy.service import PolicyService, opened, servicer
from services.policy.settings import PolicySettings
from services.vlm.checkpoint import sha256_of
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.policy.conversations import GREEDY, LONG, assistant, eventually, make_reference, opening, user


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    for seed, name in enumerate(("one", "two", "three")):
        make_tiny_checkpoint(folder / name, seed=seed, version=name)
    (folder / "broken").mkdir()
    return folder


@pytest_asyncio.fixture
async def service(checkpoints: Path, tmp_path: Path) -> AsyncIterator[PolicyService]:
    settings = PolicySettings(
        checkpoint=checkpoints / "one", checkpoint_roots=(str(checkpoints),), data_dir=tmp_path,
        image_roots=(str(tmp_path),), torch_threads=1, max_batch=1, max_queue=1,
    )  # fmt: skip
    async with opened(settings) as opened_service:
        yield opened_service


@pytest_asyncio.fixture
async def stub(service: PolicyService, tmp_path: Path) -> AsyncIterator[PolicyServiceStub]:
    async with (
        rpc.serve(f"unix://{tmp_path}/policy.sock", [servicer(service)]) as server,
        rpc.channel(server.address) as channel,
    ):
        yield PolicyServiceStub(channel)


async def test_an_episode_of_two_turns(stub: PolicyServiceStub, tmp_path: Path) -> None:
    messages = [user(make_reference(tmp_path / "part.png", 1), "Image 1: bottle.")]
    first = (await stub.Generate(pb.GenerateRequest(messages=messages, sampling=GREEDY))).generation
    assert first.policy_version == "one"
    assert len(first.token_ids) == len(first.log_probabilities) == len(first.loss_mask)
    messages += [assistant(first.token_ids), user("Sure?")]
    request = pb.GenerateRequest(messages=messages, sampling=GREEDY, policy_version=first.policy_version)
    second = (await stub.Generate(request)).generation
    assert second.cached_tokens == first.prompt_tokens + len(first.token_ids) - 1


async def test_the_card_of_the_current_version(stub: PolicyServiceStub) -> None:
    card = (await stub.DescribePolicy(pb.DescribePolicyRequest())).card
    assert (card.version, list(card.categories)) == ("one", ["bottle"])


async def test_a_version_is_loaded_and_takes_over(stub: PolicyServiceStub, checkpoints: Path) -> None:
    request = pb.LoadPolicyRequest(
        checkpoint_uri=(checkpoints / "two").as_uri(), sha256=sha256_of(checkpoints / "two"), version="v2"
    )
    assert (await stub.LoadPolicy(request)).card.version == "v2"
    assert (
        await stub.Generate(pb.GenerateRequest(messages=opening(), sampling=GREEDY))
    ).generation.policy_version == "v2"


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.GenerateRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(messages=opening()), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.GenerateRequest(messages=opening(), sampling=GREEDY, policy_version="x"), grpc.StatusCode.NOT_FOUND),
        (pb.LoadPolicyRequest(checkpoint_uri="/etc"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.LoadPolicyRequest(checkpoint_uri="s3://nowhere/x"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.LoadPolicyRequest(checkpoint_uri="CHECKPOINTS/none"), grpc.StatusCode.NOT_FOUND),
        (pb.LoadPolicyRequest(checkpoint_uri="CHECKPOINTS/broken"), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.LoadPolicyRequest(checkpoint_uri="CHECKPOINTS/two", sha256="0" * 64), grpc.StatusCode.INVALID_ARGUMENT),
    ],
    ids=lambda value: value.name if isinstance(value, grpc.StatusCode) else "",
)
async def test_errors_have_their_status(
    stub: PolicyServiceStub,
    checkpoints: Path,
    request_: pb.GenerateRequest | pb.LoadPolicyRequest,
    code: grpc.StatusCode,
) -> None:
    if isinstance(request_, pb.LoadPolicyRequest):
        uri = request_.checkpoint_uri.replace("CHECKPOINTS", str(checkpoints))
        call = stub.LoadPolicy(pb.LoadPolicyRequest(checkpoint_uri=uri, sha256=request_.sha256))
    else:
        call = stub.Generate(request_)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    assert raised.value.code() is code
    assert (await stub.DescribePolicy(pb.DescribePolicyRequest())).card.version == "one"


async def test_a_full_queue_is_resource_exhausted(stub: PolicyServiceStub) -> None:
    async def ask(seed: int) -> None:
        await stub.Generate(pb.GenerateRequest(messages=opening(seed), sampling=LONG))

    calls = [asyncio.create_task(ask(seed)) for seed in range(3)]
    done, pending = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
    error = done.pop().exception()
    assert isinstance(error, grpc.aio.AioRpcError)
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    # Clients that go away give their places back.
    for call in pending:
        call.cancel()
    async with asyncio.timeout(20):
        while True:
            try:
                await stub.Generate(pb.GenerateRequest(messages=opening(), sampling=GREEDY))
                break
            except grpc.aio.AioRpcError as refusal:
                if refusal.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                await asyncio.sleep(0.02)


async def test_a_deadline_ends_the_call(stub: PolicyServiceStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await stub.Generate(pb.GenerateRequest(messages=opening(), sampling=LONG), timeout=0.05)
    assert raised.value.code() in (grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE)


async def test_published_versions_take_over_and_broken_ones_do_not(
    service: PolicyService, checkpoints: Path, tmp_path: Path
) -> None:
    bus = SqliteBus(tmp_path / "bus.db")
    await bus.ensure_topics(TOPICS)

    async def publish(version: str, policy: str = "policy", sha256: str = "") -> None:
        event = PolicyPublished(
            policy=policy, version=version, checkpoint_uri=(checkpoints / version).as_uri(), sha256=sha256
        )
        await bus.publish(POLICIES, policy, event.SerializeToString(), {})

    await publish("two")
    await publish("broken")
    await bus.publish(POLICIES, "policy", b"\xffnonsense", {})
    await publish("three", policy="another")
    stop = asyncio.Event()
    following = asyncio.create_task(follow(bus, "policy", service.load, stop, asyncio.Event()))
    await eventually(lambda: service.versions.current.version == "two")
    await publish("one", sha256="0" * 64)
    await publish("three", sha256=sha256_of(checkpoints / "three"))
    await eventually(lambda: service.versions.current.version == "three")
    stop.set()
    await following
    await bus.close()
