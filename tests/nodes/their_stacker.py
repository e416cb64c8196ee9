"""Nodes as other packs have them: a text, a LoRA a line, as a LORA_STACK; pictures as a list.  The test server's second custom node."""

import torch


class TheirStacker:
    RETURN_TYPES, FUNCTION, CATEGORY = ("LORA_STACK",), "stack", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {"multiline": True})}, "optional": {"lora_stack": ("LORA_STACK",)}}

    def stack(self, text, lora_stack=None):
        items = [line.split() for line in text.splitlines()]
        return ([*(lora_stack or []), *((i[0], *map(float, i[1:])) for i in items)],)


class TheirLoader:
    """Loads a LORA_STACK one by one through the stock loader, as they do"""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "load", "tests"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "clip": ("CLIP",), "lora_stack": ("LORA_STACK",)}}

    def load(self, model, clip, lora_stack):
        from nodes import LoraLoader

        for name, strength_model, strength_clip in lora_stack:
            model, clip = LoraLoader().load_lora(model, clip, name, strength_model, strength_clip)
        return model, clip


class TheirFolder:
    """Pictures of the sizes that the text names, one after another, each with its mask"""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_IS_LIST = ("IMAGE", "MASK"), "load", "tests", (True, True)

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"text": ("STRING", {})}}

    def load(self, text):
        sizes = [tuple(map(int, size.split("x"))) for size in text.split()]
        images = [torch.full((1, h, w, 3), 0.2 * i) for i, (w, h) in enumerate(sizes, 1)]
        return images, [torch.ones(i.shape[:3]) for i in images]


NODE_CLASS_MAPPINGS = {"TheirStacker": TheirStacker, "TheirLoader": TheirLoader, "TheirFolder": TheirFolder}
