"""Which layers of an adapter act: a filter in words."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

from .adapter import TOKEN_TABLES, Adapter

# what "@text" stands for: the layers that read the prompt, by ComfyUI's and kohya's names for them
TEXT = (
    "attn2_to_k", "attn2_to_v",  # UNets
    "context_block",  # SD3
    "txt_attn",  # Flux.1, Chroma, Hunyuan
    "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out",  # Qwen-Image
    "attn1_to_*_t",  # HiDream
    "double_layers_*_attn_w1",  # AuraFlow
    "qkv_y", "proj_y",  # Mochi
    "cross_attn_k", "cross_attn_v",  # PixArt, Wan, Cosmos
    "attn*_kv_proj",  # HunyuanDiT
)  # fmt: skip


WORDS = {"@text": TEXT, "@trigger": tuple(table.replace(".", "_") for table in TOKEN_TABLES)}


def selected(adapter: Adapter, words: str) -> Adapter:
    """The adapter with those layers only that a filter names.

    words: parts of layers' names with commas between, such as "up_blocks, attn2"; `*` stands for anything; a word after a
    minus leaves layers out: "-mid_block".  Dots and underscores count as the same; "@text" stands for the layers that read
    the prompt (TEXT), "@trigger" for the tables of tokens, which learnt triggers change.  A semicolon starts a second filter that layers must pass as well.  "" keeps all.
    """
    return Adapter({n: d for n, d in adapter.layers.items() if acts(n, words)}, adapter.metadata)


def acts(name: str, words: str) -> bool:
    """Whether such a filter names this layer"""
    return all(_passes(name, part) for part in words.split(";"))


def _passes(name: str, words: str) -> bool:
    wanted = [w.strip().replace(".", "_") for w in words.split(",") if w.strip()]
    put_in = _spelt_out(w for w in wanted if w[0] != "-")
    left_out = _spelt_out(w[1:].strip() for w in wanted if w[0] == "-")
    plain = name.replace(".", "_")
    named = not put_in or any(fnmatchcase(plain, f"*{word}*") for word in put_in)
    return named and not any(fnmatchcase(plain, f"*{word}*") for word in left_out)


def _spelt_out(words: Iterable[str]) -> list[str]:
    return [part for word in words for part in WORDS.get(word, (word,))]
