"""SeqLoRA: concepts trained one after another so that they stack by plain summation.

The method of this package; it knows nothing of ComfyUI.  See docs/ARCHITECTURE.md and docs/METHOD.md.
"""

from .composition import compose
from .errors import UserError
from .interference import interference_report
from .library import Library
from .teach import train_concept
from .trainer import Concept, TrainingConfig

__all__ = ["Concept", "Library", "TrainingConfig", "UserError", "compose", "interference_report", "train_concept"]
