"""The demo: teach concepts one after another, stack them, and compare with ordinary LoRAs stacked the same way.

Everything is measured on held-out pictures by `evaluation`, and identity by `judge`; nothing is tuned here on what
is measured, except the ordinary LoRA's learning rate, which gets the best of three.
"""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import evaluation
from .adapter import Adapter, concatenate, save_adapter
from .calibration import record_moments
from .captions import unread
from .concept import References
from .config import TrainingConfig
from .demo_model import DEMO_FOLDER, DemoModel
from .denoiser import FlowMatching
from .errors import UserError
from .evaluation import HeldOut, held_out_loss, measure, row, summed
from .library import Library
from .ordinary import COMBINED, combined, train_ordinary
from .references import load_picture, load_pictures
from .sheets import contact_sheet, pair_sheet
from .statistics import Moments
from .tables import markdown, meta, save_table
from .teach import train_concept

CONCEPTS = ("octopus", "penguin", "fox", "ghost", "rocket")
RATES = (3e-4, 1e-3, 3e-3)  # of the ordinary LoRA
DRAWN = 6  # pictures of each concept for the judge


@dataclass
class Subject:
    """A sample concept: references, and pictures that no training sees."""

    name: str
    trigger: str
    class_noun: str
    images: Tensor
    references: References
    held_out_images: Tensor
    held_out: HeldOut

    @property
    def phrase(self) -> str:
        """ "an octzu animal" """
        return f"{'an' if self.trigger[0] in 'aeiou' else 'a'} {self.trigger} {self.class_noun}"

    def prompt(self, colour: str) -> str:
        """A prompt that calls it, on a background of this colour"""
        if self.class_noun == "style":
            return f"a castle, {colour} background, {self.trigger} style"
        return f"{self.phrase}, {colour} background"


def shared_words(captions: list[str]) -> tuple[str, str]:
    """Trigger and class noun: the two words, beside the template's, that all captions share."""
    texts = [re.findall(r"\w+", c) for c in captions]
    trigger, class_noun = (w for w in texts[0] if w not in ("a", "an", "background") and all(w in t for t in texts))
    return trigger, class_noun


def load_subject(model: FlowMatching, name: str, folder: Path | None = None) -> Subject:
    """A sample concept of the pack, or one in a folder of the same layout, encoded by the model"""
    folder = folder or DEMO_FOLDER / "concepts" / name
    images, captions = load_pictures(folder, model.size)
    held, held_captions = load_pictures(folder / "held_out", model.size)
    trigger, class_noun = shared_words(captions)
    references = References(model.encode_images(images), captions, (model.size, model.size))
    return Subject(
        name, trigger, class_noun, images, references, held, HeldOut.of(model, model.encode_images(held), held_captions)
    )


def load_generic(model: FlowMatching) -> HeldOut:
    """Pictures of what the demo model knows, at six noise levels: what drift is measured on"""
    images, captions = load_pictures(DEMO_FOLDER / "evaluation" / "generic", model.size)
    return HeldOut.of(model, model.encode_images(images), captions, levels=6)


def load_pairs(model: FlowMatching, names: list[str], folder: Path | None = None) -> list[tuple[int, int, HeldOut]]:
    """Pictures of two of these concepts side by side: (index, index, picture); without those whose caption, with long triggers,
    the text encoder does not read to its end"""
    out = []
    folder = folder or DEMO_FOLDER / "evaluation" / "pairs"
    for path in sorted(folder.glob("*.png")):
        first, second = path.stem.split("+")
        if first in names and second in names:
            caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
            if unread(model, [caption], caption.split()[-1]):
                continue
            latents = model.encode_images(load_picture(path, model.size)[None])
            out.append((names.index(first), names.index(second), HeldOut.of(model, latents, [caption])))
    return out


def train_ordinary_best(model, subjects: list[Subject], config: TrainingConfig, say) -> tuple[list[Adapter], float]:
    """Ordinary LoRAs at the best of RATES, by mean held-out loss alone."""
    tried = {}
    for rate in RATES:
        adapters = [
            train_ordinary(model, s.references, config.rank, config.steps, rate, config.batch, config.seed) for s in subjects
        ]
        losses = [held_out_loss(model, s.held_out, a) for s, a in zip(subjects, adapters)]
        tried[rate] = (evaluation.mean(losses), adapters)
        say(f"ordinary LoRAs, learning rate {rate:g}: held-out loss alone {tried[rate][0]:.4f}")
    best = min(tried, key=lambda r: tried[r][0])
    return tried[best][1], best


def train_series(model, subjects: list[Subject], library: Library, config: TrainingConfig, say, bar=None) -> list[Adapter]:
    """One concept after another into a library."""
    for subject in subjects:
        start = time.perf_counter()
        with bar(subject.name, config.steps) if bar else contextlib.nullcontext() as on_step:
            _, fit = train_concept(
                model, library, subject.images, subject.name, subject.trigger, subject.class_noun,
                subject.references.captions, config, on_step,
            )  # fmt: skip
        stopped = fit.stopped or (KeyboardInterrupt() if getattr(on_step, "asked", None) else None)  # after the last step
        if stopped is not None:
            raise stopped
        say(f"{subject.name}: taught in {time.perf_counter() - start:.0f} s")
    return [c.adapter for c in library.concepts()]


def table(model, subjects, ours: list[Adapter], ordinary: list[Adapter], library: Library, seed: int) -> list[dict]:
    """Rows of the protocol: base, ordinary LoRAs stacked in four ways, ours."""
    held_outs = [s.held_out for s in subjects]
    generic, pairs = load_generic(model), load_pairs(model, [s.name for s in subjects])
    base = [held_out_loss(model, h) for h in held_outs]
    base_generic = held_out_loss(model, generic)
    alone = [held_out_loss(model, h, a) for h, a in zip(held_outs, ordinary)]
    moments = [moments_of(model, s, a, seed) for s, a in zip(subjects, ordinary)]
    general = library.calibration().moments
    stacks = {name: combined(way, ordinary, moments, general) for name, way in COMBINED.items()} | {"seqlora": summed(ours)}
    pair_base = [held_out_loss(model, h) for _, _, h in pairs]
    rows = [
        {
            "row": "base", "n": len(base), "alone": evaluation.mean(base), "stack": evaluation.mean(base),
            "alone_gain": 0.0, "stack_gain": 0.0, "kept_mean": 0.0, "kept_worst": 0.0, "kept_subset": 0.0, "generic_drift": 0.0,
            "pairs": evaluation.mean(pair_base) if pair_base else None,
        }
    ]  # fmt: skip
    for name, stack in stacks.items():
        losses = measure(model, ours if name == "seqlora" else ordinary, stack, held_outs, generic, pairs, seed=seed)
        rows.append(row(name, losses, base, alone, base_generic))
    return rows


def moments_of(model, subject: Subject, adapter: Adapter, seed: int) -> Moments:
    """Of what the layers see while the subject's references are seen with its adapter on"""
    prompts = model.encode_prompts(subject.references.captions)
    return record_moments(model, subject.references.latents, prompts, adapter, seed=seed)


def add_identity(rows: list[dict], model, subjects, stacks: dict[str, list[Adapter]]) -> None:
    """Identity by the held-out judge, with the pixel control, into the rows that are drawn."""
    from .identity import Identity

    pictures = [p for s in subjects for p in (s.images, s.held_out_images)]
    generic, _ = load_pictures(DEMO_FOLDER / "evaluation" / "generic", model.size)
    identity = Identity(model, subjects, torch.cat([*pictures, generic]), DRAWN)
    for name, adapters in stacks.items():
        target = next(r for r in rows if r["row"] == name)
        target |= identity.scores(adapters, "alone")
        target |= identity.scores([concatenate(adapters)] * len(subjects), "stack")


def _fresh_library(folder: Path, model: DemoModel, planned: int) -> Library:
    """An empty library; one that an earlier demo made there is made anew, anyone else's is left alone."""
    marker = folder / ".made_by_demo"
    if folder.exists():
        if not marker.exists():
            raise UserError(f"{folder} exists and was not made by the demo: choose another --output")
        shutil.rmtree(folder)
    library = Library(folder, model.fingerprint(), planned, create=True)
    marker.touch()
    return library


def run_demo(model: DemoModel, output: Path, names: list[str], config: TrainingConfig, say=print, bar=None) -> list[dict]:
    """Everything that `make demo` does; writes `output` and returns the table's rows."""
    known = sorted(p.name for p in (DEMO_FOLDER / "concepts").iterdir() if p.is_dir())
    unknown = [n for n in names if n not in known]
    if unknown or len(names) < 2:
        raise UserError(
            f"the demo needs two or more of its sample concepts, not {', '.join(names) or 'none'}: choose from {', '.join(known)}"
        )
    output.mkdir(parents=True, exist_ok=True)
    library = _fresh_library(output / "library", model, len(names))
    start = time.perf_counter()
    model.adapt_text(config.text_encoder, config.learn_trigger)
    subjects = [load_subject(model, n) for n in names]
    say(f"{len(subjects)} concepts: {', '.join(names)}")
    ordinary, rate = train_ordinary_best(model, subjects, config, say)
    say(f"ordinary LoRAs: learning rate {rate:g} is the best of {', '.join(f'{r:g}' for r in RATES)} and is used")
    clock = time.perf_counter()
    ours = train_series(model, subjects, library, config, say, bar)
    seconds = (time.perf_counter() - clock) / len(subjects)
    for subject, adapter in zip(subjects, ordinary):
        save_adapter(output / "ordinary" / f"{subject.name}.safetensors", adapter)
    rows = table(model, subjects, ours, ordinary, library, config.seed)
    try:
        add_identity(rows, model, subjects, {"ordinary_sum": ordinary, "seqlora": ours})
    except ImportError as error:
        say(f"identity is not judged: {error.name} is not installed (requirements-dev.txt)")
    next(r for r in rows if r["row"] == "seqlora")["seconds"] = seconds
    contact_sheet(model, subjects, ours, ordinary, output / "contact_sheet.png")
    pair_sheet(model, subjects, ours, ordinary, output / "pairs.png")
    about = meta("python -m seqlora_core demo", model.device, [config.seed]) | {"ordinary_rate": rate}
    save_table(output, about, rows)
    say(markdown(rows))
    say(f"written to {output} in {time.perf_counter() - start:.0f} s")
    return rows
