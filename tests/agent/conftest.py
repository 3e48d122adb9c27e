"""A whole embedded stack with the shipped policy, and parts to inspect."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from services.cli.inspect import add_exemplars
from services.cli.stack import Stack, embedded
from services.data.procedural import write_set
from services.data.readers import Sample, read


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Two parts and two exemplars a category, on disk."""
    return read(write_set(tmp_path_factory.mktemp("parts"), per_category=2, variants_per_category=2))


@pytest.fixture(scope="session")
def root(samples: list[Sample]) -> Path:
    """The allowed root that the parts lie under."""
    return samples[0].image.parents[3]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stack(tmp_path_factory: pytest.TempPathFactory, samples: list[Sample], root: Path) -> AsyncIterator[Stack]:
    async with embedded(tmp_path_factory.mktemp("stack"), [root], None) as made:
        for category in {sample.category for sample in samples}:
            normals = [s.image for s in samples if s.split == "train" and s.category == category]
            await add_exemplars(made, category, normals)
        yield made


@pytest.fixture
def part(samples: list[Sample]) -> Sample:
    """One whose episode has more than one turn: a layout category, where the policy compares before it answers."""
    return next(sample for sample in samples if sample.split != "train" and sample.category == "pin_board")
