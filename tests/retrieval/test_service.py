"""Retrieval through the wire, over a library in the process and over one on a server."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from agentiad.v1 import retrieval_pb2 as pb
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from agentiad.v1.trajectory_pb2 import Image, ImageReference
from services.chassis import rpc
from services.chassis.images import ImageStore
from services.retrieval.library import LibraryError
from services.retrieval.service import hosted
from services.retrieval.settings import RetrievalSettings
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.retrieval.exemplars import HOSTILE_CATEGORIES, MeanColours, make_picture

INVALID, NOT_FOUND = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND


def put_reds(store: ImageStore, count: int = 5) -> list[ImageReference]:
    """From black to red."""
    return [store.put(make_picture(50 * i)) for i in range(count)]


def asking(image: ImageReference, category: str = "plate", limit: int = 3) -> pb.QueryExemplarsRequest:
    return pb.QueryExemplarsRequest(image=Image(reference=image), category=category, limit=limit)


async def test_add_query_list_delete(retrieval: RetrievalServiceStub, store: ImageStore) -> None:
    reds, blue = put_reds(store), store.put(make_picture(0, 0, 200))
    assert (await retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate", images=[*reds, blue]))).added == 6
    assert (await retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate", images=[*reds, blue]))).added == 0

    found = (await retrieval.QueryExemplars(asking(store.put(make_picture(190))))).exemplars
    assert found[0].image == reds[4]
    assert [exemplar.category for exemplar in found] == ["plate"] * 3
    assert found[0].similarity > 0.99
    assert blue not in [exemplar.image for exemplar in found]
    assert not (await retrieval.QueryExemplars(asking(reds[0], category="bottle"))).exemplars

    listed = await retrieval.ListExemplars(pb.ListExemplarsRequest(category="plate", page_size=4))
    rest = await retrieval.ListExemplars(
        pb.ListExemplarsRequest(category="plate", page_size=4, page_token=listed.next_page_token)
    )
    assert (len(listed.exemplars), len(rest.exemplars), rest.next_page_token) == (4, 2, "")

    removed = await retrieval.DeleteExemplars(pb.DeleteExemplarsRequest(category="plate", sha256=[blue.sha256]))
    assert removed.deleted == 1
    assert (await retrieval.DeleteExemplars(pb.DeleteExemplarsRequest(category="plate"))).deleted == 5
    assert not (await retrieval.ListExemplars(pb.ListExemplarsRequest())).exemplars


async def test_the_queried_image_is_never_its_own_exemplar(retrieval: RetrievalServiceStub, store: ImageStore) -> None:
    reds = put_reds(store)
    await retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate", images=reds))
    for red in reds:
        content = Path(red.uri.removeprefix("file://")).read_bytes()
        for image in (Image(reference=red), Image(content=content)):
            request = pb.QueryExemplarsRequest(image=image, category="plate", limit=16)
            found = (await retrieval.QueryExemplars(request)).exemplars
            assert len(found) == 4
            assert red.sha256 not in [exemplar.image.sha256 for exemplar in found]


async def test_one_bad_image_adds_nothing(retrieval: RetrievalServiceStub, store: ImageStore) -> None:
    reds = put_reds(store, 2)
    gone = ImageReference(uri=reds[0].uri.replace(reds[0].sha256, "f" * 64), sha256="f" * 64, media_type="image/png")
    wrong = ImageReference()
    wrong.CopyFrom(reds[1])
    wrong.sha256 = "0" * 64
    outside = ImageReference(uri="file:///etc/passwd", sha256="0" * 64, media_type="image/png")
    for bad, code in ((gone, NOT_FOUND), (wrong, INVALID), (outside, INVALID), (ImageReference(), INVALID)):
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate", images=[reds[0], bad]))
        assert refused.value.code() is code
    assert not (await retrieval.ListExemplars(pb.ListExemplarsRequest())).exemplars


async def test_what_is_wrong_is_said(retrieval: RetrievalServiceStub, store: ImageStore) -> None:
    (red,) = put_reds(store, 1)
    calls = [
        retrieval.AddExemplars(pb.AddExemplarsRequest(category="", images=[red])),
        retrieval.AddExemplars(pb.AddExemplarsRequest(category="a" * 257, images=[red])),
        retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate")),
        retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate", images=[red] * 1025)),
        retrieval.QueryExemplars(asking(red, category="")),
        retrieval.QueryExemplars(asking(red, limit=0)),
        retrieval.QueryExemplars(asking(red, limit=17)),
        retrieval.QueryExemplars(pb.QueryExemplarsRequest(category="plate", limit=1)),
        retrieval.QueryExemplars(pb.QueryExemplarsRequest(image=Image(content=b"?"), category="plate", limit=1)),
        retrieval.ListExemplars(pb.ListExemplarsRequest(page_size=1001)),
        retrieval.ListExemplars(pb.ListExemplarsRequest(page_token='" or id != "')),
        retrieval.DeleteExemplars(pb.DeleteExemplarsRequest()),
        retrieval.DeleteExemplars(pb.DeleteExemplarsRequest(category="plate", sha256=['" or id != "'])),
    ]
    for call in calls:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call
        assert refused.value.code() is INVALID, refused.value.details()


async def test_hostile_category_names_are_names(retrieval: RetrievalServiceStub, store: ImageStore) -> None:
    reds = put_reds(store, 2)
    await retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate", images=reds))
    for category in filter(None, HOSTILE_CATEGORIES):
        assert not (await retrieval.QueryExemplars(asking(reds[0], category=category))).exemplars
        assert (await retrieval.DeleteExemplars(pb.DeleteExemplarsRequest(category=category))).deleted == 0
    assert len((await retrieval.ListExemplars(pb.ListExemplarsRequest())).exemplars) == 2


async def test_concurrent_queries_are_all_answered(retrieval: RetrievalServiceStub, store: ImageStore) -> None:
    reds = put_reds(store)
    await retrieval.AddExemplars(pb.AddExemplarsRequest(category="plate", images=reds))
    asked = [store.put(make_picture(5 * i, 3)) for i in range(40)]
    answers = await asyncio.gather(*(retrieval.QueryExemplars(asking(image, limit=1)) for image in asked))
    likeness = MeanColours().embed([make_picture(5 * i, 3) for i in range(40)]) @ (
        MeanColours().embed([make_picture(50 * i) for i in range(5)]).T
    )
    assert [answer.exemplars[0].image for answer in answers] == [reds[i] for i in likeness.argmax(axis=1)]


async def test_the_policys_own_vision_tower_is_the_encoder(tmp_path: Path, store: ImageStore) -> None:
    address = f"unix://{tmp_path}/retrieval.sock"
    settings = RetrievalSettings(
        data_dir=tmp_path, image_store=str(tmp_path / "images"), encoder=make_tiny_checkpoint(tmp_path / "policy-1")
    )
    images = [store.put(make_picture(200, 30 * i, side=80)) for i in range(4)]
    async with hosted(settings) as servicer, rpc.serve(address, [servicer]), rpc.channel(address) as channel:
        stub = RetrievalServiceStub(channel)
        assert (await stub.AddExemplars(pb.AddExemplarsRequest(category="plate", images=images))).added == 4
        found = (await stub.QueryExemplars(asking(images[0], limit=16))).exemplars
        assert {exemplar.image.sha256 for exemplar in found} == {image.sha256 for image in images[1:]}
    # The same place, another tower.
    other = settings.model_copy(update={"encoder": make_tiny_checkpoint(tmp_path / "policy-2", seed=1)})
    with pytest.raises(LibraryError, match="policy-1"):
        async with hosted(other):
            pass


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"ENCODER": "/nowhere"}, "ENCODER: Path does not point to a directory"),
        ({"ENCODER": str(Path(__file__).parent)}, "cannot be used: "),
        ({"MILVUS_URI": "localhost:19530"}, "MILVUS_URI: must be http://HOST:PORT"),
        ({"MILVUS_URI": "ftp://x", "MAX_QUEUED": "0"}, "MAX_QUEUED: "),
    ],
)
def test_a_wrong_start_says_what_is_wrong(environment: dict[str, str], says: str, tmp_path: Path) -> None:
    variables = {**os.environ, "DATA_DIR": str(tmp_path), "BIND": f"unix://{tmp_path}/r.sock", **environment}
    ended = subprocess.run(
        [sys.executable, "-m", "services.retrieval"], env=variables, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 2
    assert says in ended.stderr
    assert "Traceback" not in ended.stderr
