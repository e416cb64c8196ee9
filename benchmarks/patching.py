"""What it costs to put 101 LoRAs onto a U-Net of SD1.5's size: docs/results/patching.json.

    PYTHON_OF_COMFYUI benchmarks/patching.py COMFYUI_FOLDER

ComfyUI's own class with random fp16 weights, on the CPU in one thread; 101 LoRAs of rank 4 on its 192 linear and 1x1 layers, or some.
Three ways: 101 stock loaders in a chain, one file of rank 404 in one stock loader, and our stack.  Seconds are the process's
own (time.process_time), so that what else the machine does does not count; of each part the shortest of the repeats.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks.comfy_process import start  # noqa: E402
from seqlora_core.tables import meta  # noqa: E402

COUNT, RANK, REPEATS = 101, 4, 4


def build_loras(weights, every: int) -> list[dict[str, torch.Tensor]]:
    """As kohya's trainer writes them: attention, feed-forward and projections of every transformer block"""
    names = [n for n in weights.key_of if "attentions" in n and len(weights.shapes[weights.key_of[n]]) in (2, 4)][::every]
    loras = []
    for seed in range(COUNT):
        g, tensors = torch.Generator().manual_seed(seed), {}
        for name in names:
            shape = weights.shapes[weights.key_of[name]]
            tail = [1] * (len(shape) - 2)
            tensors[f"{name}.lora_down.weight"] = torch.randn(RANK, shape[1], *tail, generator=g).half()
            tensors[f"{name}.lora_up.weight"] = (1e-3 * torch.randn(shape[0], RANK, *tail, generator=g)).half()
            tensors[f"{name}.alpha"] = torch.tensor(float(RANK))
        loras.append(tensors)
    return loras


def concatenated(loras: list[dict]) -> dict[str, torch.Tensor]:
    out = {}
    for key in loras[0]:
        if key.endswith("alpha"):
            out[key] = torch.tensor(float(RANK * len(loras)))
        else:
            out[key] = torch.cat([lora[key] for lora in loras], 1 if "lora_up" in key else 0)
    return out


def seconds(work: Callable):
    gc.collect()  # else what came before would be cleared away within
    begin = time.process_time()
    made = work()
    return time.process_time() - begin, made


def patched(patcher) -> tuple[float, dict[str, torch.Tensor]]:
    """Seconds of computing the weights, and some of them"""
    took, _ = seconds(patcher.patch_model)
    state = patcher.model.state_dict()
    some = {k: state[k].clone() for k in sorted(patcher.patches)[::10]}
    patcher.unpatch_model()
    return took, some


def peak_above(work: Callable) -> tuple[int, object]:
    """Most bytes of tensors that it holds at once above those before, by torch's profiler"""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        made = work()
    held, most = 0, 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most, made


def measure(every: int) -> dict:
    import comfy.sd
    from seqlora_pack.nodes.comfy_lora_files import fit
    from seqlora_pack.nodes.comfy_patches import Part, patch_model
    from seqlora_pack.nodes.comfy_weights import Weights
    from seqlora_pack.seqlora_core.report import interference_report

    from benchmarks import comfy_sd15

    unet = comfy_sd15.build(torch.float16)
    weights = Weights(unet, None)
    loras = build_loras(weights, every)
    layers = len([k for k in loras[0] if k.endswith("lora_up.weight")])
    one = concatenated(loras)
    halved = [{k: v / 2 if k.endswith("alpha") else v for k, v in lora.items()} for lora in loras]
    found: dict[str, list[tuple[float, float]]] = {"one_file": [], "ours": [], "ours_half_alpha": [], "ours_new_strength": []}
    for _ in range(REPEATS):
        build, (model, _) = seconds(lambda: comfy.sd.load_lora_for_models(unet, None, one, 1.0, 0.0))
        found["one_file"].append((build, patched(model)[0]))

    def read(loras=loras):
        known = Weights(unet, None)
        return known, [fit(lora, {}, known, str(i)) for i, lora in enumerate(loras)]

    def stack(known, fitted, first=1.0):
        return patch_model(
            unet, None, [Part(str(i), first if i == 0 else 1.0, f.adapter) for i, f in enumerate(fitted)], known
        )[0]

    for _ in range(REPEATS):
        reading, (known, fitted) = seconds(read)
        build, model = seconds(lambda: stack(known, fitted))  # noqa: B023
        took, ours = patched(model)
        found["ours"].append((reading + build, took))
        build, model = seconds(lambda: stack(known, fitted, 0.5))  # noqa: B023
        found["ours_new_strength"].append((build, patched(model)[0]))
        reading, scaled = seconds(lambda: read(halved))
        build, model = seconds(lambda: stack(*scaled))  # noqa: B023
        found["ours_half_alpha"].append((reading + build, patched(model)[0]))
    report, _ = seconds(lambda: interference_report({str(i): f.adapter for i, f in enumerate(fitted)}))
    model = stack(known, fitted)
    composing, model = peak_above(lambda: stack(known, fitted))
    largest = max(weights.shapes[k][0] * weights.shapes[k][1] for k in model.patches) * 4
    key = max(model.patches, key=lambda k: weights.shapes[k][0] * weights.shapes[k][1])
    weight = weights.original(key).float()
    joining, _ = peak_above(lambda: model.patches[key][0][1].calculate_weight(weight, key, 1.0, 1.0, None, lambda a: a))
    rows = [{"row": name, **dict(zip(("build", "patch"), map(min, zip(*times))))} for name, times in found.items()]

    def chain():
        model = unet
        for lora in loras:
            model = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)[0]
        return model

    build, model = seconds(chain)
    took, stock = patched(model)
    rows.insert(0, {"row": "chained", "build": build, "patch": took})
    for row in rows:
        row["seconds"] = row["build"] + row["patch"]
    error = max(float((ours[k].float() - v.float()).abs().max() / v.float().abs().max()) for k, v in stock.items())
    memory = {"largest_layer": largest, "composing": composing, "one_weight": joining}
    return {
        "rows": rows,
        "layers": layers,
        "loras": COUNT,
        "rank": RANK,
        "memory": memory,
        "difference": error,
        "report": report,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("comfyui", type=Path, help="folder of ComfyUI")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "patching.json")
    parser.add_argument(
        "--every", type=int, default=1, help="take every so manieth of the layers only: the chain takes minutes"
    )
    args = parser.parse_args()
    start(args.comfyui)
    with torch.inference_mode():
        found = measure(args.every)
    command = "python benchmarks/patching.py COMFYUI" + (f" --every {args.every}" if args.every > 1 else "")
    found = {"meta": meta(command, "cpu", [0]), **found}
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
