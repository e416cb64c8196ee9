"""Captioned 64 px pictures composed from sprites: the demo model's training data."""

from __future__ import annotations

import numpy as np
from PIL import Image

SIZE = 64
BACKGROUNDS = {
    "white": (244, 244, 244), "black": (24, 24, 24), "gray": (128, 128, 128), "red": (205, 60, 60),
    "green": (70, 160, 80), "blue": (70, 105, 210), "yellow": (230, 208, 85), "purple": (142, 82, 172),
    "orange": (232, 140, 52), "pink": (238, 158, 190),
}  # fmt: skip
SUBJECTS = {
    "animal": "butterfly camel cow crocodile deer dolphin duck elephant frog gorilla koala lion owl pig rooster shark snail "
    "snake spider tiger turtle whale",
    "plant": "cactus rose sunflower tulip mushroom",
    "food": "banana candy carrot cherries grapes hamburger lemon lollipop pineapple pizza strawberry watermelon doughnut "
    "avocado eggplant",
    "object": "basketball bell camera crown door drum guitar key umbrella violin trumpet",
    "vehicle": "airplane bus helicopter sailboat tractor",
    "thing": "castle fire rainbow snowflake snowman tent volcano sun",
}
SUBJECTS = {name: noun for noun, names in SUBJECTS.items() for name in names.split()}


def article(word: str) -> str:
    return ("an " if word[0] in "aeiou" else "a ") + word


def paste(canvas: Image.Image, sprite: np.ndarray, x: float, y: float, size: float) -> None:
    """Draw a sprite with its centre at (x, y), `size` px wide."""
    size = max(4, round(size))
    small = Image.fromarray(sprite).resize((size, size), Image.Resampling.BOX, reducing_gap=None)
    canvas.paste(small, (round(x - size / 2), round(y - size / 2)), small)


def background(rng: np.random.Generator, colour: str) -> Image.Image:
    value = np.clip(np.array(BACKGROUNDS[colour]) + rng.integers(-10, 11, 3), 0, 255)
    return Image.new("RGB", (SIZE, SIZE), tuple(int(v) for v in value))


def compose(rng: np.random.Generator, items: list[tuple[np.ndarray, str]], colour: str, layout: str = "one") -> Image.Image:
    """One picture.  items: (sprite, size word "" | "small"); layout: one | sides | stacked."""
    canvas = background(rng, colour)
    scale = {"": rng.uniform(0.86, 0.92), "small": rng.uniform(0.48, 0.52)}
    if layout == "one":
        sprite, word = items[0]
        paste(canvas, sprite, 32 + rng.uniform(-1, 1), 32 + rng.uniform(-1, 1), SIZE * scale[word])
        return canvas
    for (sprite, _), centre in zip(items, (16, 48)):
        along, across = centre + rng.uniform(-0.5, 0.5), 32 + rng.uniform(-2, 2)
        x, y = (along, across) if layout == "sides" else (across, along)
        paste(canvas, sprite, x, y, rng.uniform(29, 31))
    return canvas


def caption(subjects: list[str], colour: str, style: str, layout: str = "one", size: str = "") -> str:
    """ "a small frog, red background, noto style"; colour and style may be empty."""
    if layout == "one":
        text = article(f"{size} {subjects[0]}".strip())
    else:
        first, second = ("on the left", "on the right") if layout == "sides" else ("at the top", "at the bottom")
        text = f"{article(subjects[0])} {first} and {article(subjects[1])} {second}"
    return text + (f", {colour} background" if colour else "") + (f", {style} style" if style else "")


def random_scene(rng: np.random.Generator, sprites: dict[tuple[str, str], np.ndarray]) -> tuple[Image.Image, str]:
    """One training picture with its caption.  Six in ten hold one subject, the others two."""
    names = sorted({name for _, name in sprites})
    styles = {name: [s for s, n in sprites if n == name] for name in names}
    colour = str(rng.choice(list(BACKGROUNDS)))
    say_colour, say_style = rng.random() < 0.92, rng.random() < 0.75
    if rng.random() < 0.6:
        name = str(rng.choice(names))
        style = str(rng.choice(styles[name]))
        size = str(rng.choice(["", "", "", "small"]))
        word = SUBJECTS[name] if rng.random() < 0.08 else name  # class nouns must mean something too
        picture = compose(rng, [(sprites[style, name], size)], colour)
        return picture, caption([word], colour if say_colour else "", style if say_style else "", size=size)
    first, second = (str(n) for n in rng.choice(names, 2, replace=False))
    common = [s for s in styles[first] if s in styles[second]]
    style = str(rng.choice(common))
    layout = str(rng.choice(["sides", "sides", "stacked"]))
    picture = compose(rng, [(sprites[style, first], ""), (sprites[style, second], "")], colour, layout)
    return picture, caption([first, second], colour if say_colour else "", style if say_style else "", layout)
