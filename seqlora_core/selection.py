"""Which layers of an adapter act: a filter in words."""

from __future__ import annotations

from fnmatch import fnmatchcase

from .adapter import Adapter


def selected(adapter: Adapter, words: str) -> Adapter:
    """The adapter with those layers only that a filter names.

    words: parts of layers' names with commas between, such as "up_blocks, attn2"; `*` stands for anything; a word after a
    minus leaves layers out: "-mid_block".  Dots and underscores count as the same.  A semicolon starts a second filter that
    layers must pass as well.  "" keeps all.
    """
    return Adapter({n: d for n, d in adapter.layers.items() if acts(n, words)}, adapter.metadata)


def acts(name: str, words: str) -> bool:
    """Whether such a filter names this layer"""
    return all(_passes(name, part) for part in words.split(";"))


def _passes(name: str, words: str) -> bool:
    wanted = [w.strip().replace(".", "_") for w in words.split(",") if w.strip()]
    put_in, left_out = [w for w in wanted if w[0] != "-"], [w[1:].strip() for w in wanted if w[0] == "-"]
    plain = name.replace(".", "_")
    named = not put_in or any(fnmatchcase(plain, f"*{word}*") for word in put_in)
    return named and not any(fnmatchcase(plain, f"*{word}*") for word in left_out)
