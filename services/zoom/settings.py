"""What the zoom service is told at its start."""

from pydantic import Field

from services.chassis.settings import Address, ImageSettings, RpcSettings


class ZoomSettings(RpcSettings, ImageSettings):
    bind: Address = "127.0.0.1:50052"
    image_store: str = Field(default_factory=lambda data: str(data["data_dir"] / "images"))
    registrations_kept: int = Field(
        default=4096, ge=0
    )  # pairs of images whose registration is remembered; 200 bytes each
