"""Settings come from the environment only, each field under its own name in capitals (`data_dir` is DATA_DIR).

A service's settings class takes the mixins that it needs and adds its own fields. An empty variable counts as unset.
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict, SettingsError

from services.chassis.locations import parse_root

# sockaddr_un.sun_path holds 108 bytes, the closing zero included.
_MAX_SOCKET_PATH = 107
_HOST_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):(\d{1,5})")


def _address(value: str) -> str:
    """unix:PATH, unix:///PATH or host:port. ValueError says what is wrong."""
    if value.startswith("unix:"):
        path = value.removeprefix("unix:").removeprefix("//")
        if not path:
            raise ValueError("the path of the unix socket is missing (unix:///run/agentiad/zoom.sock)")
        if len(path.encode()) > _MAX_SOCKET_PATH:
            raise ValueError(
                f"the path of a unix socket can be {_MAX_SOCKET_PATH} bytes long, this one has more: {path}"
            )
        return value
    match = _HOST_PORT.fullmatch(value)
    if match is None:
        raise ValueError(f"must be unix:///PATH or host:port, not {value!r}")
    if int(match[2]) > 65535:
        raise ValueError(f"a port is at most 65535, not {match[2]}")
    return value


Address = Annotated[str, AfterValidator(_address)]
"""Where a service listens or is called: unix:///PATH or host:port."""


class ChassisSettings(BaseSettings):
    """What every process has."""

    model_config = SettingsConfigDict(frozen=True, env_ignore_empty=True, extra="ignore")

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    data_dir: Path = Path("out")  # what the process keeps on this machine: the embedded bus, the library, logs


class RpcSettings(ChassisSettings):
    """For processes that serve gRPC. Services set their own default port."""

    bind: Address = "127.0.0.1:50050"  # port 0: any free one
    max_concurrent_rpcs: int = Field(default=256, ge=1)
    grace_s: float = Field(default=10.0, ge=0)  # for calls under way when the process is told to stop


class ImageSettings(ChassisSettings):
    """For processes that open images."""

    image_roots: Annotated[tuple[str, ...], NoDecode] = ()  # folders and URIs, separated by commas (or ':', like PATH)
    image_store: str | None = None  # where new images are written; an allowed root as well
    image_max_bytes: int = Field(default=128 * 2**20, ge=1)
    image_max_pixels: int = Field(default=2**26, ge=1, le=89_478_485)  # the end of it is Pillow's own

    @field_validator("image_roots", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        # A colon separates only before a path: the one in s3:// does not.
        return tuple(part.strip() for part in re.split(r",|:(?=/(?!/))", value) if part.strip())

    @field_validator("image_roots", "image_store")
    @classmethod
    def _known_roots(cls, value: tuple[str, ...] | str | None) -> tuple[str, ...] | str | None:
        for root in (value,) if isinstance(value, str) else value or ():
            parse_root(root)
        return value


class BusSettings(ChassisSettings):
    """For processes that publish or consume. Without Kafka the bus is a SQLite log in data_dir."""

    kafka_bootstrap_servers: str = ""  # host:port,host:port; empty: the embedded bus
    kafka_group_instance_id: str = ""  # a stateful pod's name: after a restart it finds its partitions again

    @field_validator("kafka_bootstrap_servers")
    @classmethod
    def _hosts(cls, value: str) -> str:
        for server in filter(None, value.split(",")):
            if _HOST_PORT.fullmatch(server.strip()) is None:
                raise ValueError(f"must be host:port[,host:port…], not {server!r}")
        return value


class RedisSettings(ChassisSettings):
    """For processes that keep records in Redis."""

    redis_url: SecretStr = SecretStr("redis://127.0.0.1:6379/0")  # may hold a password

    @field_validator("redis_url")
    @classmethod
    def _redis_url(cls, value: SecretStr) -> SecretStr:
        if urlsplit(value.get_secret_value()).scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("must be redis://HOST:PORT/DB, rediss://… or unix://PATH")
        return value


S = TypeVar("S", bound=BaseSettings)


def load(cls: type[S]) -> S:
    """The settings of the environment. If some are wrong: a line each on stderr ("NAME: what is wrong"), exit 2."""
    try:
        return cls()
    except ValidationError as error:
        problems = [
            f"{str(item['loc'][0] if item['loc'] else 'settings').upper()}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_url=False, include_input=False)
        ]
    except SettingsError as error:
        problems = [str(error)]
    print("\n".join(problems), file=sys.stderr)
    sys.exit(2)


def resolved(settings: BaseSettings) -> dict[str, str]:
    """Every setting by its environment name, as `agentiad config` prints it: secrets masked."""
    return {name.upper(): _printable(value) for name, value in settings}


def _printable(value: Any) -> str:
    if isinstance(value, SecretStr):
        return _masked(value.get_secret_value())
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return "" if value is None else str(value)


def _masked(secret: str) -> str:
    """Of a URL, host and database; of anything else, nothing."""
    try:
        parts = urlsplit(secret)
        host = parts.netloc.rpartition("@")[2]
    except ValueError:
        return "******"
    if not parts.scheme or "://" not in secret:
        return "******"
    user = "******@" if "@" in parts.netloc else ""
    return f"{parts.scheme}://{user}{host}{parts.path}"
