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
from PIL import Image

from demo import emoji, scenes
from seqlora_core.demo_model import DEMO_MODEL, DemoModel
from seqlora_core.judge import Judge, nearest, pixels

DOCS = Path(__file__).resolve().parent.parent / "docs"
STEPS, GUIDANCE = 20, 4.0


def to_tensor(pictures: list) -> torch.Tensor:
    return torch.tensor(np.stack([np.asarray(p) for p in pictures]), dtype=torch.float32) / 255


def reference_bank(sprites: dict, seed: int = 5) -> tuple[torch.Tensor, list[str]]:
    """Every sprite on two backgrounds."""
    rng = np.random.default_rng(seed)
    pictures, labels = [], []
    for (_, name), sprite in sprites.items():
        for colour in rng.choice(list(scenes.BACKGROUNDS), 2, replace=False):
            pictures.append(scenes.compose(rng, [(sprite, "")], str(colour)))
            labels.append(name)
    return to_tensor(pictures), labels


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
    features = judge.features(bank)
    centre, control = features.mean(0), pixels(bank)

    def drawn(prompts: list[str], seed: int) -> torch.Tensor:
        parts = [prompts[i : i + 25] for i in range(0, len(prompts), 25)]
        encoded = [model.encode_prompts(p) for p in parts]
        return torch.cat([model.decode(model.sample(c, seed + 25 * i, STEPS, GUIDANCE)) for i, c in enumerate(encoded)])

    names = list(scenes.SUBJECTS)
    subjects = [names[i % len(names)] for i in range(args.prompts)]
    # a third of the prompts name no style, a third each of the two
    styles = [("", *emoji.STYLES)[i // len(names) % 3] for i in range(args.prompts)]
    prompts = [scenes.caption([s], str(rng.choice(list(scenes.BACKGROUNDS))), style) for s, style in zip(subjects, styles)]
    single = drawn(prompts, 1000)
    found = nearest(judge.features(single), features, labels, centre)
    right = np.array([a == b for a, b in zip(found, subjects)])
    by_style = {style or "none": float(right[np.array(styles) == style].mean()) for style in ("", *emoji.STYLES)}
    by_pixels = nearest(pixels(single), control, labels, control.mean(0))
    pairs = [tuple(str(n) for n in rng.choice(names, 2, replace=False)) for _ in range(args.prompts // 2)]
    pair_prompts = [scenes.caption(list(p), str(rng.choice(list(scenes.BACKGROUNDS))), "", "sides") for p in pairs]
    double = drawn(pair_prompts, 9000)
    sides = []
    for half in (double[:, 16:48, :32], double[:, 16:48, 32:]):
        sides.append(nearest(judge.features(half), features, labels, centre))
    both = [a == pair[0] and b == pair[1] for pair, a, b in zip(pairs, *sides)]
    each = [a == pair[0] for pair, a in zip(pairs, sides[0])] + [b == pair[1] for pair, b in zip(pairs, sides[1])]
    result = {
        "prompts": args.prompts, "subjects": len(names),
        "single_right": float(right.mean()), "single_right_by_style": by_style,
        "single_right_by_pixels": float(np.mean([a == b for a, b in zip(by_pixels, subjects)])),
        "pairs": len(pairs), "pair_both_right": float(np.mean(both)), "pair_each_right": float(np.mean(each)),
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
