"""`python -m services.trainer`: what `agentiad train sft` runs."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m services.trainer", description="Train a policy by demonstrations.")
    parser.add_argument("--data", default="procedural", help="'procedural', or a data set's folder or manifest")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes; run again to resume")
    parser.add_argument("--preset", choices=["pocket", "pretrained"], default="pocket")
    parser.add_argument("--base", type=Path, help="a checkpoint to go on from; without one a fresh pocket is made")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    from rich.console import Console

    from services.trainer.settings import preset
    from services.trainer.sft import train

    settings = preset(
        arguments.preset, data=arguments.data, out=arguments.out, base=arguments.base, seed=arguments.seed
    )
    train(settings, Console())


if __name__ == "__main__":
    main()
