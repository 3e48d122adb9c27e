"""`agentiad config`: every setting of every service, as the environment resolves it now."""

from __future__ import annotations

from pydantic import ValidationError
from pydantic_settings import BaseSettings
from rich.console import Console
from rich.table import Table

from services.chassis.settings import resolved


def run() -> int:
    """Exit status 2 if any service would refuse to start."""
    from services.agent.settings import AgentSettings
    from services.policy.settings import PolicySettings
    from services.retrieval.settings import RetrievalSettings
    from services.reward.settings import RewardSettings
    from services.trainer.settings import TrainerSettings
    from services.zoom.settings import ZoomSettings

    classes: dict[str, type[BaseSettings]] = {
        "policy": PolicySettings, "zoom": ZoomSettings, "retrieval": RetrievalSettings, "agent": AgentSettings,
        "reward": RewardSettings, "trainer": TrainerSettings,
    }  # fmt: skip
    table = Table("service", "setting", "value")
    wrong = 0
    for service, settings in classes.items():
        try:
            values = resolved(settings())
        except ValidationError as error:
            wrong += error.error_count()
            for item in error.errors(include_url=False, include_input=False):
                table.add_row(service, str(item["loc"][0]).upper(), f"[red]{item['msg']}[/red]")
            continue
        for name, value in values.items():
            table.add_row(service, name, value)
        table.add_section()
    Console().print(table)
    return 2 if wrong else 0
