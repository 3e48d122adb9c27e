"""Zoom through the wire, on a unix socket."""

import sys
from io import BytesIO
from subprocess import run

import grpc
import numpy as np
import pytest
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1 import zoom_pb2
from agentiad.v1.zoom_pb2_grpc import ZoomServiceStub
from services.chassis.images import ImageStore
from tests.zoom.parts import make_board, stored

BOX = pb.Box(x_min=0.3, y_min=0.4, x_max=0.5, y_max=0.6)
COMPOSITE = pb.COMPARISON_VIEW_COMPOSITE


def shown(store: ImageStore, region: zoom_pb2.RenderedRegion) -> Image.Image:
    return store.load(pb.Image(reference=region.image))


async def test_crop(zoom: ZoomServiceStub, store: ImageStore) -> None:
    board = make_board(side=1000)
    response = await zoom.Crop(zoom_pb2.CropRequest(image=stored(store, board), box=BOX))
    assert np.array_equal(np.asarray(shown(store, response.crop)), np.asarray(board.crop((200, 300, 600, 700))))
    region = response.crop.region
    assert [region.x_min, region.y_min, region.x_max, region.y_max] == pytest.approx([0.2, 0.3, 0.6, 0.7])


async def test_crop_of_bytes_is_the_crop_of_the_reference(zoom: ZoomServiceStub, store: ImageStore) -> None:
    board = make_board()
    encoded = BytesIO()
    board.save(encoded, "PNG")
    sent = await zoom.Crop(zoom_pb2.CropRequest(image=pb.Image(content=encoded.getvalue()), box=BOX))
    read = await zoom.Crop(zoom_pb2.CropRequest(image=stored(store, board), box=BOX))
    assert sent == read


async def test_a_large_jpeg_is_cut_in_the_right_place(zoom: ZoomServiceStub, store: ImageStore) -> None:
    board = make_board(side=6000)
    encoded = BytesIO()
    board.save(encoded, "JPEG", quality=95)
    whole = pb.Box(x_min=0.1, y_min=0.1, x_max=0.9, y_max=0.9)
    response = await zoom.Crop(zoom_pb2.CropRequest(image=pb.Image(content=encoded.getvalue()), box=whole))
    picture = shown(store, response.crop)
    expected = board.resize(picture.size, Image.Resampling.BOX)
    assert np.abs(np.asarray(picture).astype(int) - np.asarray(expected)).mean() < 3


async def test_compare(zoom: ZoomServiceStub, store: ImageStore) -> None:
    part, exemplar = stored(store, make_board(missing=4)), stored(store, make_board())
    whole = await zoom.Compare(zoom_pb2.CompareRequest(part=part, exemplar=exemplar, view=COMPOSITE))
    assert whole.registered
    assert whole.registration_confidence > 0.9
    assert np.asarray(shown(store, whole.comparison))[:, :, 2].max() > 60
    assert whole.comparison.region == pb.Box(x_min=0, y_min=0, x_max=1, y_max=1)
    # The second comparison of the pair finds its registration; what it shows is the same place.
    beside = await zoom.Compare(
        zoom_pb2.CompareRequest(part=part, exemplar=exemplar, box=BOX, view=pb.COMPARISON_VIEW_SIDE_BY_SIDE)
    )
    cropped = await zoom.Crop(zoom_pb2.CropRequest(image=exemplar, box=BOX))
    assert beside.registration_confidence == whole.registration_confidence
    assert beside.comparison == cropped.crop


async def test_what_cannot_be_registered_is_shown_alone(zoom: ZoomServiceStub, store: ImageStore) -> None:
    part, exemplar = stored(store, make_board(0)), stored(store, make_board(1))
    response = await zoom.Compare(zoom_pb2.CompareRequest(part=part, exemplar=exemplar, box=BOX, view=COMPOSITE))
    assert not response.registered
    assert response.registration_confidence < 0.5
    assert response.comparison.image == exemplar.reference


async def test_bad_images_are_statuses(zoom: ZoomServiceStub, store: ImageStore) -> None:
    good = stored(store, make_board())
    wrong_size, wrong_sha, gone, no_size = (pb.Image(reference=good.reference) for _ in range(4))
    wrong_size.reference.width = 999
    wrong_sha.reference.sha256 = "0" * 64
    gone.reference.uri = gone.reference.uri.replace(good.reference.sha256, "f" * 64)
    gone.reference.sha256 = "f" * 64
    no_size.reference.ClearField("width")
    invalid, not_found = grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND
    cases = [
        (pb.Image(), invalid), (pb.Image(content=b"no image"), invalid), (pb.Image(content=b""), invalid),
        (wrong_size, invalid), (wrong_sha, invalid), (no_size, invalid), (gone, not_found),
    ]  # fmt: skip
    for image, code in cases:
        with pytest.raises(grpc.aio.AioRpcError) as cropping:
            await zoom.Crop(zoom_pb2.CropRequest(image=image, box=BOX))
        assert cropping.value.code() is code, image
        if image is no_size or image is wrong_size:
            continue  # seen by the store, which Compare always asks: the same statuses, tested there
        with pytest.raises(grpc.aio.AioRpcError) as comparing:
            await zoom.Compare(zoom_pb2.CompareRequest(part=image, exemplar=good, view=COMPOSITE))
        assert comparing.value.code() is code, image
        # The library's fault is not the part's: the policy is told and goes on.
        answer = await zoom.Compare(zoom_pb2.CompareRequest(part=good, exemplar=image, view=COMPOSITE))
        assert answer.tool_error == "The normal image cannot be read."


async def test_the_view_must_be_said(zoom: ZoomServiceStub, store: ImageStore) -> None:
    board = stored(store, make_board())
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await zoom.Compare(zoom_pb2.CompareRequest(part=board, exemplar=board))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_it_starts_without_torch() -> None:
    """A process that draws must not carry gigabytes of a framework that it never calls."""
    code = "import sys, services.zoom.service, services.zoom.__main__; sys.exit('torch' in sys.modules)"
    assert run([sys.executable, "-c", code], check=False).returncode == 0
