"""The edge of zoom: from messages to drawings and back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import cv2
import grpc

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1 import zoom_pb2, zoom_pb2_grpc
from services.chassis.errors import BadInput
from services.chassis.images import make_image_store
from services.chassis.rpc import Servicer
from services.zoom.compare import View
from services.zoom.crop import ToolError
from services.zoom.drawing import Drawing, Drawn
from services.zoom.settings import ZoomSettings

_VIEWS = {
    pb.COMPARISON_VIEW_SIDE_BY_SIDE: View.SIDE_BY_SIDE,
    pb.COMPARISON_VIEW_COMPOSITE: View.COMPOSITE,
}
Context = grpc.aio.ServicerContext[Any, Any]


class ZoomService(zoom_pb2_grpc.ZoomServiceServicer):
    """A box that the policy got wrong is an answer, not a status."""

    def __init__(self, drawing: Drawing) -> None:
        self._drawing = drawing

    async def Crop(self, request: zoom_pb2.CropRequest, context: Context) -> zoom_pb2.CropResponse:  # noqa: N802
        try:
            drawn = await asyncio.to_thread(self._drawing.crop, request.image, _box(request.box))
        except ToolError as error:
            return zoom_pb2.CropResponse(tool_error=str(error))
        return zoom_pb2.CropResponse(crop=_rendered(drawn))

    async def Compare(self, request: zoom_pb2.CompareRequest, context: Context) -> zoom_pb2.CompareResponse:  # noqa: N802
        if request.view not in _VIEWS:
            raise BadInput("view must be COMPARISON_VIEW_SIDE_BY_SIDE or COMPARISON_VIEW_COMPOSITE")
        box = _box(request.box) if request.HasField("box") else None
        try:
            drawn, registration = await asyncio.to_thread(
                self._drawing.compare, request.part, request.exemplar, box, _VIEWS[request.view]
            )
        except ToolError as error:
            return zoom_pb2.CompareResponse(tool_error=str(error))
        return zoom_pb2.CompareResponse(
            comparison=_rendered(drawn),
            registration_confidence=registration.confidence,
            registered=registration.registered,
        )


@asynccontextmanager
async def hosted(settings: ZoomSettings) -> AsyncIterator[Servicer]:
    """What `rpc.serve` takes."""
    # Calls run side by side already; OpenCV's own threads would only fight over the cores.
    cv2.setNumThreads(1)
    service = ZoomService(Drawing(make_image_store(settings), settings.registrations_kept))
    name = zoom_pb2.DESCRIPTOR.services_by_name["ZoomService"].full_name
    yield zoom_pb2_grpc.add_ZoomServiceServicer_to_server, service, name


def _box(box: pb.Box) -> tuple[float, float, float, float]:
    return box.x_min, box.y_min, box.x_max, box.y_max


def _rendered(drawn: Drawn) -> zoom_pb2.RenderedRegion:
    x_min, y_min, x_max, y_max = drawn.region
    box = pb.Box(x_min=x_min, y_min=y_min, x_max=x_max, y_max=y_max)
    return zoom_pb2.RenderedRegion(image=drawn.image, region=box)
