"""The options of a fit."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from .errors import UserError
from .hypergradient import parse
from .linalg import RETRACTIONS
from .optimisers import OPTIMISERS, SCHEDULES
from .references import TEMPLATE

LARGEST_SEED = 2**63 - 1
TIMESTEPS = ("model", "uniform", "logit_normal", "shifted")


@dataclass
class TrainingConfig:
    """Options of a fit.  The last block switches parts of the method off, for ablations."""

    rank: int = 4
    rank_energy: float = 1.0  # a layer gets so many of these directions that they hold this share of what all would see; 1: all
    layers: str = ""  # which of them learn, as in `selection.selected`; "" for all
    steps: int = 320
    learning_rate: float = 4e-3  # of lora_up
    basis_rate: float = 2e-3
    interference_weight: float = 1.0  # lambda
    batch: int = 8
    seed: int = 0
    planned: int = 32  # concepts the library is meant to hold
    drift_budget: float = 0.02  # how far the planned concepts together may move unrelated prompts; 0: fixed weights
    lower_steps: int = 0  # lora_up steps to one basis step; 0: both from every gradient
    hypergradient: str = "none"  # of the basis step, with lower_steps: none, neumann:K or cg:K
    line_search: bool = False  # of the basis step, with lower_steps and without a hypergradient
    retraction: str = "qr"
    protection: float = 1.0  # weight of earlier concepts' moments in the energy
    replay_weight: float = 85.0
    replay_batch: int = 12
    replay_every: int = 1
    replay_target: str = "base"  # what generic prompts and decoys must go on looking like: base, or before this concept
    keep_latents: int = 8  # of the references, stored for replay by later concepts; 0 for none
    learn_trigger: bool = False  # the embeddings of the trigger's own tokens too
    trigger_rate: float = 0.3  # of these embeddings, in units of their table's spread
    text_encoder: bool = False  # adapt its attention too; one choice for a whole library

    optimiser: str = "adam"  # of lora_up
    weight_decay: float = 0.0
    schedule: str = "half"  # of both learning rates: whole for the first half, then linearly to zero
    warmup: int = 0  # steps
    accumulate: int = 1  # batches to a step
    clip: float = 0.0  # of the gradient's norm; 0: none
    gradient_checkpointing: bool = False
    timesteps: str = "model"
    shift: float = 3.0  # of timesteps "shifted"
    min_snr: float = 0.0  # gamma; 0: all noise levels alike
    caption_dropout: float = 0.0
    shuffle_tags: bool = False

    concept_dropout: bool = True
    earlier_active: bool = True
    orthogonal: bool = True
    whitened: bool = True
    data_start: bool = True
    learn_basis: bool = True
    use_decoys: bool = True

    def validate(self) -> None:
        """UserError, which names the option, for values that no fit can have and for options that exclude each other"""
        numbers = [f.name for f in fields(self) if isinstance(f.default, float)]
        wrong = next((name for name in numbers if not math.isfinite(getattr(self, name))), None)
        if wrong is not None:
            raise UserError(f"{wrong} is {getattr(self, wrong)}: give a number")
        least = dict.fromkeys(("rank", "steps", "batch", "planned", "replay_batch", "replay_every", "accumulate"), 1)
        for name, few in {**least, "keep_latents": 0, "seed": 0}.items():
            if getattr(self, name) < few:
                raise UserError(f"{name} is {getattr(self, name)}: give at least {few}")
        if self.seed > LARGEST_SEED:
            raise UserError(f"seed is {self.seed}: give at most {LARGEST_SEED}")
        for name in ("learning_rate", "basis_rate", "trigger_rate"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give a number between 0 and 1, such as 0.001")
        for name in (
            "interference_weight", "replay_weight", "protection", "drift_budget", "lower_steps", "weight_decay", "warmup", "clip",
            "min_snr",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 or more")
        if not 0 < self.rank_energy <= 1:
            raise UserError(f"rank_energy is {self.rank_energy}: give a share up to 1, such as 0.9")
        if not 0 <= self.caption_dropout < 1:
            raise UserError(f"caption_dropout is {self.caption_dropout}: give a share below 1, such as 0.1")
        if self.shift <= 0:
            raise UserError(f"shift is {self.shift}: give a number above 0, such as 3")
        words = {"optimiser": OPTIMISERS, "schedule": SCHEDULES, "timesteps": TIMESTEPS, "retraction": RETRACTIONS}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}: use one of {', '.join(known)}")
        if "@trigger" in self.layers and not self.learn_trigger:
            raise UserError("layers '@trigger' are the embeddings of the trigger: turn learn_trigger on, or name other layers")
        if self.warmup >= self.steps:
            raise UserError(f"warmup is {self.warmup} of {self.steps} steps: give less")
        if self.optimiser == "prodigy" and self.learning_rate < 0.1:
            raise UserError(f"prodigy finds the rate itself and multiplies it by learning_rate, {self.learning_rate}: give 1")
        if self.gradient_checkpointing and self.hypergradient != "none":
            raise UserError("a hypergradient cannot go through gradient_checkpointing: leave one of them out")
        if self.line_search and (not self.lower_steps or self.hypergradient != "none"):
            raise UserError(
                "line_search looks at the objective with lora_up as it is: give lower_steps, such as 3, and hypergradient none"
            )
        if self.replay_target not in ("base", "before"):
            raise UserError(f"replay_target is {self.replay_target!r}: use 'base' or 'before'")
        if parse(self.hypergradient)[1] and not self.lower_steps:
            raise UserError("a hypergradient needs lower_steps: give 1 or more, such as 3")
        if parse(self.hypergradient)[1] and not self.learn_basis:
            raise UserError("a hypergradient is of the bases: turn learn_basis on, or leave the hypergradient out")


def settings(config: TrainingConfig) -> dict[str, str]:
    """The options as file metadata"""
    return {f"seqlora.{k}": str(v) for k, v in asdict(config).items()}


@dataclass
class PictureOptions:
    """How a folder of pictures becomes references."""

    resolution: int = 0  # side of the square, pixels; 0: the model's own
    buckets: bool = False  # each picture in its own shape, of that area at most; else a square from the centre
    masks: str = "files"  # how much each pixel counts: from name.mask.png files, the alpha channel, or none
    flip: bool = False  # mirror images too
    caption: str = TEMPLATE  # of pictures without a .txt file

    def validate(self) -> None:
        """UserError for masks from nowhere and for sizes that no model takes"""
        if self.masks not in ("files", "alpha", "none"):
            raise UserError(f"masks is {self.masks!r}: use 'files', 'alpha' or 'none'")
        if self.resolution % 8 or self.resolution != 0 and self.resolution < 32:
            raise UserError(
                f"resolution is {self.resolution}: give a multiple of 8 from 32 on, such as 512, or 0 for the model's own"
            )


@dataclass(frozen=True)
class Checkpointing:
    """How a run survives being stopped."""

    every: int = 0  # steps between checkpoints; 0: only when the run is cancelled
    keep: int = 2  # checkpoints kept
    resume: bool = True  # go on with an unfinished run of this concept, if there is one

    def validate(self) -> None:
        """UserError for numbers that are too small"""
        if self.every < 0 or self.keep < 1:
            raise UserError(f"checkpoints every {self.every} steps, {self.keep} kept: give 0 or more, and at least 1 to keep")
