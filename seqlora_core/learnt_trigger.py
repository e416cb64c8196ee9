"""The trigger's own tokens: their embeddings, learnt beside the LoRA, move nothing that a prompt without them says.

Textual inversion (Gal et al. 2022) of the tokens that the trigger has anyway, as Mix-of-Show and pivotal tuning do it
beside a LoRA; kept as a low-rank change of the token table, so that one LoRA file holds it and its strength scales it.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import torch
from torch import Tensor

from .adapter import LayerDelta
from .attach import Attachment, attached
from .denoiser import Denoiser
from .errors import UserError
from .prompts import spaced

SAMPLE = 4096  # rows of a table that its spread is measured on
BETAS = (0.9, 0.99)
FEW = 8  # tokens: triggers of fewer learn less (docs/RESULTS.md, "How long a trigger")
CONSONANTS, VOWELS, ENDS = "bdfgjkmpqvwxz", "aeiou", "bdfgkmnprtvwxz"
SYLLABLES, WORDS = 4, 6  # of a made-up word, and of them at most
COMMON = "a"  # a word that stands before another, or in its place


@torch.no_grad()
def token_ids(denoiser: Denoiser, prompts: Iterable[str]) -> dict[str, list[int]]:
    """Token table -> ids that it is asked for while these prompts are encoded, in their order"""
    found: dict[str, list[int]] = {site.name: [] for site in denoiser.token_tables()}
    attachment = Attachment()
    attachment.record = lambda name, ids: found[name].extend(ids.flatten().tolist())
    with attached(denoiser.token_tables(), attachment):
        denoiser.read_prompts(list(dict.fromkeys(prompts)))
    return found


def tokens_of(denoiser: Denoiser, prompts: Iterable[str]) -> dict[str, set[int]]:
    """The same, each once"""
    return {name: set(ids) for name, ids in token_ids(denoiser, prompts).items()}


def tokens_within(denoiser: Denoiser, trigger: str, captions: Iterable[str]) -> dict[str, set[int]]:
    """Token table -> ids that the trigger has in these captions: with many text encoders a word has others after a space, or
    in capitals, than it has by itself"""
    word, captions = re.compile(spaced(trigger), re.IGNORECASE), list(captions)
    said, around = tokens_of(denoiser, captions), tokens_of(denoiser, [word.sub(COMMON, c) for c in captions])
    return {name: said[name] - around[name] for name in said}


def made_up(denoiser: Denoiser, taken: dict[str, set[int]], count: int, seed: str) -> str:
    """Words that one can say, together of `count` tokens or more that are not `taken` (table -> ids), as one table has them;
    "" where there are none, as with a text encoder that reads letters"""
    rng, words = random.Random(seed), []
    while len(words) < WORDS:
        syllables = ("".join(map(rng.choice, (CONSONANTS, VOWELS, ENDS))) for _ in range(SYLLABLES))
        words.append("".join(syllables))
        if max(len(ids - taken[name]) for name, ids in tokens_of(denoiser, [" ".join(words)]).items()) >= count:
            return " ".join(words)
    return ""


class LearntTrigger:
    """What is added to the embeddings of those of the trigger's tokens that no other prompt has.

    shift: token table -> [k, width], learnt by Adam at `rate` times the table's spread.  others: prompts whose tokens are
    to stay as they are; captions: that call it.  Raises UserError for a trigger without a token of its own.
    """

    def __init__(
        self, denoiser: Denoiser, trigger: str, others: Iterable[str], rate: float, captions: Iterable[str] = ()
    ):  # fmt: skip
        alone, within = tokens_of(denoiser, [trigger]), tokens_within(denoiser, trigger, [trigger, *captions])
        own, taken = {name: ids | within[name] for name, ids in alone.items()}, tokens_of(denoiser, others)
        self.denoiser, self.taken = denoiser, taken
        self.tables = {s.name: s for s in denoiser.token_tables()}
        self.tokens = {name: sorted(own[name] - taken[name]) for name in self.tables if own[name] - taken[name]}
        if not self.tokens:
            raise UserError(
                f"every token of the trigger {trigger!r} is also in other prompts or triggers: choose a rarer word, or train "
                "without learn_trigger"
            )
        self.shift: dict[str, Tensor] = {}
        rates: list[dict] = []
        for name, tokens in self.tokens.items():
            weight = self.tables[name].modules[0].weight.detach()
            shift = torch.zeros(len(tokens), weight.shape[1], device=denoiser.device, requires_grad=True)
            self.shift[name] = shift
            rates.append({"params": [shift], "lr": rate * float(weight[:SAMPLE].float().std())})
        self.rates = [group["lr"] for group in rates]
        self.optimiser = torch.optim.Adam(rates, betas=BETAS)
        self._ups = {name: self._up(name) for name in self.tokens}

    def _up(self, name: str) -> Tensor:
        """[vocabulary, k]: 1 where a token is one of the trigger's"""
        tokens, shift = self.tokens[name], self.shift[name]
        up = torch.zeros(self.tables[name].out_features, len(tokens), device=shift.device)
        up[tokens, torch.arange(len(tokens))] = 1.0
        return up

    def notes(self, trigger: str) -> list[str]:
        """What the user should know about so short a trigger"""
        said = [tokens_of(self.denoiser, [text]) for text in (trigger, f"{COMMON} {trigger}")]
        own = max(len(ids[name] & set(tokens)) for ids in said for name, tokens in self.tokens.items())
        if own >= FEW:
            return []
        longer = made_up(self.denoiser, self.taken, FEW, trigger)
        return [
            f"the trigger {trigger!r} has {own} token{'s' * (own > 1)} of its own to learn: one of {FEW} or more"
            f"{longer and f', such as {longer!r},'} learns better and moves other prompts no further"
        ]

    @property
    def parameters(self) -> list[Tensor]:
        """What gradients are taken in"""
        return list(self.shift.values())

    def live(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Layer -> (down, up), differentiable in the shifts: what attach.Attachment adds"""
        return {name: (shift, self._ups[name]) for name, shift in self.shift.items()}

    def layers(self) -> dict[str, LayerDelta]:
        """For the concept's LoRA (detached copies)"""
        return {n: LayerDelta(s.detach().clone(), self._ups[n].clone()) for n, s in self.shift.items() if s.any()}

    def step(self, scale: float = 1.0) -> None:
        """One step, at `scale` times the rate, from the gradients that a backward pass left on the shifts"""
        for group, rate in zip(self.optimiser.param_groups, self.rates):
            group["lr"] = scale * rate
        self.optimiser.step()
