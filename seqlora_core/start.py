"""Where a fit begins: what the concept must leave alone, and its first basis in each layer."""

from __future__ import annotations

import torch
from torch import Tensor

from . import subspace
from .attach import Site
from .bilevel import Group
from .concept import Concept
from .config import TrainingConfig
from .interference import dense_energy
from .linalg import orthonormal_basis, project_out
from .selection import acts
from .sketch import Operator, Sketch
from .statistics import Moments, average

TOUCHED = 0.1  # cosine from which a direction counts as a concept's
ROUNDED = 1e-3  # share of a basis that may lie beside what its lora_down says


def others_moments(general: Moments, decoy: Moments | None, earlier: list[Concept], config: TrainingConfig) -> Moments:
    """What the concept must leave alone: generic inputs, decoys, and earlier concepts' own inputs."""
    total = general if decoy is None else average([general, decoy])
    protected = average(c.moments for c in earlier)
    if protected is not None and config.protection:
        total = total.plus(protected, config.protection)
    return total


def starting_groups(denoiser, seen, others, earlier, calibration, config, generator) -> tuple[list[Group], list[str]]:
    """Groups of layers of one shape, with the concept's first basis and lora_up = 0.

    No square matrix is made of a layer whose moments are sketches.
    """
    device, parts, notes, metrics, ranks = denoiser.device, {}, [], {}, {}
    for site in (s for s in denoiser.sites() if acts(s.name, config.layers)):
        if site.name not in calibration.moments.layers:  # never ran: a branch for other tasks, as of image editors
            continue
        moment, other = calibration.moments.layers[site.name], others.layers[site.name]
        if isinstance(moment, Sketch) != isinstance(other, Sketch):
            moment, other = calibration.moments[site.name], others[site.name]
        if id(moment) not in metrics:  # with the moment, so that its id is not given again
            metrics[id(moment)] = moment, (subspace.Metric.of if config.whitened else subspace.Metric.plain)(moment)
        metric = metrics[id(moment)][1]
        rank, taken = min(config.rank, site.in_features), None
        if config.orthogonal:
            rank = subspace.rank_limit(site.in_features, config.planned, rank)
            held = [c for c in earlier if site.name in c.bases and site.name in c.adapter.layers]
            found = [_basis_and_up(c, site.name, metric) for c in held]
            bases = [basis for basis, _ in found]
            taken, shared = subspace.occupied_basis(bases, [up for _, up in found], rank)
            ranks[site.in_features] = rank
            if shared is not None:
                losers = [c.name for c, b in zip(held, bases) if (b.mT @ shared).norm() > TOUCHED]
                notes.append(
                    f"{site.name} is full: the {shared.shape[1]} least used directions of earlier concepts are shared, of "
                    + ", ".join(losers)
                )
        if config.data_start:
            own = seen.layers[site.name] if isinstance(moment, Sketch) else seen[site.name]
            basis = subspace.data_driven_basis(own, metric, rank, taken)
            if config.rank_energy < 1:
                rank = subspace.enough(own, metric, basis, config.rank_energy)
                basis = basis[:, :rank].contiguous()
        else:
            random = torch.randn(site.in_features, rank, generator=generator)
            basis = orthonormal_basis(project_out(random, taken))
        scale = (1 / _output_energy(site, moment, device).clamp_min(1e-12)).cpu()
        columns = 0 if taken is None else taken.shape[1]
        key = (site.in_features, site.out_features, rank, columns, isinstance(moment, Sketch))
        parts.setdefault(key, []).append((site.name, basis, metric.white, other, scale, taken))
    if not parts:  # the trigger's embeddings alone
        return [], []
    missed = [moment.missed for moment, _ in metrics.values() if isinstance(moment, Sketch)]
    if missed:
        notes.append(
            f"what wide layers see is kept by its strongest directions: at most {max(missed):.1%} of it lies outside them"
        )
    notes = [*_plan(config, len(earlier), ranks), *notes]
    groups = []
    for (_, out, rank, columns, sketched), layers in parts.items():
        for some in _by_readers(layers) if sketched else [layers]:
            names, bases, whites, moments, scales, takens = zip(*some)
            basis, scale = (torch.stack(t).to(device) for t in (bases, scales))
            up = torch.zeros(len(names), out, rank, device=device, requires_grad=True)
            taken = torch.stack(takens).to(device) if columns else None
            if sketched:
                once = list({(id(w), id(m)): (w, m) for w, m in zip(whites, moments)}.values())
                white = Operator.stack([w for w, _ in once]).to(device)
                moment = Operator.stack([m.operator() for _, m in once]).to(device)
            else:
                white = torch.stack(whites).to(device)
                moment = torch.stack([w @ m @ w for w, m in zip(whites, moments)]).to(device)
            groups.append(Group(list(names), up, basis.requires_grad_(config.learn_basis), white, moment, scale, taken))
    return groups, notes


def _basis_and_up(concept: Concept, layer: str, metric: subspace.Metric) -> tuple[Tensor, Tensor]:
    """The concept's basis, of one that was trained in another metric what its lora_down is in this one; and lora_up as it acts
    on it, that of one that was refitted in other lengths"""
    delta, basis = concept.adapter.layers[layer], concept.bases[layer]
    here = metric.basis(delta.down)
    if project_out(here, basis).norm() > ROUNDED * here.norm():
        basis = orthonormal_basis(here)
    return basis, delta.up @ (basis.mT @ here).mT


def _plan(config: TrainingConfig, earlier: int, ranks: dict[int, int]) -> list[str]:
    """What planning for so many concepts gives this one.  ranks: by the number of a layer's inputs"""
    small = [f"rank {rank} in layers of {inputs} inputs" for inputs, rank in sorted(ranks.items()) if rank < config.rank]
    notes = []
    if small:
        notes.append(f"planned for {config.planned} concepts, each gets {' and '.join(small)}, of {config.rank} asked for")
    if earlier >= config.planned:
        notes.append(
            f"this is concept {earlier + 1} of a library planned for {config.planned}: it takes what room and drift earlier ones "
            "left, and the library may move unrelated prompts by more than its budget"
        )
    return notes


def _output_energy(site: Site, moment: Tensor | Sketch, device) -> Tensor:
    if not isinstance(moment, Sketch):
        return site.weight_energy(moment.to(device))
    return torch.tensor(sum(dense_energy(site.read(m).detach().to(device, torch.float32), moment) for m in site.modules))


def _by_readers(layers: list[tuple]) -> list[list[tuple]]:
    """Apart by how many layers read one input, those of one input in a row: each input's operators are then kept once"""
    readers: dict[tuple[int, int], list[tuple]] = {}
    for layer in layers:
        readers.setdefault((id(layer[2]), id(layer[3])), []).append(layer)
    alike: dict[int, list[tuple]] = {}
    for some in readers.values():
        alike.setdefault(len(some), []).extend(some)
    return list(alike.values())
