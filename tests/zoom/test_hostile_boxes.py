"""Every box that a policy may get wrong is answered by a sentence for it, through the wire, and nothing dies."""

from io import BytesIO
from math import inf, nan

import pytest
from PIL import Image

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1 import zoom_pb2
from agentiad.v1.zoom_pb2_grpc import ZoomServiceStub
from services.chassis.images import ImageStore
from tests.zoom.parts import make_board, stored

NOT_FINITE, OUTSIDE, EMPTY = "not a finite number", "outside the image", "empty or reversed"
CASES = [
    ((nan, 0.1, 0.5, 0.5), NOT_FINITE),
    ((0.1, nan, 0.5, 0.5), NOT_FINITE),
    ((0.1, 0.1, nan, 0.5), NOT_FINITE),
    ((0.1, 0.1, 0.5, nan), NOT_FINITE),
    ((nan, nan, nan, nan), NOT_FINITE),
    ((inf, 0.1, 0.5, 0.5), NOT_FINITE),
    ((-inf, 0.1, 0.5, 0.5), NOT_FINITE),
    ((0.1, 0.1, inf, 0.5), NOT_FINITE),
    ((0.1, 0.1, 0.5, -inf), NOT_FINITE),
    ((-inf, -inf, inf, inf), NOT_FINITE),
    ((-0.1, 0.1, 0.5, 0.5), OUTSIDE),
    ((0.1, -1e-6, 0.5, 0.5), OUTSIDE),
    ((0.1, 0.1, 1.1, 0.5), OUTSIDE),
    ((0.1, 0.1, 0.5, 1.001), OUTSIDE),
    ((10.0, 20.0, 200.0, 300.0), OUTSIDE),  # pixels
    ((100.0, 100.0, 900.0, 900.0), OUTSIDE),  # thousandths, as some models count
    ((-2.0, -2.0, -1.0, -1.0), OUTSIDE),
    ((3e38, 3e38, 3e38, 3e38), OUTSIDE),
    ((0.5, 0.1, 0.1, 0.5), EMPTY),
    ((0.1, 0.5, 0.5, 0.1), EMPTY),
    ((1.0, 1.0, 0.0, 0.0), EMPTY),
    ((0.3, 0.3, 0.3, 0.5), EMPTY),
    ((0.3, 0.3, 0.5, 0.3), EMPTY),
    ((0.0, 0.0, 0.0, 0.0), EMPTY),  # also a box that was never set
    ((1.0, 1.0, 1.0, 1.0), EMPTY),
    ((0.5, 0.5, 0.50000001, 0.9), EMPTY),  # equal as float32
]


@pytest.mark.parametrize(("box", "says"), CASES)
async def test_a_wrong_box_is_answered(
    zoom: ZoomServiceStub,
    store: ImageStore,
    box: tuple[float, ...],
    says: str,
) -> None:
    message = pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3])
    board = stored(store, make_board())
    cropped = await zoom.Crop(zoom_pb2.CropRequest(image=board, box=message))
    assert says in cropped.tool_error
    compared = await zoom.Compare(
        zoom_pb2.CompareRequest(part=board, exemplar=board, box=message, view=pb.COMPARISON_VIEW_COMPOSITE)
    )
    assert compared.tool_error == cropped.tool_error
    # It serves the next call as if nothing had been.
    good = pb.Box(x_min=0.2, y_min=0.2, x_max=0.4, y_max=0.4)
    assert (await zoom.Crop(zoom_pb2.CropRequest(image=board, box=good))).HasField("crop")


@pytest.mark.parametrize("size", [(8, 8), (100, 100), (27, 2000)])
@pytest.mark.parametrize("box", [(0.0, 0.0, 1e-30, 1e-30), (0.9999999, 0.9999999, 1.0, 1.0)])
async def test_a_region_of_a_few_pixels_is_answered(
    zoom: ZoomServiceStub,
    size: tuple[int, int],
    box: tuple[float, ...],
) -> None:
    encoded = BytesIO()
    Image.new("RGB", size).save(encoded, "PNG")
    message = pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3])
    response = await zoom.Crop(zoom_pb2.CropRequest(image=pb.Image(content=encoded.getvalue()), box=message))
    assert "28 are needed" in response.tool_error


@pytest.mark.parametrize("box", [(0.0, 0.0, 1e-30, 1e-30), (0.9999999, 0.9999999, 1.0, 1.0), (0.0, 0.0, 1.0, 1.0)])
async def test_a_tiny_box_is_shown_with_its_padding(
    zoom: ZoomServiceStub,
    store: ImageStore,
    box: tuple[float, ...],
) -> None:
    message = pb.Box(x_min=box[0], y_min=box[1], x_max=box[2], y_max=box[3])
    response = await zoom.Crop(zoom_pb2.CropRequest(image=stored(store, make_board()), box=message))
    assert min(response.crop.image.width, response.crop.image.height) >= 224
