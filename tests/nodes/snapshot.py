"""The part of a node's schema that workflows depend on, from a server's /object_info."""

from __future__ import annotations

STOCK = ("CLIPTextEncode", "EmptySD3LatentImage", "KSampler", "VAEDecode", "SaveImage", "PreviewImage", "ImageScale")


def schema_of(info: dict) -> dict:
    """{"display_name", "inputs": [[name, type, has a control-after-generate widget]], "outputs": [[name, type]]}"""
    inputs = []
    for part in ("required", "optional"):
        for name in info["input_order"].get(part, []):
            kind, *options = info["input"][part][name]
            control = bool(options and options[0].get("control_after_generate"))
            inputs.append([name, "COMBO" if isinstance(kind, list) else kind, control])
    return {
        "display_name": info["display_name"],
        "inputs": inputs,
        "outputs": [[n, t if isinstance(t, str) else "COMBO"] for n, t in zip(info["output_name"], info["output"])],
    }


def schemas(object_info: dict) -> dict:
    names = [n for n in sorted(object_info) if n.startswith("SeqLoRA")]
    return {n: schema_of(object_info[n]) for n in [*names, *STOCK]}
