"""The options of training as the command line and recipes name them: config's fields, in groups, with what they mean.

An option that is not given is absent from the parsed arguments, so that what was given can be told from a default.
"""

from __future__ import annotations

import argparse
import contextlib
import difflib
from dataclasses import fields
from typing import Any

from .config import Checkpointing, PictureOptions, TrainingConfig
from .errors import UserError

# group -> option -> what it means
GROUPS: dict[str, dict[str, str]] = {
    "the method": {
        "rank": "directions a layer gives the concept",
        "rank_energy": "adaptive rank: a layer gets no more of them than hold this share of what all of them see of the concept",
        "layers": "only layers whose name holds one of these words, such as attn2 or up_blocks; a minus leaves out: -mid_block; "
        "@text: those that read the prompt; @trigger: none, with learn_trigger its embeddings alone",
        "steps": "training steps",
        "batch": "pictures a step",
        "learning_rate": "of lora_up",
        "basis_rate": "of lora_down's basis",
        "interference_weight": "of the interference energy: how strongly others are protected",
        "drift_budget": "how far the planned concepts together may move unrelated prompts (0.02: two percent; 0: no limit)",
        "keep_latents": "references stored in the library, in latent form, for replay by later concepts (0: none)",
        "learn_trigger": "learn the embeddings of the trigger's own tokens too, which no prompt without them ever meets",
        "trigger_rate": "of these embeddings, in units of the spread of all embeddings",
        "text_encoder": "adapt the attention of the text encoder (its CLIPs) too; all concepts of a library alike",
        "retraction": "how the basis stays orthonormal: qr or polar",
    },
    "prior preservation": {
        "replay_weight": "of replay: pictures that the model itself drew for unrelated prompts, for the class word and for "
        "the captions with other triggers, on which it must go on predicting what it predicted; 0: none",
        "replay_batch": "replayed pictures a step",
        "replay_every": "steps between replays",
        "replay_target": "what they are held to: base, or before (this concept)",
        "use_decoys": "replay the class word and other triggers too",
    },
    "optimisation": {
        "optimiser": "of lora_up: adam, adamw, sgd, rmsprop, prodigy (needs prodigyopt), adam8bit or adamw8bit (bitsandbytes); "
        "lora_down's basis has its own, Riemannian Adam",
        "weight_decay": "of lora_up",
        "schedule": "of both learning rates: half (whole for the first half, then to zero), constant, linear, cosine or polynomial",
        "warmup": "steps of rising rate before it",
        "accumulate": "batches to a step",
        "clip": "longest gradient (0: any)",
        "gradient_checkpointing": "less memory for a third more time",
        "timesteps": "noise levels: model (as the family was trained), uniform, logit_normal or shifted",
        "shift": "towards noise, of shifted ones",
        "min_snr": "gamma of min-SNR weighting, such as 5, for models that predict noise or velocity (0: none)",
    },
    "pictures": {
        "resolution": "side of the square they are cropped to, pixels (0: the model's own)",
        "buckets": "keep each picture's shape, at that area or its own if that is less, instead of cropping squares",
        "masks": "what counts in a picture: files (name.mask.png beside it, white counts), alpha (its transparency), or none",
        "flip": "mirror images too; not for what is not symmetrical, nor for writing",
    },
    "captions": {
        "caption": "for pictures without a .txt file beside them",
        "caption_dropout": "share of captions left out",
        "shuffle_tags": "put the comma-separated parts of captions in other orders, those with the trigger first",
    },
    "two levels": {
        "lower_steps": "lora_up steps to one basis step (0: both at once)",
        "hypergradient": "of the basis step: none, neumann:K or cg:K",
        "line_search": "of the basis step, which then never makes the objective worse on its own batch",
    },
    "earlier concepts": {
        "earlier_active": "train on top of them",
        "concept_dropout": "switch them on and off at random meanwhile",
        "protection": "weight of what they see in the interference energy",
        "orthogonal": "keep out of their directions",
        "whitened": "measure that in what the layers see",
        "data_start": "start from the directions in which the concept stands out",
        "learn_basis": "move the directions while training",
    },
    "stopping": {
        "every": "steps between checkpoints (0: only when stopped with Ctrl-C)",
        "keep": "checkpoints kept",
        "resume": "go on with an unfinished run of this concept; without, it is begun anew, and what it left replaced at the end",
    },
}
CLASSES = (TrainingConfig, PictureOptions, Checkpointing)
FLAGS = {"interference_weight": "lambda", "every": "checkpoint-every", "keep": "checkpoint-keep"}
_NAMES = {"seed", *(name for options in GROUPS.values() for name in options)}
DEFAULTS: dict[str, Any] = {f.name: f.default for c in CLASSES for f in fields(c) if f.name in _NAMES}


def flag(name: str) -> str:
    """ "learning_rate" -> "learning-rate": as on the command line and, with '_', in a recipe"""
    return FLAGS.get(name, name).replace("_", "-")


EMPTY = {"layers": "all"}  # what no words stand for, if not for nothing
COMMAND_LINE = ("preview-every", "pictures", "device", "dtype", "again")  # of one run, not of what it makes


def add_options(parser: argparse.ArgumentParser, groups: dict[str, dict[str, str]] = GROUPS) -> None:
    """All options of these groups, absent from the result unless given"""
    for title, options in groups.items():
        group = parser.add_argument_group(title)
        for name, text in options.items():
            default = DEFAULTS[name]
            if isinstance(default, bool):
                kind = {"action": argparse.BooleanOptionalAction}
                shown = "yes" if default else "no"
            else:
                kind = {"type": type(default), "metavar": {int: "N", float: "X", str: "TEXT"}[type(default)]}
                shown = default if default != "" else EMPTY.get(name, "none")
            group.add_argument(
                f"--{flag(name)}", dest=name, default=argparse.SUPPRESS, help=f"{text} (default: {shown})".replace("%", "%%"), **kind
            )  # fmt: skip


def build(cls: type, given: dict[str, Any]) -> Any:
    """A config of this class from those options that belong to it, checked"""
    config = cls(**{f.name: given[f.name] for f in fields(cls) if f.name in given})
    config.validate()
    return config


def from_recipe(values: dict[str, Any], others: dict[str, type], where: str) -> dict[str, Any]:
    """A recipe's table with options under their own names, each of its own kind.

    others: words that may stand beside options, with their kinds.  Raises UserError for an unknown word or a value of
    another kind.
    """
    names = {flag(n).replace("-", "_"): n for n in DEFAULTS} | {word: word for word in others}
    out = {}
    for word, value in values.items():
        name = names.get(word.replace("-", "_"))
        if name is None and word.replace("_", "-") in COMMAND_LINE:
            raise UserError(f"{where}: {word} is no option of a recipe: say --{word.replace('_', '-')} on the command line")
        if name is None:
            near = difflib.get_close_matches(word, list(names), 1)
            raise UserError(f"{where}: unknown option {word!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
        wanted = others.get(word) or type(DEFAULTS[name])
        if wanted is float and type(value) is int:
            with contextlib.suppress(OverflowError):  # of hundreds of digits
                value = float(value)
        if type(value) is not wanted:
            raise UserError(f"{where}: {word} is {value!r:.80}: give {_KINDS[wanted]}")
        out[name] = value
    return out


_KINDS = {
    int: "a whole number",
    float: "a number",
    str: "a text in quotes",
    bool: "true or false",
    list: "tables that begin with [[concept]]",
}
