"""Settings: from the environment, every problem at once, secrets masked."""

import pytest
from pydantic import SecretStr

from services.chassis.settings import (
    Address,
    BusSettings,
    ChassisSettings,
    ImageSettings,
    RedisSettings,
    RpcSettings,
    load,
    resolved,
)


class Everything(RpcSettings, ImageSettings, BusSettings, RedisSettings):
    zoom_address: Address = "127.0.0.1:50051"
    token: SecretStr = SecretStr("")


@pytest.fixture(autouse=True)
def _empty_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Everything.model_fields:
        monkeypatch.delenv(name.upper(), raising=False)


def test_defaults_are_right() -> None:
    settings = load(Everything)
    assert settings.image_roots == ()
    assert settings.image_store is None
    assert settings.kafka_bootstrap_servers == ""


def test_an_empty_variable_is_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Everything.model_fields:
        monkeypatch.setenv(name.upper(), "")
    assert load(Everything) == Everything()


WRONG = {
    "LOG_LEVEL": ("loud", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
    "BIND": ("somewhere", "must be unix:///PATH or host:port"),
    "MAX_CONCURRENT_RPCS": ("many", "valid integer"),
    "GRACE_S": ("-1", "greater than or equal to 0"),
    "IMAGE_ROOTS": ("/data,nosuch://bucket", "nosuch://bucket cannot be used"),
    "IMAGE_STORE": ("file://elsewhere/out", "names no host"),
    "IMAGE_MAX_PIXELS": ("999999999999", "less than or equal to 89478485"),
    "KAFKA_BOOTSTRAP_SERVERS": ("kafka:9092,broker", "must be host:port"),
    "REDIS_URL": ("http://user:hunter2@host", "must be redis://"),
    "ZOOM_ADDRESS": ("host:99999", "at most 65535"),
}


def test_every_problem_is_told_at_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, (value, _) in WRONG.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as raised:
        load(Everything)
    assert raised.value.code == 2
    told = capsys.readouterr()
    assert told.out == ""
    lines = dict(line.split(": ", 1) for line in told.err.splitlines())
    assert set(lines) == set(WRONG)
    for name, (_, fragment) in WRONG.items():
        assert fragment in lines[name]
    assert "hunter2" not in told.err


@pytest.mark.parametrize(
    "value", ["unix:///run/a.sock", "unix:a.sock", "127.0.0.1:0", "zoom:50051", "zoom.plant-1.svc:50051", "[::1]:50051"]
)
def test_good_addresses(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIND", value)
    assert load(RpcSettings).bind == value


@pytest.mark.parametrize(
    "value",
    ["unix:", "unix://", "unix:///" + "x" * 107, "50051", ":50051", "http://zoom:50051", "zoom:", "zoom:x", "a b:1"],
)
def test_bad_addresses(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BIND", value)
    with pytest.raises(SystemExit):
        load(RpcSettings)


@pytest.mark.parametrize(
    ("value", "roots"),
    [
        ("/a", ("/a",)),
        ("/a,/b", ("/a", "/b")),
        ("/a:/b", ("/a", "/b")),
        (" /a , memory://b/c,", ("/a", "memory://b/c")),
        ("memory://a:/b", ("memory://a", "/b")),
        ("file:///a:file:///b", ("file:///a:file:///b",)),
        ("relative/folder", ("relative/folder",)),
    ],
)
def test_image_roots(value: str, roots: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGE_ROOTS", value)
    assert load(ImageSettings).image_roots == roots


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        ChassisSettings().log_level = "DEBUG"


@pytest.mark.parametrize(
    ("secret", "printed"),
    [
        ("redis://:hunter2@redis:6379/0", "redis://******@redis:6379/0"),
        ("rediss://user:hunter2@redis:6379", "rediss://******@redis:6379"),
        ("redis://redis:6379/0?password=hunter2", "redis://redis:6379/0"),
        ("unix:///run/redis.sock", "unix:///run/redis.sock"),
    ],
)
def test_redis_url_is_printed_without_its_password(secret: str, printed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REDIS_URL", secret)
    settings = load(Everything)
    assert settings.redis_url.get_secret_value() == secret
    assert resolved(settings)["REDIS_URL"] == printed
    assert "hunter2" not in repr(settings)


def test_resolved_prints_every_field_and_no_secret() -> None:
    shown = resolved(Everything(token=SecretStr("hunter2"), image_roots=("/a", "/b")))
    assert set(shown) == {name.upper() for name in Everything.model_fields}
    assert shown["TOKEN"] == "******"
    assert shown["IMAGE_ROOTS"] == "/a,/b"
    assert shown["IMAGE_STORE"] == ""
