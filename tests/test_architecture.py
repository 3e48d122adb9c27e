"""The arrows of the design, read from the imports: services stand on chassis and vlm and never on each other."""

import ast
from pathlib import Path

import pytest

SERVICES = Path(__file__).parents[1] / "services"
SHARED = {"chassis", "vlm"}
JOBS = {"data", "evaluation", "trainer"}
ROOT = "cli"
PACKAGES = sorted(path.name for path in SERVICES.iterdir() if (path / "__init__.py").exists())
RUNNING = sorted(set(PACKAGES) - SHARED - JOBS - {ROOT})
# What a pure module must not know.
WIRE = {"grpc", "kafka", "redis", "tritonclient", "pymilvus"}


def imported(path: Path) -> set[str]:
    """Every module that the file imports, at its top or inside a function."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def packages_used(package: str) -> set[str]:
    used = set()
    for path in (SERVICES / package).rglob("*.py"):
        used |= {name.split(".")[1] for name in imported(path) if name.startswith("services.")}
    return used - {package}


@pytest.mark.parametrize("package", PACKAGES)
def test_arrows_point_one_way(package: str) -> None:
    if package in SHARED:
        allowed = SHARED - {package} if package == "vlm" else set()
    elif package == ROOT:
        allowed = set(PACKAGES)
    elif package in JOBS:
        allowed = set(PACKAGES) - {ROOT}
    else:
        allowed = SHARED
    assert packages_used(package) <= allowed


@pytest.mark.parametrize("package", RUNNING)
def test_every_service_has_the_same_rooms(package: str) -> None:
    rooms = {path.name for path in (SERVICES / package).iterdir()}
    assert {"__main__.py", "settings.py", "service.py"} <= rooms


@pytest.mark.parametrize(
    "module",
    ["agent/protocol.py", "agent/episode.py", "agent/inspection.py", "zoom/crop.py", "zoom/compare.py",
     "zoom/registration.py", "evaluation/metrics.py", "evaluation/gate.py", "cli/evidence.py", "trainer/advantage.py",
     "trainer/groups.py", "trainer/losses.py", "trainer/rollout_metrics.py", "reward/boxes.py", "reward/gated.py",
     "reward/groups.py", "reward/naming.py", "reward/paper.py", "reward/presets.py", "reward/reading.py",
     "reward/scoring.py"],
)  # fmt: skip
def test_pure_modules_know_no_wire(module: str) -> None:
    assert not {name.split(".")[0] for name in imported(SERVICES / module)} & WIRE


@pytest.mark.parametrize("service", ["agent", "reward", "zoom"])
def test_services_without_a_model_carry_no_torch(service: str) -> None:
    used = {name.split(".")[0] for path in (SERVICES / service).rglob("*.py") for name in imported(path)}
    assert not used & {"torch", "transformers"}
    assert "vlm" not in packages_used(service)
