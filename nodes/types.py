"""What travels along SEQLORA_* links."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from comfy_api.latest import io
from torch import Tensor

from ..seqlora_core.config import Checkpointing
from ..seqlora_core.pictures import Pictures

CATEGORY = "SeqLoRA"
MODEL, TEXT = "model", "text"
ImagesType = io.Custom("SEQLORA_IMAGES")
StackType = io.Custom("SEQLORA_STACK")
OptionsType = io.Custom("SEQLORA_OPTIONS")
# other packs': a list of (file, model strength, clip strength); ComfyUI's Train LoRA's: tensors by key
LoraStackType = io.Custom("LORA_STACK")
LoraModelType = io.Custom("LORA_MODEL")

CHECKPOINTING = Checkpointing(every=100)  # a run that ComfyUI did not survive goes on from there when it is queued again


@dataclass
class Options:
    """How to train.  training: fields of TrainingConfig."""

    training: dict = field(default_factory=dict)
    checkpointing: Checkpointing = CHECKPOINTING


@dataclass
class ConceptImages:
    """Pictures of one size or of several, the most numerous first; notes: what became of each, a sentence each."""

    sets: list[Pictures]
    notes: list[str] = field(default_factory=list)

    @property
    def images(self) -> Tensor:
        """[n, height, width, 3] in 0..1, of the first size"""
        return self.sets[0].images


ALWAYS = (0.0, 1.0)  # start and end of what acts in all steps


@dataclass(frozen=True)
class Entry:
    """One concept of a library, or with an empty library one file of models/loras, at a strength.

    base: of a file, the fingerprint of the base model on which its moments count; "" for whichever is there.  start, end:
    shares of the sampling between which it acts.  protected: no projection touches it.  layers: which of its layers act,
    see `selection.selected`.  part: MODEL or TEXT if only what it does to that acts, else "".
    """

    library: str
    name: str
    strength: float = 1.0
    base: str = ""
    start: float = 0.0
    end: float = 1.0
    protected: bool = False
    layers: str = ""
    part: str = ""

    @property
    def always(self) -> bool:
        """Whether it acts in all steps"""
        return (self.start, self.end) == ALWAYS

    def times(self, strength: float, layers: str = "") -> Entry:
        """This entry weaker or stronger, and with a second filter on its layers"""
        return replace(self, strength=self.strength * strength, layers=";".join(filter(None, (self.layers, layers))))


@dataclass
class Stack:
    entries: list[Entry] = field(default_factory=list)

    def plus(self, *entries: Entry) -> Stack:
        """This stack with more entries; a concept named again takes the later strength, unless it is for other layers or steps."""
        new = {(e.library, e.name, e.part, e.layers, e.start, e.end): e for e in (*self.entries, *entries)}
        return Stack(list(new.values()))


def advanced(widget: io.WidgetInput) -> io.WidgetInput:
    """A widget that few people touch: the page folds it away."""
    widget.extra_dict["advanced"] = True  # not every version's constructors take it
    return widget
