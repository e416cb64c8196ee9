"""Options of training that few people touch, in one node, so that Train Concept stays short."""

from comfy_api.latest import io

from ..seqlora_core.config import TIMESTEPS, Checkpointing, TrainingConfig
from ..seqlora_core.optimisers import OPTIMISERS, SCHEDULES
from .concept import LAYERS
from .types import CATEGORY, CHECKPOINTING, Options, OptionsType


class SeqLoRATrainingOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        default, checkpointing = TrainingConfig(), CHECKPOINTING
        return io.Schema(
            node_id="SeqLoRATrainingOptions",
            display_name="Training Options (SeqLoRA)",
            category=CATEGORY,
            description="How Train Concept trains, for those who want another way than the usual one.",
            inputs=[
                io.Boolean.Input(
                    "gradient_checkpointing", default=default.gradient_checkpointing,
                    tooltip="Takes much less memory and a third more time; weights that do not fit wait in main memory.",
                ),
                io.Int.Input(
                    "accumulate", default=default.accumulate, min=1, max=64,
                    tooltip="Batches to a step: 4 with batch_size 2 learns as from 8 pictures, in the memory of 2.",
                ),
                io.Int.Input(
                    "replay_batch", default=default.replay_batch, min=1, max=64,
                    tooltip="Pictures of other things that a step keeps as they are. Lower it if memory runs out.",
                ),
                io.Combo.Input(
                    "optimiser", options=list(OPTIMISERS), default=default.optimiser,
                    tooltip="prodigy needs the package prodigyopt and a learning rate of 1; the 8-bit ones need bitsandbytes.",
                ),
                io.Combo.Input(
                    "schedule", options=list(SCHEDULES), default=default.schedule,
                    tooltip="Of the learning rate. half: whole for the first half, then falling to zero.",
                ),
                io.Int.Input("warmup", default=default.warmup, min=0, max=10_000, tooltip="Steps of rising learning rate at the start."),
                io.Float.Input(
                    "weight_decay", default=default.weight_decay, min=0.0, max=10.0, step=0.01, round=False,
                    tooltip="Pulls the concept's weights towards zero.",
                ),
                io.Float.Input(
                    "clip_gradient", default=default.clip, min=0.0, max=100.0, step=0.1, round=False,
                    tooltip="Longest gradient of a step, such as 1. 0: any.",
                ),
                io.Combo.Input(
                    "timesteps", options=list(TIMESTEPS), default=default.timesteps,
                    tooltip="Which noise levels are trained. model: as the model itself was.",
                ),
                io.Float.Input(
                    "shift", default=default.shift, min=0.01, max=100.0, step=0.1, round=False,
                    tooltip="Of timesteps 'shifted': above 1 towards noise.",
                ),
                io.Float.Input(
                    "min_snr", default=default.min_snr, min=0.0, max=100.0, step=0.5, round=False,
                    tooltip="Min-SNR weighting, such as 5, for SD1.5, SD2 and SDXL. 0: none.",
                ),
                io.Float.Input(
                    "caption_dropout", default=default.caption_dropout, min=0.0, max=0.99, step=0.01, round=False,
                    tooltip="Share of captions left out, such as 0.1.",
                ),
                io.Boolean.Input(
                    "shuffle_tags", default=default.shuffle_tags,
                    tooltip="Puts the comma-separated parts of captions in other orders, those with the trigger first.",
                ),
                io.Int.Input(
                    "keep_latents", default=default.keep_latents, min=0, max=64,
                    tooltip="Reference pictures stored in the library, so that later concepts do not forget this one. 0: none.",
                ),
                io.Boolean.Input(
                    "text_encoder", default=default.text_encoder, optional=True,
                    tooltip="Trains the CLIP text encoders too. All concepts of a library alike.",
                ),
                io.Int.Input(
                    "lower_steps", default=default.lower_steps, min=0, max=100, optional=True,
                    tooltip="Steps of lora_up to one of the basis, on different pictures. 0: both at once, which is as good and faster.",
                ),
                io.String.Input(
                    "hypergradient", default=default.hypergradient, optional=True,
                    tooltip="With lower_steps: none, neumann:3 or cg:3. Counts in how lora_up follows the basis; takes longer.",
                ),
                io.Boolean.Input(
                    "learn_trigger", default=default.learn_trigger, optional=True,
                    tooltip="Learns the trigger's own words in the text encoders too; a long made-up word, or two, learns more. No other prompt is moved by that.",
                ),
                io.String.Input("layers", default=default.layers, optional=True, tooltip=LAYERS),
                io.Int.Input(
                    "replay_every", default=default.replay_every, min=1, max=64, optional=True,
                    tooltip="Steps from one replay of other things to the next. 2 takes a quarter less time and learns a little less.",
                ),
                io.Int.Input(
                    "checkpoint_every", default=checkpointing.every, min=0, max=100_000, optional=True,
                    tooltip="Steps between checkpoints, from which a run that was killed goes on. 0: only when it is cancelled.",
                ),
                io.Int.Input(
                    "checkpoint_keep", default=checkpointing.keep, min=1, max=100, optional=True,
                    tooltip="How many checkpoints are kept until the concept is whole.",
                ),
                io.Float.Input(
                    "trigger_rate", default=default.trigger_rate, min=0.001, max=1.0, step=0.05, round=False, optional=True,
                    tooltip="With learn_trigger: how fast the trigger's words move, in units of the spread of all words. Lower it if samples break up.",
                ),
            ],
            outputs=[OptionsType.Output(display_name="options")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip_gradient, checkpoint_every=CHECKPOINTING.every, checkpoint_keep=CHECKPOINTING.keep, **options
    ) -> io.NodeOutput:
        return io.NodeOutput(Options({"clip": clip_gradient, **options}, Checkpointing(checkpoint_every, checkpoint_keep)))
