"""For scripts that ComfyUI's own python runs: ComfyUI on the path, without a server, and this pack beside it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACK = Path(__file__).resolve().parent.parent


def start(root: Path, pack: Path = PACK, *options: str) -> None:
    """After this `import comfy...` and `import seqlora_pack...` work, on the CPU.  options: more of ComfyUI's command line."""
    sys.argv = [sys.argv[0], "--cpu", *options]
    sys.path.insert(0, str(root))
    import comfy.options

    comfy.options.enable_args_parsing()
    import torch

    torch.set_num_threads(1)
    spec = importlib.util.spec_from_file_location("seqlora_pack", pack / "__init__.py", submodule_search_locations=[str(pack)])
    module = importlib.util.module_from_spec(spec)
    sys.modules["seqlora_pack"] = module
    spec.loader.exec_module(module)


def patched_weights(patched) -> dict:
    """Every patched weight of a ModelPatcher as ComfyUI computes it, by its key; the model is left unpatched"""
    import comfy.utils

    patched.patch_model()
    found = {k: comfy.utils.get_attr(patched.model, k).detach().clone() for k in patched.patches}
    patched.unpatch_model()
    return found
