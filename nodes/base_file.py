"""Which file a MODEL link was loaded from, as far as the prompt says."""

from __future__ import annotations

from pathlib import Path

import folder_paths

from ..seqlora_core.demo_model import DEMO_MODEL

# input of a loader that names a file -> ComfyUI's folder of such files
_FILES = {"ckpt_name": "checkpoints", "unet_name": "diffusion_models", "model_name": "diffusion_models"}
_DEMO = "SeqLoRADemoModel"


def base_file(prompt: dict | None, node_id: str) -> Path | None:
    """The checkpoint at the end of the chain of `model` inputs before a node; None where the chain does not show one"""
    prompt, seen = prompt or {}, set()
    while node_id in prompt and node_id not in seen:
        seen.add(node_id)
        node = prompt[node_id]
        if node.get("class_type") == _DEMO:
            return DEMO_MODEL
        inputs = node.get("inputs", {})
        for word, folder in _FILES.items():
            name = inputs.get(word)
            found = folder_paths.get_full_path(folder, name) if isinstance(name, str) else None
            if found:
                return Path(found)
        link = inputs.get("model")
        if not isinstance(link, list):
            return None
        node_id = str(link[0])
    return None
