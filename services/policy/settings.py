"""What the policy service is told at its start."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator
from pydantic_settings import NoDecode

from services.chassis.settings import Address, BusSettings, ImageSettings, RpcSettings

_POCKET = Path(__file__).parents[1] / "vlm" / "checkpoints" / "pocket"


class EngineSettings(ImageSettings):
    """How an engine runs, wherever it is hosted. Triton's model gets them as the parameters of its configuration."""

    engine: Literal["transformers", "vllm"] = "transformers"  # vllm: in an environment of its own (make install-vllm)
    device: str = "cpu"  # a torch device
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"  # auto: the faster one of a timed matmul
    torch_threads: int = Field(default=0, ge=0)  # on a CPU; 0: torch's own choice, and all cores for vllm
    max_batch: int = Field(default=32, ge=1)  # requests that grow side by side
    max_queue: int = Field(default=256, ge=0)  # requests that wait beyond them; more are refused
    max_context: int = Field(default=0, ge=0)  # tokens of prompt and reply together; 0: the model's own limit
    # Keys and values of earlier turns; 0: none. On a GPU vllm takes what gpu_memory_share leaves.
    prefix_cache_mib: int = Field(default=512, ge=0)
    max_images: int = Field(default=12, ge=1)  # in one prompt; vllm only
    image_cache_mib: int = Field(default=256, ge=0)  # preprocessed images of earlier turns; vllm only
    tensor_parallel: int = Field(default=1, ge=1)  # GPUs that share one model; vllm only
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)  # of a GPU, for weights, keys and values; vllm only


class PolicySettings(EngineSettings, RpcSettings, BusSettings):
    bind: Address = "127.0.0.1:50051"
    policy_name: str = "policy"  # whose published versions take over
    checkpoint: str = str(_POCKET)  # the version to begin with: a folder or its URI
    checkpoint_roots: Annotated[tuple[str, ...], NoDecode] = ()  # folders whose checkpoints may be loaded later
    engine_host: Literal["in_process", "triton"] = "in_process"
    triton_url: str = (
        "127.0.0.1:8001"  # Triton's gRPC port; it must see the checkpoints and images under the same paths
    )
    versions_kept: int = Field(default=3, ge=1)  # loaded at once; the oldest goes first
    version_idle_s: float = Field(default=120.0, ge=0)  # a replaced version waits so long for its episodes' next turns

    @field_validator("checkpoint", mode="before")
    @classmethod
    def _folder(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("checkpoint_roots", mode="before")
    @classmethod
    def _split_roots(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value
