"""The words that call a LoRA in a prompt, as its file's metadata has them, and which LoRAs share some."""

from __future__ import annotations

import json
import re

EVERYDAY = frozenset("a an the of in on at by with and or to from for as is photo picture image portrait drawing style".split())


def trigger_of(metadata: dict[str, str]) -> str:
    """The words that call a LoRA; "" if its file names none.

    Ours with the class noun, then modelspec's, then kohya's: the tag that most captions share, or the training folder's
    name after the number of repeats ("10_ohwx man") where there were no captions.
    """
    if metadata.get("seqlora.trigger"):
        return f"{metadata['seqlora.trigger']} {metadata.get('seqlora.class_noun', '')}".strip()
    if metadata.get("modelspec.trigger_phrase", "").strip():
        return metadata["modelspec.trigger_phrase"].strip()
    counts: dict[str, int] = {}
    for tags in json_object(metadata.get("ss_tag_frequency")).values():
        for tag, count in tags.items() if isinstance(tags, dict) else ():
            counts[tag.strip()] = counts.get(tag.strip(), 0) + count if isinstance(count, int) else 1
    if counts:
        return max(counts, key=counts.get)
    folders = [re.fullmatch(r"\d+_(.+)", name) for name in json_object(metadata.get("ss_dataset_dirs"))]
    return next((match[1].strip() for match in folders if match), "")


def json_object(text: str | None) -> dict:
    """The object that a metadata text holds; empty if it is none"""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def shared_triggers(metadata: dict[str, dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Triggers that call more than one of the named LoRAs: (the words, their names).

    A trigger of ours is its rare word; of others' LoRAs the whole phrase, which also calls those whose phrase holds it, and
    each of its words but the last, which says what it is, and those of everyday English.
    """
    words: dict[str, list[str]] = {}
    for name, values in metadata.items():
        said = (values.get("seqlora.trigger") or trigger_of(values)).lower()
        phrase = re.findall(r"\w+", said) or said.split()  # an emoji is no word
        if phrase:
            words[name] = phrase
    rare = {name: {w for w in (own[:-1] or own) if w not in EVERYDAY} for name, own in words.items()}
    out: dict[tuple[str, ...], str] = {}
    for phrase in words.values():
        called = [name for name, own in words.items() if set(phrase) <= set(own)]
        if len(called) > 1:
            out.setdefault(tuple(called), " ".join(phrase))
    for word in dict.fromkeys(w for own in words.values() for w in own):
        called = [name for name, own in rare.items() if word in own]
        if len(called) > 1:
            out.setdefault(tuple(called), word)
    return [(said, list(called)) for called, said in out.items()]
