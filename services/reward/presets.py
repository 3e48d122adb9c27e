"""The presets by their names. Pure.

A name, then the components that shall count nothing, each with a minus before it: `gated`, `paper-as-run-type`,
`gated-type-format`. The empty name is `gated`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from services.reward import gated, paper
from services.reward.reading import Behaviour, Truth

DEFAULT = "gated"


@dataclass(frozen=True)
class Preset:
    """components: of each member of a group, by name, all of `names`. probes: it asks for the verdicts that were forced
    before tool calls. tail: components that what is said after the verdict can still change. ablated: components that
    count nothing.
    """

    components: Callable[[Sequence[Behaviour], Truth], list[dict[str, float]]]
    names: tuple[str, ...]
    probes: bool = False
    tail: tuple[str, ...] = ("type",)
    ablated: frozenset[str] = frozenset()


# Names that begin with another one stand before it.
_PRESETS = {
    "gated": Preset(gated.components, gated.COMPONENTS, probes=True, tail=("box", "type")),
    "paper-as-run": Preset(paper.as_run, paper.AS_RUN),
    "paper": Preset(paper.as_written, paper.AS_WRITTEN),
}


def parse(text: str) -> Preset:
    """Raises ValueError, with what there is."""
    words = text or DEFAULT
    for name, preset in _PRESETS.items():
        if words == name or words.startswith(f"{name}-"):
            ablated = words.removeprefix(name).split("-")[1:]
            unknown = [component for component in ablated if component not in preset.names]
            if unknown:
                raise ValueError(f"{name} has no component {unknown[0]!r}, only {', '.join(preset.names)}")
            if len(set(ablated)) < len(ablated):
                raise ValueError(f"{text!r} names a component twice")
            return replace(preset, ablated=frozenset(ablated))
    raise ValueError(f"there is no reward preset {text!r}, only {', '.join(_PRESETS)}")
