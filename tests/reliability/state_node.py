"""Nodes that only the soak test installs: what a model in the server looks like from inside, and things that break."""

import hashlib
import json
import sys

import comfy.model_management as management


class SoakModelState:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "after": ("*",)}})
    VALIDATE_INPUTS = classmethod(lambda cls, input_types: True)
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "look", True, "tests"

    def look(self, model, after):
        digest = hashlib.sha256()
        for name, value in sorted(model.model.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
        modules = list(model.model.modules())
        state = {
            "weights": digest.hexdigest(),
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
            "patched_modules": sum("forward" in m.__dict__ for m in modules),
            "replaced_functions": _replaced(),
            "patches": len(model.patches),
            "plain_weights": sum(not p.is_inference() for p in model.model.parameters()),
            "in_training": bool(getattr(management, "in_training", False)),
        }
        return {"ui": {"text": [json.dumps(state)]}}


def _replaced() -> int:
    """Functions of the pack that stand in ComfyUI's modules"""
    modules = [m for name, m in list(sys.modules.items()) if name.split(".")[0] == "comfy"]
    values = [v for m in modules for v in vars(m).values()]
    return sum("seqlora" in (getattr(v, "__module__", None) or "") for v in values)


class SoakBrokenModel:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "calls": ("INT",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "tests"

    def make(self, model, calls):
        made, left = model.clone(), [calls]

        def wrapper(apply_model, arguments):
            left[0] -= 1
            if left[0] < 0:
                raise RuntimeError("broken while it draws")
            return apply_model(arguments["input"], arguments["timestep"], **arguments["c"])

        made.set_model_unet_function_wrapper(wrapper)
        return (made,)


class SoakBrokenVAE:
    """Decodes nothing: a training's first preview fails."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"vae": ("VAE",)}})
    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "make", "tests"

    def make(self, vae):
        return (_Broken(vae),)


class _Broken:
    def __init__(self, vae):
        self.vae = vae

    def __getattr__(self, name):
        return getattr(self.vae, name)

    def decode(self, latents):
        raise RuntimeError("broken while it decodes")


NODE_CLASS_MAPPINGS = {c.__name__: c for c in (SoakModelState, SoakBrokenModel, SoakBrokenVAE)}
