"""A stack as one ordinary LoRA file that any loader reads."""

from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..seqlora_core.adapter import concatenate, is_token_table, save_adapter
from ..seqlora_core.composition import MODES, Wishes
from ..seqlora_core.embedding import trigger_embedding
from ..seqlora_core.errors import UserError
from ..seqlora_core.low_rank import truncated
from ..seqlora_core.names import safe_name
from ..seqlora_core.tensor_file import write_safetensors
from .apply_stack import cap_input, projection_inputs
from .comfy_patches import full_differences
from .comfy_texts import Texts
from .comfy_weights import Weights
from .composing import Composed, compose_stack
from .folders import TakenOut
from .loading import entry_file
from .types import ALWAYS, CATEGORY, MODEL, StackType, advanced

TAKEN_OUT = TakenOut()  # a node has no state of its own


class SeqLoRASaveStack(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="SeqLoRASaveStack",
            display_name="Save Stack (SeqLoRA)",
            category=CATEGORY,
            description="Writes the stack as one ordinary LoRA into models/loras.",
            is_output_node=True,
            inputs=[
                StackType.Input("stack"),
                io.String.Input("name", default="my_stack", tooltip="File name in models/loras, without .safetensors."),
                io.Combo.Input("mode", options=list(MODES), default="sum", tooltip="As in Apply Stack."),
                io.Float.Input("amount", default=1.0, min=0.0, max=1.0, step=0.05, tooltip="As in Apply Stack."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of this name."),
                io.Int.Input(
                    "rank", default=0, min=0, max=4096, optional=True, tooltip="At most so many directions a layer; 0 is exact."
                ),
                *projection_inputs(),
                io.Model.Input(
                    "model", optional=True, tooltip="To read LoRAs of other kinds than plain ones: LoHa, LoKr, DoRA ..."
                ),
                io.Clip.Input("clip", optional=True),
                advanced(cap_input()),
                advanced(
                    io.Boolean.Input(
                        "embeddings",
                        default=False,
                        optional=True,
                        tooltip="Writes each learnt trigger into models/embeddings too: embedding:NAME in a prompt then says what its words say. "
                        "Connect the clip.",
                    )
                ),
            ],
            outputs=[io.String.Output(display_name="path")],
        )

    @classmethod
    def fingerprint_inputs(cls, name, **_):
        """Runs again if its file was taken out of models/loras, and not because this very node put it there"""
        return name and TAKEN_OUT.look((name,), _file(name).exists())  # of a connected name there is no word yet

    @classmethod
    def execute(
        cls,
        stack,
        name,
        mode,
        amount,
        overwrite,
        rank=0,
        order="symmetric",
        restore=False,
        norm_control=False,
        model=None,
        clip=None,
        cap=0.0,
        embeddings=False,
    ) -> io.NodeOutput:
        path = _file(name)
        if path.exists() and not overwrite:
            raise UserError(f"{path.name} exists in models/loras: choose another name, or switch overwrite on")
        if path.exists() and any(path.samefile(entry_file(e)) for e in stack.entries):
            raise UserError(
                f"{path.name} is one of the LoRAs of the stack: choose another name, else it would be lost, and be in itself next time"
            )
        weights = Weights(model, clip) if model is not None else None
        wishes = Wishes(order, restore=restore, cap=cap or None)
        composed = compose_stack(stack, mode, amount, wishes, weights, norm_control, exact=True)
        read = [m for m in composed.members if clip is None and m.entry.part != MODEL]
        unread = next((m for m in read if m.fitted.unread_texts), None)
        if unread:
            raise UserError(
                f"{unread.concept.name} changes the text encoder too, first {unread.fitted.unread_texts[0]}: connect the clip that it "
                "is for, else that would not be in the file"
            )
        timed = next((p.source for p in composed.parts if (p.start, p.end) != ALWAYS), None)
        if timed:
            raise UserError(f"{timed} acts on some steps only, which a file cannot say: take that off, or use Apply Stack")
        adapters = [p.adapter.scaled(p.strength) for p in composed.parts]
        adapter, lost = truncated(concatenate(adapters), rank or None)
        adapter.metadata = {
            "seqlora.trigger": ", ".join(filter(None, dict.fromkeys(c.trigger for c in composed.concepts))),
            "modelspec.title": "SeqLoRA stack",
        }
        extra, left = full_differences(composed.parts, weights)
        called = _embeddings(composed, clip, path.stem, overwrite) if embeddings else []
        save_adapter(path, adapter, extra=extra)
        TAKEN_OUT.look((name,), True)
        said = f"saved {path.name}" + (f", {lost:.2%} of its energy lost to rank {rank}" if rank else "")
        if composed.chained:
            said += (
                f"; {len(composed.chained)} weights are changed by several LoRAs that look at the weight first, as DoRA does: the file adds "
                f"what each does alone, Apply Stack does one after the other, first {composed.chained[0]}"
            )
        said += "".join(f"; {note.removesuffix('.')}" for note in composed.notes(mode, wishes.cap, exact=True))
        if left:
            said += f"; {len(left)} changes that no file can hold are not in it, first {left[0]}"
        if called:
            said += f"; in prompts: {', '.join(called)}"
        return io.NodeOutput(str(path), ui=ui.PreviewText(said))


def _file(name: str) -> Path:
    return Path(folder_paths.get_folder_paths("loras")[0]) / f"{safe_name(name, 'file name')}.safetensors"


def _embeddings(composed: Composed, clip, name: str, overwrite: bool) -> list[str]:
    """Writes the learnt triggers of a stack, each as NAME_CONCEPT in models/embeddings; how prompts call them"""
    both = zip(composed.concepts, composed.parts)
    learnt = [(c, p.adapter.scaled(p.strength)) for c, p in both if any(map(is_token_table, p.adapter.layers))]
    if not learnt:
        raise UserError(
            "nothing of the stack has a trigger that was learnt: switch embeddings off, or train with learn_trigger"
        )
    if clip is None:
        raise UserError("embeddings are made of the text encoder's own: connect the clip, without LoRAs, or switch them off")
    folder = Path(folder_paths.get_folder_paths("embeddings")[0])
    paths = [folder / f"{name}_{safe_name(c.name, 'concept name')}.safetensors" for c, _ in learnt]
    twice = next((p for p in paths if paths.count(p) > 1), None)
    if twice:
        raise UserError(f"two concepts of the stack would be {twice.name}: save their embeddings apart")
    there = next((p for p in paths if p.exists()), None)
    if there and not overwrite:
        raise UserError(f"{there.name} exists in models/embeddings: choose another name, or switch overwrite on")
    texts = Texts(clip)
    for path, (concept, adapter) in zip(paths, learnt):
        trigger = next(iter(concept.adapter.triggers), concept.trigger)
        write_safetensors(path, trigger_embedding(texts, adapter, trigger), {"seqlora.trigger": trigger})
    return [f"embedding:{p.stem}" for p in paths]
