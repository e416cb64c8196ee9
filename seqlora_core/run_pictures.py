"""What one sees of a run on the command line, as PNG files: previews while it goes on, its curves and its contact sheet after it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .denoiser import Denoiser
from .errors import UserError
from .library import Library
from .plots import kept_curves_picture, save_picture, to_pil
from .preview import Preview, sample_sheet
from .trainer import Step


class RunPictures:
    """FOLDER/NAME.step-000100.png every so many steps (0: none), FOLDER/NAME.curves.png, FOLDER/NAME.sheet.png.

    tell: hears of a preview that cannot be drawn or written, which ends no run.
    """

    def __init__(self, folder: Path, every: int = 0, tell: Callable[[str], None] = print):
        if every < 0:
            raise UserError(f"preview_every is {every}: give the steps between previews, or 0 for none")
        self.folder, self.every, self.tell = folder, every, tell
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the folder {folder} for pictures: {error.strerror}; choose another") from error

    def watch(self, name: str, preview: Preview, on_step: Callable[[Step], None]) -> Callable[[Step], None]:
        """`on_step`, and before it a preview whenever one is due"""

        def watched(step: Step) -> None:
            if self.every and (step.number % self.every == 0 or step.number == 1):
                picture = preview.draw(f"step {step.number}", step.snapshot())
                try:
                    if preview.failed:
                        raise UserError(preview.failed)
                    save_picture(picture, self.folder / f"{name}.step-{step.number:06}.png")
                except UserError as error:
                    self.tell(f"{error}; training goes on")
            on_step(step)

        return watched

    def after(self, denoiser: Denoiser, library: Library, name: str, references: Tensor) -> list[str]:
        """references [n, height, width, 3] in 0..1; returns where the two pictures are.  UserError if they cannot be written"""
        found = {
            "curves": kept_curves_picture(library.load(name).adapter.metadata)[0],
            "sheet": sample_sheet(denoiser, library, name, references)[0],
        }
        paths = {kind: self.folder / f"{name}.{kind}.png" for kind in found}
        for kind, picture in found.items():
            save_picture(to_pil(picture), paths[kind])
        return [str(path) for path in paths.values()]
