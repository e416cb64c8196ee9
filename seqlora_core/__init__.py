"""SeqLoRA: concepts trained one after another so that they stack by plain summation.

The method of this package; it knows nothing of ComfyUI.  See docs/ARCHITECTURE.md and docs/METHOD.md.
"""

from .composition import compose
from .concept import Concept
from .config import TrainingConfig
from .errors import UserError
from .library import Library
from .report import interference_report
from .teach import train_concept

__all__ = ["Concept", "Library", "TrainingConfig", "UserError", "compose", "interference_report", "train_concept"]
