"""What the retrieval service is told at its start."""

from pathlib import Path
from urllib.parse import urlsplit

from pydantic import DirectoryPath, Field, SecretStr, field_validator

from services.chassis.settings import Address, ImageSettings, RpcSettings

POCKET = Path(__file__).parents[1] / "vlm" / "checkpoints" / "pocket"


class RetrievalSettings(RpcSettings, ImageSettings):
    bind: Address = "127.0.0.1:50053"
    # http(s)://HOST:PORT of a Milvus server or cluster, or PATH.db: the library in this process (milvus-lite).
    milvus_uri: str = Field(default_factory=lambda data: str(data["data_dir"] / "exemplars.db"))
    milvus_token: SecretStr = SecretStr("")  # USER:PASSWORD or an API key
    encoder: DirectoryPath = POCKET  # folder of a policy, or of any transformers vision model
    max_queued: int = Field(default=64, ge=1)  # images that wait for the encoder; more are refused

    @field_validator("milvus_uri")
    @classmethod
    def _place(cls, value: str) -> str:
        parts = urlsplit(value)
        if not value.endswith(".db") and not (parts.scheme in {"http", "https"} and parts.hostname):
            raise ValueError(f"must be http://HOST:PORT, https://… or a path that ends in .db, not {value!r}")
        return value
