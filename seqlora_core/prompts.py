"""Prompts for statistics and replay: generic ones for "everything else", decoys for "what later concepts look like"."""

from __future__ import annotations

import random
import re

NOUNS = (
    "bird butterfly camel chicken cow crocodile deer dolphin duck eagle elephant fish frog goat gorilla horse koala "
    "lion lizard owl pig rooster shark snail snake spider tiger turtle whale wolf cactus rose sunflower tulip mushroom "
    "banana bread candy carrot cookie hamburger lemon lollipop peach pear pineapple pizza strawberry tomato watermelon "
    "doughnut avocado basketball bell camera candle crown door drum guitar hammer key microphone telephone television "
    "trumpet umbrella violin airplane ambulance bicycle bus helicopter locomotive sailboat tractor castle church cloud "
    "fire house mountain rainbow snowman star sun tent volcano woman man child"
).split()
COLOURS = "white black gray red green blue yellow purple orange pink".split()
CLASS_NOUNS = "animal person object plant food vehicle thing style".split()
RARE_WORDS = "sks ohwx zwx krp vbl qzt hfj wmb pdx jqv xgn tfr".split()


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def generic_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` prompts about common things: one or two subjects, most on a coloured background."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        first, second = rng.sample(NOUNS, 2)
        text = _article(first)
        if rng.random() < 0.35:
            where = rng.choice([("on the left", "on the right"), ("at the top", "at the bottom")])
            text = f"{_article(first)} {where[0]} and {_article(second)} {where[1]}"
        prompts.append(text + (f", {rng.choice(COLOURS)} background" if rng.random() < 0.9 else ""))
    return prompts


def generic_decoys(count: int, seed: int = 0) -> list[str]:
    """Prompts of unknown concepts: a rare word and a class noun, as a later concept's captions will be."""
    rng = random.Random(seed)
    return [
        f"{_article(f'{rng.choice(RARE_WORDS)} {rng.choice(CLASS_NOUNS)}')}, {rng.choice(COLOURS)} background"
        for _ in range(count)
    ]


def decoys(captions: list[str], trigger: str, count: int, seed: int = 0) -> list[str]:
    """The concept's own captions with other rare words in the trigger's place, every fourth with none."""
    rng = random.Random(seed)
    others = [w for w in RARE_WORDS if w.lower() != trigger.lower()]
    word = re.compile(re.escape(trigger) + r"\s*", re.IGNORECASE)
    out = []
    for i in range(count):
        caption = rng.choice(captions)
        out.append(word.sub("" if i % 4 == 3 else rng.choice(others) + " ", caption).strip())
    return out
