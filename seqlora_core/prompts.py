"""Prompts for statistics and replay: generic ones for "everything else", decoys for "what later concepts look like"."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

NOUNS = (
    "butterfly camel cow crocodile deer dolphin duck elephant frog gorilla koala lion owl pig rooster shark snail "
    "snake spider tiger turtle whale cactus rose sunflower tulip mushroom banana candy carrot cherries grapes "
    "hamburger lemon lollipop pineapple pizza strawberry watermelon doughnut avocado eggplant basketball bell "
    "camera crown door drum guitar key umbrella violin trumpet airplane bus helicopter sailboat tractor castle fire "
    "rainbow snowflake snowman tent volcano sun woman man child house tree street "
).split()
COLOURS = "white black gray red green blue yellow purple orange pink".split()
STYLES = "noto fluent watercolor cartoon pixel".split()  # the first two are the demo model's
CLASS_NOUNS = "animal person object plant food vehicle thing style".split()
# scripts that write words without spaces between them: Thai and Lao, Burmese, Khmer, and from Chinese on
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\U0010ffff]")
RARE_WORDS = "sks ohwx zwx krp vbl qzt hfj wmb pdx jqv xgn tfr".split()


def _article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def generic_prompts(count: int, seed: int = 0) -> list[str]:
    """`count` prompts about common things: one or two subjects, most on a coloured background, half in a style."""
    rng = random.Random(seed)
    prompts = []
    for _ in range(count):
        first, second = rng.sample(NOUNS, 2)
        text = _article(first)
        if rng.random() < 0.35:
            where = rng.choice([("on the left", "on the right"), ("at the top", "at the bottom")])
            text = f"{_article(first)} {where[0]} and {_article(second)} {where[1]}"
        text += f", {rng.choice(COLOURS)} background" if rng.random() < 0.9 else ""
        prompts.append(text + (f", {rng.choice(STYLES)} style" if rng.random() < 0.5 else ""))
    return prompts


def generic_decoys(count: int, seed: int = 0) -> list[str]:
    """Prompts of unknown concepts: a rare word and a class noun, as a later concept's captions will be."""
    rng = random.Random(seed)
    return [
        f"{_article(f'{rng.choice(RARE_WORDS)} {rng.choice(CLASS_NOUNS)}')}, {rng.choice(COLOURS)} background"
        for _ in range(count)
    ]


def is_decoy(prompt: str) -> bool:
    """Whether it is one of `generic_decoys`"""
    return not set(RARE_WORDS).isdisjoint(prompt.split())


def decoys(captions: list[str], trigger: str, count: int, seed: int = 0, taken: Iterable[str] = ()) -> list[str]:
    """The concept's own captions with other rare words in the trigger's place, every fourth with none.

    taken: triggers of other concepts, which no decoy is to call.
    """
    rng = random.Random(seed)
    others = [w for w in RARE_WORDS if not calls(w, trigger)]
    others = [w for w in others if not any(calls(w, known) for known in taken)] or others
    word = re.compile(as_a_word(trigger).pattern + r"\s*", re.IGNORECASE)
    out = []
    for i in range(count):
        caption = rng.choice(captions)
        out.append(word.sub("" if i % 4 == 3 else rng.choice(others) + " ", caption).strip())
    return out


def as_a_word(trigger: str, inflected: bool = False) -> re.Pattern:
    """Finds the trigger as a word of its own, in capitals or not; scripts such as Chinese have no spaces between words.

    inflected: the last word may go on, as in a plural.
    """
    before, after = ("" if UNSPACED.match(edge) else edge for edge in (trigger[:1] or " ", trigger[-1:] or " "))
    before, after = before and r"(?<!\w)", "" if inflected else after and r"(?!\w)"
    return re.compile(before + spaced(trigger) + after, re.IGNORECASE)


def spaced(trigger: str) -> str:
    """Pattern of the trigger, whatever white space is between its words: a caption may be wrapped there"""
    return r"\s+".join(map(re.escape, trigger.split())) or re.escape(trigger)


def calls(trigger: str, prompt: str) -> bool:
    """Whether the prompt has the trigger as a word of its own"""
    return as_a_word(trigger).search(prompt) is not None


def without(trigger: str, prompt: str) -> str:
    """The prompt with the trigger taken out, however it is spelled: tokenizers of CLIPs do not tell capitals either"""
    return as_a_word(trigger).sub("", prompt)


def trigger_prompts(trigger: str, count: int, seed: int = 0) -> list[str]:
    """Prompts that call one concept, on backgrounds of several colours, every fourth on none."""
    rng = random.Random(seed)
    return [_article(trigger) + ("" if i % 4 == 3 else f", {rng.choice(COLOURS)} background") for i in range(count)]
