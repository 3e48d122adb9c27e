from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.chassis.errors import BadInput
from services.policy.hosts import InProcessHost, choose_dtype, make_host
from services.policy.settings import EngineSettings, PolicySettings
from services.policy.triton_host import TritonHost
from tests.policy.conversations import GREEDY, opening


@pytest.mark.parametrize(
    ("name", "possible"),
    [
        ("float32", {torch.float32}),
        ("bfloat16", {torch.bfloat16}),
        ("auto", {torch.float32, torch.bfloat16}),
    ],
)
def test_the_number_format_is_asked_for_or_measured(name: str, possible: set[torch.dtype]) -> None:
    assert choose_dtype(name) in possible


async def test_half_precision_runs_and_reuses_prefixes(tiny_checkpoint: Path) -> None:
    engine = await InProcessHost(EngineSettings(dtype="bfloat16")).open(tiny_checkpoint, "")
    first = await engine.generate(opening(), GREEDY)
    again = await engine.generate(opening(), GREEDY)
    assert again.token_ids == first.token_ids
    assert again.cached_tokens == again.prompt_tokens - 1
    await engine.close()


async def test_the_version_is_the_cards_unless_another_is_given(tiny_checkpoint: Path) -> None:
    host = InProcessHost(EngineSettings())
    by_card, by_name = await host.open(tiny_checkpoint, ""), await host.open(tiny_checkpoint, "v7")
    assert (by_card.card.version, by_name.card.version) == ("tiny-1", "v7")
    await by_card.close()
    await by_name.close()


async def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    host = InProcessHost(EngineSettings())
    for content in (None, "{}", '{"model_type": "llama"}', '{"model_type": "unheard_of"}', "not json"):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(BadInput, match="cannot be loaded"):
            await host.open(tmp_path, "")


async def test_the_settings_name_the_host() -> None:
    assert isinstance(make_host(PolicySettings(engine_host="in_process")), InProcessHost)
    host = make_host(PolicySettings(engine_host="triton", triton_url="127.0.0.1:1"))
    assert isinstance(host, TritonHost)
    await host.close()
