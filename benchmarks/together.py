"""Two and three concepts in one picture: docs/results/together.json and docs/images/together.png.

    python -m benchmarks.together

Ten concepts of the final set, as `benchmarks.method` trains them (and from its cache where it has).  Pictures are composed of
poses that no training saw; three side by side is a layout that the demo model never saw at all.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from benchmarks import concepts
from benchmarks.method import ROOT, Bench, given_rates
from demo import make_concepts, scenes
from demo.judge_base import Finder, to_tensor
from seqlora_core.adapter import Adapter
from seqlora_core.config import TrainingConfig
from seqlora_core.evaluation import HeldOut, Stack, held_out_loss, mean
from seqlora_core.judge import Judge
from seqlora_core.labelled import labelled_grid
from seqlora_core.preview import draw_with
from seqlora_core.storage import written_aside
from seqlora_core.tables import meta

RIVALS = ("ordinary_sum", "ordinary_norm", "closed_form")
OURS = "seqlora_learnt_trigger"
# of so many subjects: their width in pixels, and how many groups of ten neighbours are drawn
WIDTHS, SPANS = {1: 58, 2: 30, 3: 20}, {1: (1,), 2: (1, 2), 3: (1,)}
PLACES = {1: ("",), 2: (" on the left", " on the right"), 3: (" on the left", " in the middle", " on the right")}
PICTURES = 2  # of each group


def groups(count: int, size: int) -> list[tuple[int, ...]]:
    """Neighbours, and of two those with one between them"""
    return [tuple((i + k * span) % count for k in range(size)) for span in SPANS[size] for i in range(count)]


def caption(phrases: list[str], colour: str) -> str:
    parts = [scenes.article(p) + place for p, place in zip(phrases, PLACES[len(phrases)])]
    text = parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
    return f"{text}, {colour} background"


def compose(rng: np.random.Generator, sprites: list[np.ndarray], colour: str):
    """Side by side, each in the middle of its part"""
    canvas = scenes.background(rng, colour)
    for i, sprite in enumerate(sprites):
        scenes.paste(canvas, sprite, scenes.SIZE * (i + 0.5) / len(sprites), scenes.SIZE / 2, WIDTHS[len(sprites)])
    return canvas


def parts(pictures: torch.Tensor, size: int) -> list[torch.Tensor]:
    """What stands in each place, [n, h, w, 3]"""
    width = scenes.SIZE // size
    top = (scenes.SIZE - width) // 2
    return [pictures[:, top : top + width, i * scenes.SIZE // size :][:, :, :width] for i in range(size)]


class Together:
    """Pictures of `size` concepts, and who is found in what is drawn of them"""

    def __init__(self, bench: Bench, names: list[str], judge: Judge, size: int):
        self.model, self.names, self.size = bench.model, names, size
        self.groups, rng = groups(len(names), size), np.random.default_rng(size)
        table, colours = concepts.table(), list(scenes.BACKGROUNDS)
        phrases = [f"{bench.subject(n).trigger} {bench.subject(n).class_noun}" for n in names]
        held_out = [make_concepts.poses(n, bench.pictures.parent, table)[1] for n in names]
        pictures, self.prompts = [], []
        for group in self.groups * PICTURES:
            colour = str(rng.choice(colours))
            pictures.append(compose(rng, [held_out[i][rng.integers(len(held_out[i]))] for i in group], colour))
            self.prompts.append(caption([phrases[i] for i in group], colour))
        self.pictures = to_tensor(pictures)
        latents, count = self.model.encode_images(self.pictures), len(self.groups)
        self.decoded = self.model.decode(latents).cpu()
        self.held_outs = [
            HeldOut.of(self.model, latents[i::count], self.prompts[i::count], seed=1234 + i) for i in range(count)
        ]
        references = [compose(rng, [pose] * size, c) for poses in held_out for pose in poses for c in colours]
        labels = [n for n, poses in zip(names, held_out) for _ in poses for _ in colours]
        self.finder = Finder(judge.features, parts(to_tensor(references), size)[0], labels)

    def found(self, drawn: torch.Tensor) -> dict[str, float]:
        """How often each concept is the one most similar to what stands in its place, and all of a picture"""
        shown = self.groups * PICTURES
        right = [self.finder.right(p, [self.names[g[i]] for g in shown]) for i, p in enumerate(parts(drawn, self.size))]
        right = np.stack(right, 1)
        return {"found": float(right.mean()), "found_all": float(right.all(1).mean())}

    def row(self, name: str, stack: Stack | None, everything: Adapter | None) -> tuple[dict, torch.Tensor]:
        drawn = draw_with(self.model, everything, self.prompts, (self.model.size,) * 2)
        those = [held_out_loss(self.model, h, stack and stack(list(g))) for g, h in zip(self.groups, self.held_outs)]
        whole = those if stack is None else [held_out_loss(self.model, h, everything) for h in self.held_outs]
        return {"row": name, "size": self.size, "those": mean(those), "all": mean(whole)} | self.found(drawn), drawn


def stacks(bench: Bench, names: list[str], seed: int) -> dict[str, Stack]:
    count = len(names)
    out = {row: bench.taught(row, bench.rate(row, count), seed, names, count).stack for row in (*RIVALS, OURS)}
    bench.measuring()
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", nargs="+", default=[], metavar="ROW=RATE", help="not to be searched for: seqlora=0.003")
    parser.add_argument("--cache", type=Path, default=ROOT / "benchmarks" / "cache")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    bench, names, judge, runs, sheet = Bench(args.cache, args.steps), concepts.names("final")[: args.count], Judge(), [], []
    bench.rates |= given_rates(args.rates)
    sizes = [Together(bench, names, judge, size) for size in WIDTHS]
    for seed in args.seeds:
        rows: dict[str, Stack | None] = {"base": None, **stacks(bench, names, seed)}
        for name, stack in rows.items():
            everything = stack and stack(list(range(len(names))))
            for together in sizes:
                run, drawn = together.row(name, stack, everything)
                runs.append(run | {"seed": seed})
                print(runs[-1], flush=True)
                if seed == args.seeds[0] and together.size > 1:
                    sheet.append((name, together.size, drawn[:8]))
    runs += [{"row": "real pictures", "size": t.size, "seed": None} | t.found(t.decoded) for t in sizes]
    about = meta("python -m benchmarks.together", bench.model.device, args.seeds) | {"concepts": names, "steps": args.steps}
    with written_aside(args.output / "results" / "together.json") as file:
        file.write((json.dumps({"meta": about, "runs": runs}, indent=1) + "\n").encode())
    grid = [[t.pictures[:8] for t in sizes[1:]]] + [[d for n, _, d in sheet if n == name] for name in rows]
    labelled_grid(grid, ["composed", *rows], ["two", "three"], 96).save(args.output / "images" / "together.png")


if __name__ == "__main__":
    main()
