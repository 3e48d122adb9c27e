"""The presets of the engine `vllm`: they load as settings, fit into the GPUs that they name, and serve.

Memory is counted in GB of 10⁹ bytes, a little less than what GPUs of that name have.
"""

from __future__ import annotations

import math
import re
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from services.chassis.settings import load
from services.policy.hosts import make_engine
from services.policy.settings import PolicySettings
from tests.policy.conversations import GREEDY, opening

PRESETS = Path(__file__).parents[2] / "services" / "policy" / "presets"
GPUS = (1, 2, 4)
KEYS = {
    "ENGINE", "DEVICE", "DTYPE", "TENSOR_PARALLEL", "GPU_MEMORY_SHARE", "VERSIONS_KEPT", "MAX_CONTEXT", "MAX_IMAGES",
    "MAX_BATCH", "MAX_QUEUE", "IMAGE_CACHE_MIB", "PREFIX_CACHE_MIB",
}  # fmt: skip
# Nothing that a shell, compose or kustomize would quote or expand.
LINE = re.compile(r"([A-Z][A-Z0-9_]*)=([A-Za-z0-9._-]+)")
TINY_CONTEXT = 4096

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed here (make install-vllm)")


@dataclass(frozen=True)
class Model:
    """The public configuration of a checkpoint that a preset is for."""

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    parameters: float
    head_size: int = 128
    vision_heads: int = 16


MODELS = {
    "qwen2.5-vl-3b": Model("qwen2_5_vl", layers=36, heads=16, kv_heads=2, parameters=3.75e9),
    "qwen2.5-vl-7b": Model("qwen2_5_vl", layers=28, heads=28, kv_heads=4, parameters=8.3e9),
    "qwen3-vl-4b": Model("qwen3_vl", layers=36, heads=32, kv_heads=8, parameters=4.4e9),
    "qwen3-vl-8b": Model("qwen3_vl", layers=36, heads=32, kv_heads=8, parameters=8.8e9),
}
BFLOAT16 = 2  # bytes
# Of one engine on each GPU: activations (of an image of 16,384 tokens, too), CUDA's context and graphs, the logits.
WORKING_MEMORY = 6e9
# An episode has about so much of MAX_CONTEXT: 4 images of 640 tokens, 3 turns, the texts.
TYPICAL = 1 / 4
LARGEST_BATCH = 128
PATCHES_PER_TOKEN, LARGEST_PATCH = 4, 3 * 2 * 16 * 16 * 4  # bytes, float32


def kv_bytes(model: Model, gpus: int) -> int:
    """Of one token's keys and values, on each GPU; with more GPUs than heads, the heads are repeated."""
    return 2 * model.layers * max(1, model.kv_heads // gpus) * model.head_size * BFLOAT16


def room(model: Model, gpus: int, gpu_gb: int, share: float) -> float:
    """Bytes that an engine has for keys and values on each GPU."""
    return share * gpu_gb * 1e9 - model.parameters * BFLOAT16 / gpus - WORKING_MEMORY


def fitting_batch(model: Model, gpus: int, gpu_gb: int, share: float, max_context: int) -> int:
    """The largest power of two of typical episodes that fit; 0 where not even one of MAX_CONTEXT does."""
    tokens = room(model, gpus, gpu_gb, share) / kv_bytes(model, gpus)
    if tokens < max_context:
        return 0
    return min(LARGEST_BATCH, 1 << int(math.log2(tokens / (max_context * TYPICAL))))


def read(path: Path) -> dict[str, str]:
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    matches = [LINE.fullmatch(line) for line in lines]
    assert all(matches), [line for line, match in zip(lines, matches, strict=True) if match is None]
    pairs = [(match[1], match[2]) for match in matches if match is not None]
    assert len(dict(pairs)) == len(pairs)
    return dict(pairs)


def load_preset(path: Path, monkeypatch: pytest.MonkeyPatch) -> PolicySettings:
    """What the service makes of it, with nothing else in its environment."""
    for name in PolicySettings.model_fields:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for key, value in read(path).items():
        monkeypatch.setenv(key, value)
    return load(PolicySettings)


def split(path: Path) -> tuple[Model, int]:
    name, gpus = path.stem.rsplit("-", 1)
    return MODELS[name], int(gpus.removesuffix("gpu"))


each_preset = pytest.mark.parametrize("path", sorted(PRESETS.glob("*")), ids=lambda path: path.stem)


def test_there_is_one_for_each_model_and_number_of_gpus() -> None:
    assert {path.name for path in PRESETS.glob("*")} == {f"{name}-{gpus}gpu.env" for name in MODELS for gpus in GPUS}


@each_preset
def test_it_loads_as_settings(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = read(path)
    assert values.keys() == KEYS
    assert {key.lower() for key in values} <= PolicySettings.model_fields.keys()
    settings = load_preset(path, monkeypatch)
    assert (settings.engine, settings.device, settings.dtype) == ("vllm", "cuda", "bfloat16")
    assert settings.prefix_cache_mib > 0


@each_preset
def test_a_shell_reads_the_same(path: Path) -> None:
    script = 'set -a; . "$1"; env'
    result = subprocess.run(
        ["sh", "-c", script, "sh", str(path)], capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"}
    )
    found = dict(line.partition("=")[::2] for line in result.stdout.splitlines())
    assert read(path).items() <= found.items()


@each_preset
def test_the_model_can_be_split(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpus = split(path)
    assert load_preset(path, monkeypatch).tensor_parallel == gpus
    assert model.heads % gpus == 0
    assert model.kv_heads % gpus == 0 or gpus % model.kv_heads == 0
    assert model.vision_heads % gpus == 0


@each_preset
def test_it_fits_into_the_memory_that_it_names(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_preset(path, monkeypatch)
    model, gpus = split(path)
    header = path.read_text().splitlines()[0]
    stated = re.search(r"on (\d) GPUs? of (\d+) GB", header)
    assert stated is not None
    assert int(stated[1]) == gpus
    gpu_gb, share, context = int(stated[2]), settings.gpu_memory_share, settings.max_context

    typical = settings.max_batch * context * TYPICAL * kv_bytes(model, gpus)
    engine = model.parameters * BFLOAT16 / gpus + WORKING_MEMORY + max(typical, context * kv_bytes(model, gpus))
    assert engine <= share * gpu_gb * 1e9
    # vLLM counts an engine's CUDA context and communication outside its share: hence the tenth to spare.
    assert settings.versions_kept * share <= 0.9
    assert settings.max_batch == fitting_batch(model, gpus, gpu_gb, share, context)

    smaller = {
        int(size): int(batch or 0) for size, batch in re.findall(r"(\d+) GB: (?:MAX_BATCH=(\d+)|too small)", header)
    }
    assert smaller == {size: fitting_batch(model, gpus, size, share, context) for size in (24, 48)}


@each_preset
def test_an_episode_and_its_images_have_room(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_preset(path, monkeypatch)
    assert settings.max_context >= settings.max_images * 1280 + 8 * 512 + 2048
    images = 4 * 640 * PATCHES_PER_TOKEN * LARGEST_PATCH
    assert settings.image_cache_mib * 2**20 >= settings.max_batch * images
    assert settings.max_queue == 2 * settings.max_batch


@needs_vllm
@pytest.mark.parametrize("name", ["qwen2.5-vl-3b-4gpu", "qwen3-vl-8b-1gpu"])
async def test_a_tiny_model_is_served_on_a_cpu(
    name: str, tiny_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = PRESETS / f"{name}.env"
    preset = load_preset(path, monkeypatch)
    settings = preset.model_copy(
        update={
            "device": "cpu",
            "dtype": "float32",
            "tensor_parallel": 1,
            "max_context": TINY_CONTEXT,
            "prefix_cache_mib": min(preset.prefix_cache_mib, 256),
        }
    )
    await _answers(settings, tiny_checkpoints[split(path)[0].architecture])


@needs_vllm
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("name", ["qwen2.5-vl-3b-1gpu", "qwen3-vl-4b-1gpu"])
async def test_a_tiny_model_is_served_on_a_gpu(
    name: str, tiny_checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = PRESETS / f"{name}.env"
    settings = load_preset(path, monkeypatch).model_copy(update={"max_context": TINY_CONTEXT})
    await _answers(settings, tiny_checkpoints[split(path)[0].architecture])


async def _answers(settings: PolicySettings, checkpoint: Path) -> None:
    engine = make_engine(settings, checkpoint, "preset")
    try:
        generation = await engine.generate(opening(), GREEDY)
    finally:
        await engine.close()
    assert generation.policy_version == "preset"
    assert 0 < len(generation.token_ids) <= GREEDY.max_new_tokens
    assert all(math.isfinite(value) and value <= 0 for value in generation.log_probabilities)
