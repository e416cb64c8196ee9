"""Teach a library one more concept."""

import logging
from dataclasses import replace

import comfy.utils
import torch
from comfy_api.latest import io, ui

from ..seqlora_core.config import TrainingConfig
from ..seqlora_core.errors import UserError
from ..seqlora_core.library import Library
from ..seqlora_core.names import concept_name
from ..seqlora_core.pictures import Pictures
from ..seqlora_core.plots import kept_curves_picture
from ..seqlora_core.preview import Preview, sample_sheet
from ..seqlora_core.teach import train_concept
from .base_file import base_file
from .comfy_cancel import Cancel
from .comfy_denoiser import ComfyDenoiser
from .folders import TakenOut, library_folder, open_library
from .types import CATEGORY, Entry, ImagesType, Options, OptionsType, Stack, StackType, advanced

USE, AGAIN, ANEW = "use it", "train again", "start anew"
PLANNED = 32  # concepts of a library, if nobody says how many


TAKEN_OUT = TakenOut()  # a node has no state of its own


class SeqLoRATrainConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default = TrainingConfig()
        return io.Schema(
            node_id="SeqLoRATrainConcept",
            display_name="Train Concept (SeqLoRA)",
            category=CATEGORY,
            description="Trains one concept on top of all that the library holds, so that they stack by plain addition.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The base model, without LoRAs."),
                io.Clip.Input("clip"),
                io.Vae.Input("vae"),
                ImagesType.Input("images", tooltip="From Concept Images."),
                io.String.Input("library", default="my_library", tooltip="Folder in models/loras/seqlora; made if it is new."),
                io.String.Input("name", default="", placeholder="my_cat", tooltip="File name of the concept."),
                io.String.Input("trigger", default="", placeholder="ohwx", tooltip="A rare word that calls the concept in a prompt."),
                io.String.Input("class_noun", default="", placeholder="cat", tooltip="What it is: person, animal, style ..."),
                io.Int.Input("rank", default=default.rank, min=1, max=128, tooltip="Directions a layer gives this concept."),
                io.Int.Input("steps", default=default.steps, min=1, max=100_000, tooltip="More steps learn more, and take longer."),
                advanced(io.Float.Input(
                    "learning_rate", default=default.learning_rate, min=1e-6, max=1.0, step=1e-4, round=False,
                    tooltip="Lower it if the samples break up.",
                )),
                advanced(io.Float.Input(
                    "interference_weight", default=default.interference_weight, min=0.0, max=1000.0, step=0.01, round=False,
                    tooltip="How strongly other things are protected from this concept.",
                )),
                advanced(io.Int.Input(
                    "seed", default=0, min=0, max=2**32 - 1, control_after_generate=False,
                    tooltip="The same seed trains the same concept.",
                )),
                io.Combo.Input(
                    "if_trained", options=[USE, AGAIN, ANEW], default=USE, optional=True,
                    tooltip="If the library has this concept. train again goes on with a run that was stopped; start anew does not.",
                ),
                advanced(io.Int.Input("batch_size", default=default.batch, min=1, max=64, optional=True, tooltip="Lower it if memory runs out.")),
                advanced(io.Int.Input(
                    "preview_every", default=50, min=0, max=10_000, optional=True, tooltip="Steps between previews; 0 for none."
                )),
                advanced(io.Int.Input(
                    "planned_concepts", default=PLANNED, min=1, max=1000, optional=True,
                    tooltip="How many concepts a new library is planned for; the fewer, the more each may learn.",
                )),
                StackType.Input("after", optional=True, tooltip="Another Train Concept's stack: this one is trained after it."),
                advanced(io.Float.Input(
                    "drift_budget", default=default.drift_budget, min=0.0, max=1.0, step=0.005, round=False, optional=True,
                    tooltip="How far the planned concepts together may move unrelated prompts: 0.02 is two percent. 0: no limit.",
                )),
                OptionsType.Input("options", optional=True, tooltip="From Training Options, if the usual way is not wanted."),
                ImagesType.Input(
                    "regularisation", optional=True,
                    tooltip="From Concept Images: pictures of the class, on which the model must stay as it is.",
                ),
            ],
            outputs=[
                StackType.Output(display_name="stack"),
                io.String.Output(display_name="report"),
                io.Image.Output(display_name="curves"),
                io.Image.Output(display_name="samples"),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, library, name, **_):
        """Runs again if its concept was taken out of the library, and not because this very node put it there"""
        try:
            name = concept_name(name)
            there = name in open_library(library).names
        except UserError:
            there = False
        return TAKEN_OUT.look((library.strip(), name), there)

    @classmethod
    def execute(
        cls, model, clip, vae, images, library, name, trigger, class_noun, rank, steps, learning_rate,
        interference_weight, seed, if_trained=USE, batch_size=8, preview_every=50, planned_concepts=PLANNED, after=None,
        drift_budget=TrainingConfig.drift_budget, options=None, regularisation=None,
    ) -> io.NodeOutput:  # fmt: skip
        name = concept_name(name)
        if if_trained not in (USE, AGAIN, ANEW):  # not every server checks a combo of a prompt sent by POST
            raise UserError(f"if_trained is {if_trained!r}: choose '{USE}', '{AGAIN}' or '{ANEW}'")
        options = options or Options()
        config = TrainingConfig(
            rank=rank,
            steps=steps,
            learning_rate=learning_rate,
            interference_weight=interference_weight,
            seed=seed,
            batch=batch_size,
            drift_budget=drift_budget,
            **options.training,
        )
        config.validate()
        offloads = config.batch + config.replay_batch if config.gradient_checkpointing else 0
        host = ComfyDenoiser(model, clip, vae, offloads=offloads, file=base_file(cls.hidden.prompt, cls.hidden.unique_id))
        with torch.inference_mode(False), torch.enable_grad(), host as denoiser:
            opened = Library(library_folder(library), denoiser.fingerprint(), planned_concepts, create=True)
            if planned_concepts == PLANNED:  # as the node is put down: nobody asked for it
                opened.note = ""
            trained = name in opened.names
            notes = []
            if not trained or if_trained != USE:
                earlier = opened.concepts(without=name, stored_moments=True)
                preview = Preview(denoiser, trigger, class_noun, earlier, tuple(images.images.shape[1:3]))
                progress = _Progress(cls.hidden.unique_id, preview, steps, preview_every, denoiser.cancel)
                _, fit = train_concept(
                    denoiser, opened, _ordinary(images.sets), name, trigger, class_noun, None, config,
                    progress.step, replace_existing=trained,
                    checkpointing=replace(options.checkpointing, resume=if_trained != ANEW),
                    regularisation=_ordinary(regularisation.sets) if regularisation else (), tell=progress.warn,
                )  # fmt: skip
                losses, notes = fit.losses, fit.notes + images.notes
                notes += [f"regularisation: {note}" for note in regularisation.notes] if regularisation else []
                if fit.stopped is not None:
                    raise fit.stopped
                report = f"{name}: trained {len(losses)} steps, loss {_mean(losses[:10]):.4f} to {_mean(losses[-10:]):.4f}; the library holds {len(opened)}."
            else:
                report = f"{name} is in the library already: using it. Set 'if_trained' to '{AGAIN}' to train it anew."
                if opened.unfinished(name):
                    report = (
                        f"{name} was stopped before its end: using it as it is. Set 'if_trained' to '{AGAIN}' to go on with it, "
                        f"or to '{ANEW}' to begin it once more."
                    )
            TAKEN_OUT.look((library.strip(), name), True)
            samples = sample_sheet(denoiser, opened, name, images.images)
            curves = kept_curves_picture(opened.load(name).adapter.metadata)
        stack = Stack([Entry(library.strip(), n) for n in opened.names])
        text = "\n".join([report, *notes])
        return io.NodeOutput(stack, text, curves, samples, ui=ui.PreviewImage(samples, cls=cls))


class _Progress:
    """Progress bar, live preview, a line of text and cancel: what ComfyUI sees of each step."""

    def __init__(self, node_id, preview: Preview, steps: int, preview_every: int, cancel: Cancel):
        self.node_id, self.preview, self.every, self.cancel = node_id, preview, preview_every, cancel
        self.bar = comfy.utils.ProgressBar(steps)
        self.say(f"step 0 of {steps}; a new library is calibrated first")

    def say(self, text: str) -> None:
        from server import PromptServer

        PromptServer.instance.send_progress_text(text, self.node_id)

    def warn(self, note: str) -> None:
        """Before the first step; the report has it too"""
        logging.warning("SeqLoRA: %s", note)
        self.say(note)

    def step(self, step) -> None:
        self.cancel.check()
        picture = None
        if self.every and (step.number % self.every == 0 or step.number == 1):
            picture = ("JPEG", self.preview.draw(f"step {step.number}", step.snapshot()), 768)
            if self.preview.failed:
                logging.warning(self.preview.failed)
        self.bar.update_absolute(step.number, step.total, picture)
        if step.number == step.total:
            self.say(f"{step.total} steps done, drawing the contact sheet")
        elif step.number % 10 == 0 or step.number == 1:
            left = round(step.seconds / step.number * (step.total - step.number))
            left = f"{left // 60}:{left % 60:02} left"
            self.say(f"step {step.number} of {step.total}, {left}, loss {step.loss:.3f}, interference {step.energy:.2g}")


def _ordinary(sets: list[Pictures]) -> list[Pictures]:
    """With tensors that are not inference tensors, as the executor's are"""
    return [replace(s, images=s.images.clone(), masks=None if s.masks is None else s.masks.clone()) for s in sets]


def _mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))
