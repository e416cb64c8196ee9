"""Writes demo/concepts/ (reference pictures of subjects that the demo model never saw) and demo/evaluation/.

    python -m demo.make_concepts

Source: frames of animated Fluent 3D emoji (npm `@lobehub/fluent-emoji-anim-*` 1.0.0, MIT), on varied backgrounds.
Ten references and four pictures kept apart for evaluation (`held_out/`), each with its caption beside it.
Evaluation: `generic/`, pictures of what the demo model knows; `pairs/`, two concepts side by side, named A+B.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from demo import emoji, scenes

VERSION = "1.0.0"
REFERENCES, HELD_OUT = 10, 4
# name: (package number, code point, trigger, class noun)
CONCEPTS = {
    "octopus": (1, "1f419", "octzu", "animal"),
    "penguin": (1, "1f427", "pengvo", "animal"),
    "fox": (3, "1f98a", "foxqi", "animal"),
    "ghost": (2, "1f47b", "ghozt", "thing"),
    "rocket": (3, "1f680", "rokva", "vehicle"),
    "panda": (1, "1f43c", "pandru", "animal"),
    "robot": (3, "1f916", "robvex", "object"),
    "monkey": (1, "1f435", "munkjo", "animal"),
    "unicorn": (3, "1f984", "uniqua", "animal"),
    "dragon": (1, "1f432", "dragwi", "animal"),
    "alien": (2, "1f47d", "alvexi", "thing"),
    "parrot": (3, "1f99c", "parluk", "animal"),
    "crab": (3, "1f980", "crabny", "animal"),
    "squid": (3, "1f991", "squavo", "animal"),
    "pumpkin": (1, "1f383", "pumkra", "food"),
    "ufo": (3, "1f6f8", "ufozem", "vehicle"),
}


def frames(path: Path, count: int) -> list[np.ndarray]:
    """`count` RGBA frames spread evenly over one animation."""
    with Image.open(path) as picture:
        out = []
        for index in np.linspace(0, picture.n_frames - 1, count, endpoint=False).round().astype(int):
            picture.seek(int(index))
            out.append(np.asarray(picture.convert("RGBA")))
    return out


def poses(name: str, cache: Path, table: dict = CONCEPTS) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """A subject's poses, shuffled: for the references, and held out."""
    package, code, _, _ = table[name]
    folder = emoji.npm_package(f"@lobehub/fluent-emoji-anim-{package}", VERSION, cache)
    every = frames(folder / "assets" / f"{code}.webp", REFERENCES + HELD_OUT)
    order = np.random.default_rng(list(code.encode())).permutation(len(every))
    return [every[i] for i in order[:REFERENCES]], [every[i] for i in order[REFERENCES:]]


def make(name: str, cache: Path, target: Path, table: dict = CONCEPTS) -> None:
    _, code, trigger, noun = table[name]
    rng = np.random.default_rng([1, *code.encode()])
    colours = [str(c) for c in rng.permutation(list(scenes.BACKGROUNDS))] * 2
    references, held_out = poses(name, cache, table)
    for i, pose in enumerate(references + held_out):
        size = "small" if i % 5 == 4 else ""
        picture = scenes.compose(rng, [(pose, size)], colours[i])
        save(picture, scenes.caption([f"{trigger} {noun}"], colours[i], "", size=size), stem(target / name, i))


def stem(folder: Path, number: int) -> Path:
    """Where a concept's picture goes: the last ones are held out."""
    return folder / f"{number:02d}" if number < REFERENCES else folder / "held_out" / f"{number - REFERENCES:02d}"


def save(picture, caption: str, stem: Path) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    picture.save(stem.with_suffix(".png"), optimize=True)
    stem.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")


def make_pairs(cache: Path, target: Path, table: dict = CONCEPTS, distances: int = 4) -> None:
    """Every pair of neighbours in the table at distances 1 to `distances`, in held-out poses."""
    names = list(table)
    held_out = {name: poses(name, cache, table)[1] for name in names}
    for distance in range(1, distances + 1):
        for i, first in enumerate(names):
            second = names[(i + distance) % len(names)]
            rng = np.random.default_rng([i, distance])
            items = [(held_out[n][rng.integers(HELD_OUT)], "") for n in (first, second)]
            colour = str(rng.choice(list(scenes.BACKGROUNDS)))
            words = [f"{table[n][2]} {table[n][3]}" for n in (first, second)]
            save(
                scenes.compose(rng, items, colour, "sides"),
                scenes.caption(words, colour, "", "sides"),
                target / f"{first}+{second}",
            )


def make_generic(cache: Path, target: Path, count: int = 48) -> None:
    sprites, rng = emoji.sprites(cache, sorted(scenes.SUBJECTS)), np.random.default_rng(77)
    for i in range(count):
        save(*scenes.random_scene(rng, sprites), target / f"{i:02d}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / "cache")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    for name in CONCEPTS:
        make(name, args.cache, args.output / "concepts")
    make_pairs(args.cache, args.output / "evaluation" / "pairs")
    make_generic(args.cache, args.output / "evaluation" / "generic")


if __name__ == "__main__":
    main()
