"""Supervised fine-tuning: demonstrations → a published checkpoint. Run again after a kill, it goes on."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from rich.console import Console
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from agentiad.v1 import trajectory_pb2 as pb
from agentiad.v1.policy_pb2 import PolicyCard
from services.trainer import dataset, folders, heldout, publishing
from services.trainer.folders import check_checkpoint
from services.trainer.loop import Loop, append_metrics
from services.trainer.progress import progress_bar
from services.trainer.settings import SftSettings
from services.vlm import pocket
from services.vlm.card import read_card, write_card
from services.vlm.checkpoint import sha256_of
from services.vlm.render import Renderer

METRICS = "metrics.jsonl"
# Episodes whose words decide pocket's vocabulary.
_CORPUS_EPISODES = 300
_HELD_OUT_PER_CATEGORY = 50


@dataclass(frozen=True)
class Start:
    """What training begins from: a checkpoint folder, its model, its renderer."""

    folder: Path
    model: Any
    renderer: Renderer


def train(settings: SftSettings, console: Console) -> Path:
    """Trains, measures on held-out parts where it can, and returns the folder of the published checkpoint.

    Raises OccupiedError; BadInput: the base is no checkpoint.
    """
    logging.disable_progress_bar()  # it would draw over our own
    threads = settings.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    cv2.setNumThreads(1)
    torch.manual_seed(settings.seed)
    if settings.base is not None:
        check_checkpoint(settings.base)
    folders.check(settings.out, settings.identity())
    view = pb.COMPARISON_VIEW_COMPOSITE if settings.base is None else read_card(settings.base).comparison_view
    recipe = dataset.Recipe(
        settings.data, settings.samples, settings.seed, settings.single_pass, view, settings.weights
    )
    kinds = len(dataset.labels(recipe))  # data that cannot be read is refused before anything is written
    work = folders.occupy(settings.out, settings.identity())
    start = _start(settings, recipe, work, console)
    with progress_bar(console) as progress:
        bar = progress.add_task("episodes", total=recipe.samples)
        examples = dataset.build(
            recipe, start.folder, work / "examples", settings.workers or threads, lambda n: progress.advance(bar, n)
        )
    loop = Loop(settings, start.model, start.renderer, examples, kinds, work)
    if loop.resume():
        console.print(f"resumed at step {loop.step}")
    with progress_bar(console) as progress:
        bar = progress.add_task("steps", total=loop.steps, completed=loop.step)

        def on_step(metrics: dict[str, float]) -> None:
            append_metrics(work / METRICS, metrics)
            losses = " ".join(f"{name} {metrics[name]:.3f}" for name in ("loss", "pretext") if name in metrics)
            progress.update(bar, completed=loop.step, description=f"steps  {losses}")

        loop.run(on_step)
    _publish(settings, start, recipe, loop, console)
    (work / METRICS).replace(settings.out / METRICS)
    shutil.rmtree(work)
    return settings.out


def _start(settings: SftSettings, recipe: dataset.Recipe, work: Path, console: Console) -> Start:
    if settings.base is not None:
        model = AutoModelForImageTextToText.from_pretrained(settings.base, dtype=torch.float32, local_files_only=True)
        return Start(settings.base, model, Renderer.from_checkpoint(settings.base))
    folder = work / "base"
    if not folder.exists():
        console.print("reading demonstrations for the vocabulary")
        made = pocket.build(dataset.texts(recipe, min(_CORPUS_EPISODES, recipe.samples)), settings.seed)
        partial = work / "base.partial"
        made.save(partial, torch.float32)
        partial.rename(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return Start(folder, model, Renderer.from_checkpoint(folder))


def _publish(settings: SftSettings, start: Start, recipe: dataset.Recipe, loop: Loop, console: Console) -> None:
    """The trained model beside the tokenizer and image processor that it began with, and its card."""
    out = settings.out
    publishing.save(start.model, start.folder, out, torch.bfloat16)
    base = "pocket" if settings.base is None else read_card(settings.base).base_model
    card = PolicyCard(
        version=f"{base}-{sha256_of(out)[:12]}",
        base_model=base,
        categories=dataset.categories(recipe),
        training_data=[f"{recipe.data}, {recipe.samples} episodes, seed {recipe.seed}"],
        comparison_view=recipe.view,
    )
    card.quality["training_seconds"] = round(loop.seconds)
    write_card(out, card)
    if recipe.data == dataset.PROCEDURAL:
        for name, value in _measure(out, console).items():
            card.quality[name] = round(value, 4)
        write_card(out, card)


def _measure(checkpoint: Path, console: Console) -> dict[str, float]:
    cases = heldout.cases(_HELD_OUT_PER_CATEGORY, _HELD_OUT_PER_CATEGORY)
    with progress_bar(console) as progress:
        bar = progress.add_task("held-out episodes", total=2 * len(cases))
        with_tools = heldout.play_all(checkpoint, cases, done=lambda: progress.advance(bar))
        without = heldout.play_all(checkpoint, cases, heldout.NO_TOOLS, done=lambda: progress.advance(bar))
    return {
        "held_out_parts": len(cases),
        "balanced_accuracy": heldout.balanced_accuracy(with_tools),
        "balanced_accuracy_without_tools": heldout.balanced_accuracy(without),
    }
