"""Where a fit begins: what the concept must leave alone, and its first basis in each layer."""

from __future__ import annotations

import torch

from . import subspace
from .bilevel import Group
from .concept import Concept
from .config import TrainingConfig
from .linalg import orthonormal_basis, project_out
from .statistics import Moments, average


def others_moments(general: Moments, decoy: Moments | None, earlier: list[Concept], config: TrainingConfig) -> Moments:
    """What the concept must leave alone: generic inputs, decoys, and earlier concepts' own inputs."""
    total = general if decoy is None else average([general, decoy])
    protected = average(c.moments for c in earlier)
    if protected is not None and config.protection:
        total = total.plus(protected, config.protection)
    return total


def starting_groups(denoiser, seen, others, earlier, calibration, config, generator) -> tuple[list[Group], list[str]]:
    """Groups of layers of one shape, with the concept's first basis and lora_up = 0."""
    device, parts, notes = denoiser.device, {}, []
    for site in denoiser.sites():
        if site.name not in calibration.moments.layers:  # never ran: a branch for other tasks, as of image editors
            continue
        moment = calibration.moments[site.name]
        if config.whitened:
            metric = subspace.Metric.of(moment)
        else:
            eye = torch.eye(site.in_features)
            metric = subspace.Metric(eye, eye)
        rank, taken, shared = min(config.rank, site.in_features), None, 0
        if config.orthogonal:
            rank = subspace.rank_limit(site.in_features, config.planned, rank)
            held = [c.bases[site.name] for c in earlier if site.name in c.bases]
            taken, shared = subspace.occupied_basis(held, rank)
        if shared:
            notes.append(f"{site.name} is full: the {shared} least used directions of earlier concepts are shared")
        if config.data_start:
            basis = subspace.data_driven_basis(seen[site.name], metric, rank, taken)
        else:
            random = torch.randn(site.in_features, rank, generator=generator)
            basis = orthonormal_basis(project_out(random, taken))
        scale = 1 / site.weight_energy(moment.to(device)).clamp_min(1e-12)
        columns = 0 if taken is None else taken.shape[1]
        key = (site.in_features, site.out_features, rank, columns)
        white_others = metric.white @ others[site.name] @ metric.white
        parts.setdefault(key, []).append((site.name, basis, metric.white, white_others, scale.cpu(), taken))
    groups = []
    for (_, out, rank, columns), layers in parts.items():
        names, bases, whites, moments, scales, takens = zip(*layers)
        stack = [torch.stack(t).to(device) for t in (bases, whites, moments, scales)]
        basis = stack[0].requires_grad_(config.learn_basis)
        up = torch.zeros(len(names), out, rank, device=device, requires_grad=True)
        taken = torch.stack(takens).to(device) if columns else None
        groups.append(Group(list(names), up, basis, stack[1], stack[2], stack[3], taken))
    return groups, notes
