"""What travels along SEQLORA_* links."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comfy_api.latest import io
from torch import Tensor

CATEGORY = "SeqLoRA"
ImagesType = io.Custom("SEQLORA_IMAGES")
StackType = io.Custom("SEQLORA_STACK")


@dataclass
class ConceptImages:
    """images [n, height, width, 3] in 0..1; a caption or None for each."""

    images: Tensor
    captions: list[str | None]


@dataclass(frozen=True)
class Entry:
    """One concept of a library, or with an empty library one file of models/loras, at a strength.

    base: of a file, the fingerprint of the base model on which its moments count; "" for whichever is there.  start, end:
    shares of the sampling between which it acts.  protected: no projection touches it.  layers: which of its layers act,
    see `selection.selected`.
    """

    library: str
    name: str
    strength: float = 1.0
    base: str = ""
    start: float = 0.0
    end: float = 1.0
    protected: bool = False
    layers: str = ""

    def times(self, strength: float, layers: str = "") -> Entry:
        """This entry weaker or stronger, and with a second filter on its layers"""
        return replace(self, strength=self.strength * strength, layers=";".join(filter(None, (self.layers, layers))))


@dataclass
class Stack:
    entries: list[Entry] = field(default_factory=list)

    def plus(self, *entries: Entry) -> Stack:
        """This stack with more entries; a concept named again takes the later strength."""
        new = {(e.library, e.name): e for e in (*self.entries, *entries)}
        return Stack(list(new.values()))


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """A widget that few people touch: the page folds it away."""
    widget.extra_dict["advanced"] = True  # not every version's constructors take it
    return widget
