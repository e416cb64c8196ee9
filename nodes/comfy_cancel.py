"""ComfyUI's cancel while a concept is trained: looked at between two steps.

From 0.17 on ComfyUI looks for it in every layer, and its error in the middle of a step would leave nothing whole to keep.
"""

from __future__ import annotations

from collections.abc import Callable

import comfy.model_management as management


class Cancel:
    """`check` ends the prompt if it was cancelled.  From `hold` to `release` ComfyUI's own checks pass, and only this one counts."""

    def __init__(self) -> None:
        self._own: Callable[[], None] | None = None

    @property
    def held(self) -> bool:
        return self._own is not None

    def hold(self) -> None:
        if not self.held:
            self._own = management.throw_exception_if_processing_interrupted
            management.throw_exception_if_processing_interrupted = lambda: None

    def check(self) -> None:
        (self._own or management.throw_exception_if_processing_interrupted)()

    def release(self) -> None:
        """What was cancelled since the last check ends the prompt at ComfyUI's next one"""
        if self.held:
            management.throw_exception_if_processing_interrupted, self._own = self._own, None
