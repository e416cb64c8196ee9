"""SeqLoRA for ComfyUI: registration only.  Outside ComfyUI there is nothing to register."""

import importlib.util

if __package__ and importlib.util.find_spec("comfy_api") is not None:
    from .nodes.extension import comfy_entrypoint

    WEB_DIRECTORY = "./web"
    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
