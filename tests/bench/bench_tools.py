"""What the tools cost: zoom and retrieval, in the process and through the wire.

Ratios are printed beside the times, because times alone say more about the machine than about the code.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from agentiad.v1 import retrieval_pb2, zoom_pb2
from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.retrieval_pb2_grpc import RetrievalServiceStub
from agentiad.v1.zoom_pb2_grpc import ZoomServiceStub
from services.chassis import rpc
from services.chassis.images import ImageStore
from services.retrieval import service as retrieval_service
from services.retrieval.library import ExemplarLibrary
from services.retrieval.settings import RetrievalSettings
from services.zoom import service as zoom_service
from services.zoom.compare import View, compare
from services.zoom.crop import crop
from services.zoom.registration import register
from services.zoom.settings import ZoomSettings
from tests.policy.checkpoints import make_tiny_checkpoint
from tests.retrieval.exemplars import make_reference, make_vectors
from tests.zoom.parts import make_board, make_motion, moved

BOX = (0.3, 0.4, 0.5, 0.6)
PB_BOX = pb.Box(x_min=BOX[0], y_min=BOX[1], x_max=BOX[2], y_max=BOX[3])
ROUNDS = 40


def median_ms(call: Callable[[], object], rounds: int = ROUNDS) -> float:
    """CPU time of this thread, so that a busy machine does not count."""
    taken = []
    for _ in range(rounds):
        start = time.thread_time()
        call()
        taken.append(time.thread_time() - start)
    return float(np.median(taken)) * 1e3


async def per_second(calls: Sequence[Callable[[], Awaitable[object]]], at_once: int) -> float:
    """Calls a second of wall time, `at_once` under way."""
    room = asyncio.Semaphore(at_once)

    async def one(call: Callable[[], Awaitable[object]]) -> None:
        async with room:
            await call()

    start = time.perf_counter()
    await asyncio.gather(*map(one, calls))
    return len(calls) / (time.perf_counter() - start)


def test_zoom_in_the_process() -> None:
    print("\nzoom in the process, CPU ms: register (found / not found), whole composite, its crop, plain crop")
    for side in (384, 640, 2000):
        exemplar = make_board(side=side)
        part = moved(make_board(side=side, missing=3), make_motion(side, 2.0, 1.01, (side / 80, -side / 100)), noise=3)
        found = register(part, exemplar)
        assert found.registered
        print(
            f"  {side:5}²: {median_ms(lambda: register(part, exemplar)):6.1f}"  # noqa: B023
            f" / {median_ms(lambda: register(part, make_board(9, side)), 5):.1f}"  # noqa: B023
            f" {median_ms(lambda: compare(part, exemplar, None, View.COMPOSITE, found)):8.1f}"  # noqa: B023
            f" {median_ms(lambda: compare(part, exemplar, BOX, View.COMPOSITE, found)):8.1f}"  # noqa: B023
            f" {median_ms(lambda: crop(part, BOX)):8.1f}"  # noqa: B023
        )


async def test_zoom_through_the_wire(tmp_path: Path) -> None:
    store = ImageStore([], str(tmp_path / "images"))
    address = f"unix://{tmp_path}/zoom.sock"
    pairs = []
    for seed in range(ROUNDS):
        pictures = (moved(make_board(seed, missing=3), make_motion(384, 1.0)), make_board(seed))
        part, exemplar = (pb.Image(reference=store.put(picture)) for picture in pictures)
        pairs.append((pictures, part, exemplar))
    settings = ZoomSettings(data_dir=tmp_path)
    async with (
        zoom_service.hosted(settings) as servicer,
        rpc.serve(address, [servicer]),
        rpc.channel(address) as channel,
    ):
        zoom = ZoomServiceStub(channel)
        requests = [
            zoom_pb2.CompareRequest(part=part, exemplar=exemplar, box=PB_BOX, view=pb.COMPARISON_VIEW_COMPOSITE)
            for _, part, exemplar in pairs
        ]
        first = await per_second([lambda request=request: zoom.Compare(request) for request in requests], 8)
        again = await per_second([lambda request=request: zoom.Compare(request) for request in requests], 8)
        crops = [zoom_pb2.CropRequest(image=part, box=PB_BOX) for _, part, _ in pairs]
        cropped = await per_second([lambda request=request: zoom.Crop(request) for request in crops], 8)

    async def bare(pictures: tuple[Image.Image, Image.Image]) -> None:
        await asyncio.to_thread(compare, *pictures, BOX, View.COMPOSITE)

    alone = await per_second([lambda pictures=pictures: bare(pictures) for pictures, _, _ in pairs], 8)
    print(f"\nzoom through the wire, a second, 384²: compare {first:.0f} ({first / alone:.2f} of the bare function: "
          f"it reads and writes), known pair {again:.0f} ({again / first:.1f}×), crop {cropped:.0f}")  # fmt: skip


async def test_retrieval_through_the_wire(tmp_path: Path) -> None:
    store = ImageStore([], str(tmp_path / "images"))
    address = f"unix://{tmp_path}/retrieval.sock"
    settings = RetrievalSettings(
        data_dir=tmp_path, image_store=str(tmp_path / "images"), encoder=make_tiny_checkpoint(tmp_path / "policy")
    )
    references = [store.put(make_board(seed)) for seed in range(3 * ROUNDS)]
    async with (
        retrieval_service.hosted(settings) as servicer,
        rpc.serve(address, [servicer]),
        rpc.channel(address) as channel,
    ):
        retrieval = RetrievalServiceStub(channel)
        exemplars = references[:ROUNDS]
        await retrieval.AddExemplars(retrieval_pb2.AddExemplarsRequest(category="board", images=exemplars))
        requests = [
            retrieval_pb2.QueryExemplarsRequest(image=pb.Image(reference=image), category="board", limit=1)
            for image in references[ROUNDS:]
        ]
        calls = [lambda request=request: retrieval.QueryExemplars(request) for request in requests]
        alone = await per_second(calls[:ROUNDS], 1)
        together = await per_second(calls[ROUNDS:], 32)
        known = await per_second(calls, 32)
    print(f"\nretrieval through the wire, queries a second: {alone:.0f} one by one, {together:.0f} by 32 "
          f"({together / alone:.1f}×), {known:.0f} of known images ({known / together:.1f}×)")  # fmt: skip


def test_library(tmp_path: Path) -> None:
    print("\nnearest exemplar, ms (milvus-lite, vectors of 576), and against numpy")
    for count in (100, 1_000, 10_000):
        vectors = make_vectors(count, 576)
        library = ExemplarLibrary(str(tmp_path / f"{count}.db"), "bench", 576)
        for start in range(0, count, 1000):
            some = range(start, min(start + 1000, count))
            library.add("board", [make_reference(f"n{i}") for i in some], vectors[some.start : some.stop])
        taken = []
        for vector in vectors[:ROUNDS]:
            start = time.perf_counter()
            library.nearest("board", vector, 1, "0" * 64)
            taken.append(time.perf_counter() - start)
        search = float(np.median(taken)) * 1e3
        plain = median_ms(lambda: int((vectors @ vectors[0]).argmax()))  # noqa: B023
        print(f"  {count:6}: {search:6.1f} ({search / plain:.0f}×)")
        library.close()
