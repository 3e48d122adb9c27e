"""What the tools are worth: pocket as it ships against one of the same size, trained to answer after a single look.

    python -m tests.bench.bench_single_pass DIR     (half as long as the training of pocket; not part of `make bench`)

Both see the same parts, as often. Also without the Comparative Retriever: pocket whose queries find no exemplar.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from services.data.layouts import LAYOUTS
from services.trainer import heldout
from services.trainer.settings import preset
from services.trainer.sft import train
from services.vlm import pocket

SHIPPED = Path(pocket.__file__).parent / "checkpoints" / "pocket"
PER_CATEGORY = 100
# As many as pocket's own training takes.
EPOCHS = 2.0


def main(folder: Path) -> None:
    console = Console()
    single = train(preset("pocket", out=folder / "single_pass", single_pass=True, epochs=EPOCHS), console)
    cases = heldout.cases(PER_CATEGORY, PER_CATEGORY)
    alone = [heldout.Case(case.part, None) for case in cases]
    report(console, "pocket, with its tools", heldout.play_all(SHIPPED, cases))
    report(console, "pocket, no exemplars to compare with", heldout.play_all(SHIPPED, alone))
    report(console, "pocket, verdict forced on the first look", heldout.play_all(SHIPPED, cases, heldout.NO_TOOLS))
    report(console, "trained single-pass", heldout.play_all(single, cases))


def report(console: Console, name: str, outcomes: Sequence[heldout.Outcome]) -> None:
    """Balanced accuracy over all, over textures, and over defects that only a comparison shows."""
    layouts = [outcome for outcome in outcomes if outcome.part.category in LAYOUTS]
    textures = [outcome for outcome in outcomes if outcome.part.category not in LAYOUTS]
    figures = [heldout.balanced_accuracy(group) for group in (outcomes, textures, layouts)]
    console.print(f"{name}: {figures[0]:.3f} (textures {figures[1]:.3f}, comparison-only {figures[2]:.3f})")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
