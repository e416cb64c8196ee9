"""A node that only the soak test installs: what a model in the server looks like from inside."""

import hashlib
import json

import comfy.model_management as management


class SoakModelState:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "after": ("IMAGE",)}})
    RETURN_TYPES, FUNCTION, OUTPUT_NODE, CATEGORY = (), "look", True, "tests"

    def look(self, model, after):
        # after a picture was drawn with it: ComfyUI leaves a stack's patches in the weights until another model is loaded
        digest = hashlib.sha256()
        for name, value in sorted(model.model.state_dict().items()):
            digest.update(name.encode() + value.detach().cpu().contiguous().float().numpy().tobytes())
        modules = list(model.model.modules())
        state = {
            "weights": digest.hexdigest(),
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in modules),
            "patched_modules": sum("forward" in m.__dict__ for m in modules),
            "patches": len(model.patches),
            "plain_weights": sum(not p.is_inference() for p in model.model.parameters()),
            "in_training": bool(getattr(management, "in_training", False)),
        }
        return {"ui": {"text": [json.dumps(state)]}}


NODE_CLASS_MAPPINGS = {"SoakModelState": SoakModelState}
