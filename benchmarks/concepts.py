"""The concept sets: 104 subjects and styles that the demo model never saw, made from npm packages into a cache.

Two thirds are for tuning (the demo's sixteen among them), the rest are for final tables only.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from demo import emoji, make_concepts, scenes
from seqlora_core.demo import shared_words
from seqlora_core.demo_model import TOKENIZER

# class noun -> "package/code name" of the animated Fluent emoji
ANIMATED = {
    "animal": "1/1f402 ox, 1/1f406 leopard, 1/1f407 rabbit, 1/1f408 cat, 1/1f40e horse, 1/1f40f ram, 1/1f411 sheep, "
    "1/1f414 chicken, 1/1f415 dog, 1/1f417 boar, 1/1f41a shell, 1/1f41b bug, 1/1f41c ant, 1/1f41d bee, 1/1f41e ladybird, "
    "1/1f420 clownfish, 1/1f421 blowfish, 1/1f425 chick, 1/1f426 bird, 1/1f429 poodle, 1/1f439 hamster, 1/1f43a wolf, "
    "1/1f43b bear, 3/1f982 scorpion, 3/1f983 turkey, 3/1f985 eagle, 3/1f987 bat, 3/1f98e lizard, 3/1f98f rhinoceros, "
    "3/1f990 shrimp, 3/1f992 giraffe, 3/1f993 zebra, 3/1f994 hedgehog, 3/1f996 tyrannosaur, 3/1f998 kangaroo, 3/1f999 llama, "
    "3/1f99a peacock, 3/1f99b hippopotamus, 3/1f99d raccoon, 3/1f99e lobster",
    "food": "1/1f345 tomato, 1/1f34a tangerine, 1/1f34e apple, 1/1f350 pear, 1/1f351 peach, 1/1f33d maize, 1/1f32e taco, "
    "1/1f32d hotdog, 1/1f35e bread, 1/1f35f fries, 1/1f36a cookie, 1/1f36f honey, 1/1f382 cake, 1/1f37f popcorn, "
    "3/1f950 croissant, 3/1f966 broccoli",
    "plant": "1/1f331 seedling, 1/1f332 fir, 1/1f334 palm, 1/1f340 clover",
    "object": "1/1f381 present, 1/1f388 balloon, 1/1f3a9 hat, 1/1f3ae gamepad, 1/1f3b2 die, 1/1f3b7 saxophone, 1/1f3c6 trophy, "
    "1/1f3fa amphora, 1/1f45f sneaker, 2/1f480 skull, 2/1f48d ring, 2/1f4a1 bulb, 2/1f4a3 bomb, 2/1f4fa television, "
    "2/1f512 lock, 2/1f528 hammer",
    "vehicle": "3/1f682 locomotive, 3/1f691 ambulance, 3/1f695 taxi, 3/1f697 car, 3/1f6a2 ship, 3/1f6f5 scooter",
    "thing": "1/1f31f star, 1/1f3e0 house, 2/1f5ff statue",
}
STYLES = ("classic", "firefox", "flat")  # emoji sets that the denoiser never saw
SEED = 101
SPOKEN = 4  # tokens
VOWELS = "aeiou"


def rare_word(rng: np.random.Generator) -> str:
    """Three consonant-vowel pairs, such as 'zuqevo'"""
    return "".join(str(rng.choice(list("bcdfgjkmpqvwxz"))) + str(rng.choice(list("aeiou"))) for _ in range(3))


def table() -> dict[str, tuple[int, str, str, str]]:
    """name -> (package, code point, trigger, class noun), the demo's sixteen first, the others shuffled."""
    rng, others = np.random.default_rng(SEED), {}
    for noun, items in ANIMATED.items():
        for item in items.split(", "):
            source, name = item.split()
            package, code = source.split("/")
            others[name] = (int(package), code, rare_word(rng), noun)
    order = rng.permutation(sorted(others))
    return make_concepts.CONCEPTS | {str(name): others[str(name)] for name in order}


def names(which: str = "all") -> list[str]:
    """which: tuning | final | all.  Styles stand among the subjects of both parts."""
    subjects = list(table())
    tuning = [*subjects[:66], "classic", "flat"]
    final = [*subjects[66:], "firefox"]
    return {"tuning": tuning, "final": final, "all": tuning + final}[which]


def style_trigger(style: str, rng: np.random.Generator) -> str:
    """A rare word, and another one if a subject has it already"""
    taken, trigger = {t for *_, t, _ in table().values()}, rare_word(rng)
    more = np.random.default_rng([SEED, STYLES.index(style), 1])
    while trigger in taken:
        trigger = rare_word(more)
    return trigger


def make_style(style: str, cache: Path, target: Path) -> None:
    """Known subjects in an unknown style: ten references, four others held out."""
    rng = np.random.default_rng([SEED, STYLES.index(style)])
    trigger, icons = style_trigger(style, rng), emoji.icon_set(style, cache)
    known = [n for n in rng.permutation(sorted(scenes.SUBJECTS)) if n in icons]
    for i in range(make_concepts.REFERENCES + make_concepts.HELD_OUT):
        colour = str(rng.choice(list(scenes.BACKGROUNDS)))
        picture = scenes.compose(rng, [(emoji.render(icons[known[i]]), "")], colour)
        text = scenes.caption([str(known[i])], colour, trigger)
        make_concepts.save(picture, text, make_concepts.stem(target / style, i))


def ensure(cache: Path) -> Path:
    """Folder with a sub-folder for each concept, and `pairs/`; made on the first call (needs npm and resvg-py)."""
    folder, marker = cache / "concepts", cache / "concepts" / ".made"
    if not marker.exists():
        for name in table():
            make_concepts.make(name, cache, folder, table())
        for style in STYLES:
            make_style(style, cache, folder)
        make_concepts.make_pairs(cache, cache / "pairs", table(), distances=2)
        marker.touch()
    return folder


def own_words(taken: set[int], count: int, tokens: int, tokenizer: Tokenizer) -> list[str]:
    """Made-up words of exactly `tokens` tokens each, none of which is in `taken` or in another of the words.

    Up to SPOKEN tokens one can say them; of syllables alone a hundred longer ones would share some, so those are put together of
    the vocabulary's own pieces.
    """
    rng, taken, words = np.random.default_rng(SEED), set(taken), []
    pieces = sorted(p for p in tokenizer.get_vocab() if re.fullmatch("[b-df-hj-np-tv-z]{0,2}[aeiouy][b-df-hj-np-tv-z]{0,2}", p))
    while len(words) < count:
        if tokens <= SPOKEN:
            ends = rng.choice(["", *"bdfgkmnprtvwxz"], rng.integers(2, 5))
            parts = [str(rng.choice(list("bcdfgjkmpqvwxz"))) + str(rng.choice(list("aeiou"))) + str(end) for end in ends]
        else:
            parts = rng.choice([p for p in pieces if tokenizer.token_to_id(p) not in taken], tokens)
        word = "".join(parts)
        ids = tokenizer.encode(word).ids[1:-1]
        if len(ids) == len(set(ids)) == tokens and taken.isdisjoint(ids) and word[0] not in VOWELS:
            taken.update(ids)
            words.append(word)
    return words


def with_own_triggers(cache: Path, tokens: int) -> Path:
    """The same pictures and pairs, each trigger replaced by a word of so many tokens of its own: folder in the cache.

    Of `rare_word`s a hundred share their tokens, so that some have none of their own that could be learnt.  Styles are named
    first: the demo model reads 24 tokens, and a long word at the end would be cut off.
    """
    target = cache / f"own-triggers-{tokens}"
    if (target / ".made").exists():
        return target
    shutil.rmtree(target, ignore_errors=True)
    for part in ("concepts", "pairs"):
        shutil.copytree(ensure(cache).parent / part, target / part)
    captions = {path: path.read_text(encoding="utf-8") for path in target.rglob("*.txt")}
    folders = sorted((target / "concepts").glob("*/"))
    old = [shared_words([captions[path] for path in sorted(folder.glob("*.txt"))])[0] for folder in folders]
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    others = {word for text in captions.values() for word in text.split()} - set(old)
    taken = set(tokenizer.encode(" ".join(others)).ids)
    words = own_words(taken, len(old), tokens, tokenizer)
    articles = {f"an {a}": f"a {b}" for a, b in zip(old, words)} | dict(zip(old, words))  # no new word begins with a vowel
    pattern = re.compile("|".join(rf"\b{a}\b" for a in articles))
    for path, text in captions.items():
        text = pattern.sub(lambda found: articles[found[0]], text)
        path.write_text(re.sub(r"(.*), (\S+ style)", r"\2, \1", text), encoding="utf-8")
    (target / ".made").touch()
    return target
