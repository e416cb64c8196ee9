"""Training in several processes, each on its part of every batch: what they must agree on, through accelerate.

Every process draws the same batches from the same seed and takes its own rows; gradients and the numbers that steer the
run are averaged, so that all make the same steps.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .config import TrainingConfig
from .errors import UserError


class Workers:
    """One process, or one of several; `accelerator`: accelerate's, None for one."""

    def __init__(self, accelerator=None):
        self.accelerator = accelerator
        self.count = 1 if accelerator is None else accelerator.num_processes
        self.index = 0 if accelerator is None else accelerator.process_index

    @property
    def device(self) -> str | None:
        """Where this process's model belongs; None if it is left to the user"""
        return None if self.accelerator is None else str(self.accelerator.device)

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks"""
        return self.index == 0

    def rows(self, total: int) -> slice:
        """This process's rows of a batch"""
        return slice(self.index, total, self.count)

    @torch.no_grad()
    def average(self, tensors: list[Tensor]) -> None:
        """In place, over all processes, in one exchange"""
        if self.count == 1:
            return
        flat = self.accelerator.reduce(torch.cat([t.flatten().float() for t in tensors]), "mean")
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors])):
            tensor.copy_(part.view_as(tensor))

    def any(self, here: bool) -> bool:
        """Whether it is so in any process"""
        if self.count == 1:
            return here
        return bool(self.accelerator.reduce(torch.tensor(float(here), device=self.accelerator.device), "sum") > 0)

    def check(self, config: TrainingConfig) -> None:
        """UserError for options that several processes cannot share"""
        if config.batch % self.count:
            raise UserError(
                f"a batch of {config.batch} cannot be shared by {self.count} processes: give a multiple of {self.count}"
            )
        if self.count > 1 and config.hypergradient != "none":
            raise UserError("a hypergradient is worked out in one process only: start one, or set hypergradient to 'none'")

    def wait(self) -> None:
        """Until all processes are here"""
        if self.count > 1:
            self.accelerator.wait_for_everyone()


def launched(device: str) -> Workers:
    """As `accelerate launch` (or torchrun) started this process; one process otherwise"""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Workers()
    from accelerate import Accelerator

    return Workers(Accelerator(cpu=device == "cpu"))
