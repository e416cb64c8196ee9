"""Does the demo model draw what it is told?  Scores by the held-out judge, and a contact sheet.

    python -m demo.judge_base --cache demo/cache

Writes docs/results/base.json and docs/images/base.png.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from demo import emoji, scenes
from seqlora_core.demo_model import DEMO_MODEL, DemoModel
from seqlora_core.judge import Judge, nearest, pixels

DOCS = Path(__file__).resolve().parent.parent / "docs"
STEPS, GUIDANCE = 20, 3.0  # of 1 to 8, the best on 150 other pairs


def to_tensor(pictures: list) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(p) for p in pictures]), dtype=torch.float32) / 255


def reference_bank(sprites: dict, seed: int = 5) -> tuple[torch.Tensor, list[str]]:
    """Every sprite on every background, so that no subject is found by its background."""
    rng = np.random.default_rng(seed)
    pictures, labels = [], []
    for (_, name), sprite in sprites.items():
        for colour in scenes.BACKGROUNDS:
            pictures.append(scenes.compose(rng, [(sprite, "")], colour))
            labels.append(name)
    return to_tensor(pictures), labels


def half_size(pictures: torch.Tensor) -> torch.Tensor:
    """[n, 64, 64, 3] -> [n, 32, 32, 3]: references as large as a subject of two is drawn"""
    return F.interpolate(pictures.permute(0, 3, 1, 2), scale_factor=0.5, mode="area").permute(0, 2, 3, 1)


def sides(pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two subjects of pictures with one on the left and one on the right, each [n, 32, 32, 3]"""
    return pictures[:, 16:48, :32], pictures[:, 16:48, 32:]


class Finder:
    """Which subject a picture shows: its nearest neighbour among all subjects' references."""

    def __init__(self, features, bank: torch.Tensor, labels: list[str]):
        self.features, self.labels, self.bank = features, labels, features(bank)

    def right(self, pictures: torch.Tensor, subjects: list[str]) -> np.ndarray:
        """[n] of bool: whether each picture shows its subject"""
        found = nearest(self.features(pictures), self.bank, self.labels, self.bank.mean(0))
        return np.array([a == b for a, b in zip(found, subjects)])


def by_style(right: np.ndarray, styles: list[str]) -> dict[str, float]:
    """Share of right pictures by the style that their prompts name"""
    return {s or "none": float(right[np.array(styles) == s].mean()) for s in ("", *emoji.STYLES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache")
    parser.add_argument("--model", type=Path, default=DEMO_MODEL)
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--output", type=Path, default=DOCS)
    args = parser.parse_args()
    sprites = emoji.sprites(args.cache, sorted(scenes.SUBJECTS))
    model, judge, rng = DemoModel(args.model), Judge(), np.random.default_rng(11)
    bank, labels = reference_bank(sprites)
    whole, halves = Finder(judge.features, bank, labels), Finder(judge.features, half_size(bank), labels)
    control = Finder(pixels, bank, labels)

    def drawn(prompts: list[str], seed: int) -> torch.Tensor:
        parts = [prompts[i : i + 25] for i in range(0, len(prompts), 25)]
        encoded = [model.encode_prompts(p) for p in parts]
        return torch.cat([model.decode(model.sample(c, seed + 25 * i, STEPS, GUIDANCE)) for i, c in enumerate(encoded)])

    def on_sides(pictures: torch.Tensor, pairs: list[tuple[str, str]]) -> np.ndarray:
        """[n, 2] of bool: whether each of the two subjects is found on its side"""
        return np.stack([halves.right(half, [p[i] for p in pairs]) for i, half in enumerate(sides(pictures))], 1)

    names, colours = list(scenes.SUBJECTS), list(scenes.BACKGROUNDS)
    subjects = [names[i % len(names)] for i in range(args.prompts)]
    # a third of the prompts name no style, a third each of the two; of pairs too
    styles = [("", *emoji.STYLES)[i // len(names) % 3] for i in range(args.prompts)]
    prompts = [scenes.caption([s], str(rng.choice(colours)), style) for s, style in zip(subjects, styles)]
    single = drawn(prompts, 1000)
    right = whole.right(single, subjects)
    pairs = [tuple(str(n) for n in rng.choice(names, 2, replace=False)) for _ in range(args.prompts)]
    pair_styles = [("", *emoji.STYLES)[i % 3] for i in range(len(pairs))]
    pair_prompts = [scenes.caption(list(p), str(rng.choice(colours)), t, "sides") for p, t in zip(pairs, pair_styles)]
    double = drawn(pair_prompts, 9000)
    # what the autoencoder alone leaves of real pictures: no denoiser can do better
    real_styles = [str(rng.choice(emoji.STYLES)) for _ in range(args.prompts)]
    real = [scenes.compose(rng, [(sprites[t, s], "")], str(rng.choice(colours))) for s, t in zip(subjects, real_styles)]
    real_double = [
        scenes.compose(rng, [(sprites[t, n], "") for n in p], str(rng.choice(colours)), "sides")
        for p, t in zip(pairs, real_styles)
    ]
    decoded, decoded_double = (model.decode(model.encode_images(to_tensor(x))) for x in (real, real_double))
    found = on_sides(double, pairs)
    result = {
        "prompts": args.prompts, "subjects": len(names), "single_right": float(right.mean()),
        "single_right_by_style": by_style(right, styles),
        "single_right_by_pixels": float(control.right(single, subjects).mean()),
        "pairs": len(pairs), "pair_both_right": float(found.all(1).mean()), "pair_each_right": float(found.mean()),
        "pair_both_right_by_style": by_style(found.all(1), pair_styles),
        "autoencoder_single_right": float(whole.right(decoded, subjects).mean()),
        "autoencoder_pair_both_right": float(on_sides(decoded_double, pairs).all(1).mean()),
        "sampler": f"Euler, {STEPS} steps, guidance {GUIDANCE}",
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    for folder in ("results", "images"):
        (args.output / folder).mkdir(parents=True, exist_ok=True)
    (args.output / "results" / "base.json").write_text(json.dumps(result, indent=1) + "\n")
    tiles = torch.cat([single[:80], double[:40]])
    sheet = torch.cat([torch.cat(list(tiles[i : i + 20]), 1) for i in range(0, 120, 20)])
    picture = Image.fromarray((sheet * 255).round().byte().numpy())
    picture.save(args.output / "images" / "base.png")


if __name__ == "__main__":
    main()
