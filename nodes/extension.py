"""The list of nodes."""

from comfy_api.latest import ComfyExtension, io

from .apply_stack import SeqLoRAApplyStack
from .calibrate import SeqLoRACalibrate
from .concept import SeqLoRAConcept
from .concept_images import SeqLoRAConceptImages
from .demo_model import SeqLoRADemoModel
from .folders import offer_sample_loras
from .from_lora_stack import SeqLoRAFromLoraStack
from .interference_report import SeqLoRAInterferenceReport
from .library import SeqLoRALibrary
from .save_stack import SeqLoRASaveStack
from .to_lora_stack import SeqLoRAToLoraStack
from .train_concept import SeqLoRATrainConcept
from .training_options import SeqLoRATrainingOptions

NODES: list[type[io.ComfyNode]] = [
    SeqLoRAConceptImages,
    SeqLoRATrainConcept,
    SeqLoRATrainingOptions,
    SeqLoRAConcept,
    SeqLoRALibrary,
    SeqLoRACalibrate,
    SeqLoRAApplyStack,
    SeqLoRAInterferenceReport,
    SeqLoRASaveStack,
    SeqLoRAFromLoraStack,
    SeqLoRAToLoraStack,
    SeqLoRADemoModel,
]


class SeqLoRAExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


async def comfy_entrypoint() -> SeqLoRAExtension:
    offer_sample_loras()
    return SeqLoRAExtension()
