"""What the method is measured against, each as its authors mean it, and the method's own ablations.

Rows that are trained one concept after another are options of `fit`; rows that combine ordinary LoRAs are functions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from seqlora_core import ordinary
from seqlora_core.adapter import Adapter, LayerDelta, concatenate
from seqlora_core.ordinary import Combine

# everything that is ours, off
PLAIN = dict(
    interference_weight=0.0, replay_weight=0.0, drift_budget=0.0, protection=0.0, use_decoys=False, earlier_active=False,
    concept_dropout=False, whitened=False, data_start=False,
)  # fmt: skip
TRAINED: dict[str, dict] = {
    # Po et al., CVPR 2024: bases frozen, random, orthogonal; only lora_up learns
    "orthogonal_adaptation": PLAIN | dict(learn_basis=False),
    # orthogonal bases that learn, step by step in turn with lora_up; nothing else
    "alternating": PLAIN | dict(lower_steps=1),
    # an ordinary LoRA on top of the earlier ones, with replay of what was there before
    "ordinary_replay": PLAIN | dict(
        orthogonal=False, earlier_active=True, replay_weight=85.0, replay_target="before"
    ),
    # the same and the trigger's embeddings
    "ordinary_replay_learnt_trigger": PLAIN | dict(
        orthogonal=False, earlier_active=True, replay_weight=85.0, replay_target="before", learn_trigger=True
    ),
    # trained apart with the trigger's embeddings learnt, nothing of ours: summed, or by the closed form with its suffix
    "ordinary_learnt_trigger": PLAIN | dict(orthogonal=False, learn_trigger=True),
    "seqlora": {},
}  # fmt: skip
ABLATIONS: dict[str, dict] = {
    "seqlora_no_orthogonality": dict(orthogonal=False),
    "seqlora_no_whitening": dict(whitened=False),
    "seqlora_no_whitening_no_orthogonality": dict(whitened=False, orthogonal=False),
    "seqlora_random_start": dict(data_start=False),
    "seqlora_frozen_basis": dict(learn_basis=False),
    "seqlora_no_decoys": dict(use_decoys=False),
    "seqlora_no_energy": dict(interference_weight=0.0),
    "seqlora_no_protection": dict(protection=0.0),
    "seqlora_no_replay": dict(replay_weight=0.0, drift_budget=0.0),
    "seqlora_not_active": dict(earlier_active=False),
    "seqlora_no_dropout": dict(concept_dropout=False),
    "seqlora_replay_to_before": dict(replay_target="before"),
    "seqlora_fixed_weight": dict(drift_budget=0.0),
    "seqlora_budget_5": dict(drift_budget=0.05),
    "seqlora_budget_10": dict(drift_budget=0.1),
    "seqlora_no_kept_latents": dict(keep_latents=0),
    "seqlora_replay_every_2": dict(replay_every=2),
    "seqlora_image_stream": dict(layers="-@text"),
    "seqlora_text_stream": dict(layers="@text"),
    "seqlora_text_learnt_trigger": dict(layers="@text", learn_trigger=True),
    "seqlora_rank_2": dict(rank=2),
    "seqlora_rank_8": dict(rank=8),
    "seqlora_learnt_trigger": dict(learn_trigger=True),
    # replay within one batch as large as the rivals' instead of beside it: half the time of a step
    "seqlora_learnt_trigger_one_batch": dict(learn_trigger=True, batch=5, replay_batch=3),
    "seqlora_learnt_trigger_fixed_weight": dict(learn_trigger=True, drift_budget=0.0),
    "seqlora_learnt_trigger_budget_3": dict(learn_trigger=True, drift_budget=0.03),
    "seqlora_learnt_trigger_budget_4": dict(learn_trigger=True, drift_budget=0.04),
    # the strongest rival held to our budget, which counts from the bare base model: what is left is our orthogonal bases,
    # energy and decoys
    "ordinary_replay_learnt_trigger_budget": PLAIN
    | dict(orthogonal=False, earlier_active=True, replay_weight=85.0, drift_budget=0.02, learn_trigger=True),
    # textual inversion (Gal et al. 2022) of the trigger's tokens, no LoRA: nothing that could disturb anything else
    "trigger_alone": dict(layers="@trigger", learn_trigger=True),
    # both with the trigger's embeddings learnt at other rates
    "trigger_alone_rate_0.1": dict(layers="@trigger", learn_trigger=True, trigger_rate=0.1),
    "trigger_alone_rate_1": dict(layers="@trigger", learn_trigger=True, trigger_rate=1.0),
    "seqlora_learnt_trigger_rate_0.1": dict(learn_trigger=True, trigger_rate=0.1),
    "seqlora_learnt_trigger_rate_1": dict(learn_trigger=True, trigger_rate=1.0),
    "seqlora_adaptive_rank": dict(rank_energy=0.8),
    "seqlora_alternating": dict(lower_steps=1),
    "seqlora_bilevel_first_order": dict(lower_steps=3),
    "seqlora_bilevel_neumann": dict(lower_steps=3, hypergradient="neumann:3"),
    "seqlora_bilevel_cg": dict(lower_steps=3, hypergradient="cg:3"),
}


def merged(adapters: list[Adapter], merge: Callable[[list[Tensor]], Tensor]) -> Adapter:
    """One adapter of full rank whose change of each weight is `merge` of the adapters' changes."""
    names = dict.fromkeys(n for a in adapters for n in a.layers)
    layers = {}
    for name in names:
        dense = merge([a.layers[name].dense() for a in adapters if name in a.layers])
        layers[name] = LayerDelta(torch.eye(dense.shape[1]), dense)
    return Adapter(layers)


def ties(adapters: list[Adapter], density: float = 0.5) -> Adapter:
    """TIES merging (Yadav et al. 2023), by peft"""
    from peft.utils.merge_utils import ties as merge

    return merged(adapters, lambda parts: merge(parts, torch.ones(len(parts)), density))


def dare_ties(adapters: list[Adapter], density: float = 0.5, seed: int = 0) -> Adapter:
    """DARE, then TIES (Yu et al. 2024), by peft"""
    from peft.utils.merge_utils import dare_ties as merge

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return merged(adapters, lambda parts: merge(parts, torch.ones(len(parts)), density))


def svd(adapters: list[Adapter]) -> Adapter:
    """The sum cut to the rank of one adapter, layer by layer: what peft's add_weighted_adapter does with
    combination_type "svd" and weights of 1"""

    def cut(name: str, delta: LayerDelta) -> LayerDelta:
        rank = max(a.layers[name].rank for a in adapters if name in a.layers)
        u, s, vh = torch.linalg.svd(delta.dense(), full_matrices=False)
        return LayerDelta(vh[:rank], u[:, :rank] * s[:rank])

    return Adapter({n: cut(n, d) for n, d in concatenate(adapters).layers.items()})


# with those of the demo, all rows of ordinary LoRAs together
COMBINED: dict[str, Combine] = ordinary.COMBINED | {
    "ties": lambda a, m, g: ties(a), "dare_ties": lambda a, m, g: dare_ties(a), "svd": lambda a, m, g: svd(a),
}  # fmt: skip
