"""The protocol on CustomConcept101, for someone who has the data, the weights and a GPU.

    python -m benchmarks.customconcept101 --model SD15_FOLDER --data CUSTOMCONCEPT101 --clip CLIP_FOLDER --dino DINO_FOLDER \
        --device cuda --dtype float16 --output results

Data: github.com/adobe-research/custom-diffusion, `customconcept101/` (dataset.json, prompts/) with its benchmark_dataset/
unpacked there.  Model: a diffusers folder of SD1.5 or SDXL.  CLIP and DINO: folders of openai/clip-vit-base-patch32 and
facebook/dino-vits16 as transformers saves them.  Resumes where it was stopped.  `benchmarks.tiny` makes random stand-ins of
all four, which show that it runs, and nothing else.

Every row has the best of the same learning rates, by what its own stack of the first three concepts keeps; what is kept is
measured against ordinary LoRAs at the rate that gains most alone on all concepts, which favours them.  Generic drift is on
pictures that the model draws itself, of prompts that no training has: on the demo model such move as far as real ones
(docs/RESULTS.md).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.concepts import rare_word
from benchmarks.rivals import COMBINED, TRAINED
from seqlora_core import evaluation
from seqlora_core.adapter import Adapter, load_adapter, save_adapter
from seqlora_core.calibration import calibrate, record_moments
from seqlora_core.concept import References
from seqlora_core.config import TrainingConfig
from seqlora_core.diffusers_folder import open_folder
from seqlora_core.drawing import at_once, draw
from seqlora_core.errors import UserError
from seqlora_core.evaluation import HeldOut, Stack, held_out_loss, measure, row, summed
from seqlora_core.judge import MEAN as IMAGENET_MEAN
from seqlora_core.judge import STD as IMAGENET_STD
from seqlora_core.library import Library
from seqlora_core.ordinary import combined, train_ordinary
from seqlora_core.preview import draw_with
from seqlora_core.prompts import generic_prompts
from seqlora_core.references import load_pictures
from seqlora_core.tables import markdown, meta
from seqlora_core.teach import train_concept

ROWS = (*COMBINED, "orthogonal_adaptation", "alternating", "ordinary_replay", "seqlora")
SEARCH = 3  # concepts, the first, on whose stack the rate of a row is searched
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's


@dataclass
class Entry:
    """One concept of the data set: name, trigger, class noun, pictures kept for training and for evaluation, prompts."""

    name: str
    trigger: str
    class_noun: str
    images: Tensor
    held_out: Tensor
    caption: str
    prompts: list[str]


def load_entries(data: Path, size: int, count: int | None) -> list[Entry]:
    """The first `count` concepts; every fourth picture, at least one, is held out."""
    path = data / "dataset.json"
    if not path.is_file():
        raise UserError(f"no dataset.json in {data}: give the folder of CustomConcept101")
    rng, out = np.random.default_rng(101), []
    for item in json.loads(path.read_text(encoding="utf-8"))[:count]:
        trigger = rare_word(rng)
        images, _ = load_pictures(data / item["instance_data_dir"], size)
        keep = torch.arange(len(images)) % 4 != 3 if len(images) > 3 else torch.arange(len(images)) != len(images) - 1
        lines = (data / item["prompt_filename"]).read_text(encoding="utf-8").splitlines()
        words = f"{trigger} {item['class_prompt']}"
        out.append(
            Entry(
                Path(item["instance_data_dir"]).name, trigger, item["class_prompt"], images[keep], images[~keep],
                item["instance_prompt"].replace("<new1>", trigger), [x.strip().replace("{}", words) for x in lines if x.strip()],
            )
        )  # fmt: skip
    return out


class Scores:
    """CLIP-T, CLIP-I and DINO as the data set's authors define them, through transformers."""

    def __init__(self, clip: Path, dino: Path, device: str):
        from transformers import AutoTokenizer, CLIPModel, ViTModel

        self.device = device
        self.clip = CLIPModel.from_pretrained(clip, local_files_only=True).eval().to(device)
        self.dino = ViTModel.from_pretrained(dino, local_files_only=True, add_pooling_layer=False).eval().to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(clip, local_files_only=True)

    def _prepared(self, pictures: Tensor, resize: int, mean, std) -> Tensor:
        """[n, h, w, 3] in 0..1, square -> normalised [n, 3, 224, 224]"""
        x = F.interpolate(pictures.permute(0, 3, 1, 2), (resize, resize), mode="bicubic", antialias=True).clamp(0, 1)
        edge = (resize - 224) // 2
        x = x[:, :, edge : edge + 224, edge : edge + 224]
        return ((x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)).to(self.device)

    @torch.no_grad()
    def images(self, pictures: Tensor) -> Tensor:
        vision = self.clip.vision_model(self._prepared(pictures, 224, MEAN, STD)).pooler_output
        return F.normalize(self.clip.visual_projection(vision), dim=1).cpu()

    @torch.no_grad()
    def structure(self, pictures: Tensor) -> Tensor:
        return F.normalize(
            self.dino(self._prepared(pictures, 256, IMAGENET_MEAN, IMAGENET_STD)).last_hidden_state[:, 0], dim=1
        ).cpu()

    @torch.no_grad()
    def texts(self, prompts: list[str]) -> Tensor:
        tokens = self.tokenizer(prompts, padding=True, truncation=True, max_length=77, return_tensors="pt").to(self.device)
        return F.normalize(self.clip.text_projection(self.clip.text_model(**tokens).pooler_output), dim=1).cpu()

    def of(self, entry: Entry, drawn: Tensor, prompts: list[str]) -> dict[str, float]:
        """Of one concept's drawn pictures, one for each prompt; texts without the trigger, which CLIP cannot know."""
        features, held = self.images(drawn), self.images(entry.held_out)
        texts = self.texts([p.replace(f"{entry.trigger} ", "") for p in prompts])
        return {
            "clip_t": (features * texts).sum(1).mean().item(),
            "clip_i": (features @ held.T).mean().item(),
            "dino": (self.structure(drawn) @ self.structure(entry.held_out).T).mean().item(),
        }


def run(args) -> list[dict]:
    model = open_folder(args.model, args.device, getattr(torch, args.dtype))
    size = (model.size, model.size)
    entries, scores = load_entries(args.data, model.size, args.count), Scores(args.clip, args.dino, args.device)
    # runs on another model or with other options are others
    told = [model.fingerprint(), args.seed, args.steps, args.rank, args.batch, args.pictures, len(entries)]
    folder = args.output / "runs" / "-".join(map(str, told))
    references = [References(model.encode_images(e.images).cpu(), [e.caption] * len(e.images), size) for e in entries]
    held_outs = [
        HeldOut.of(model, model.encode_images(e.held_out), [e.caption] * len(e.held_out), levels=args.levels) for e in entries
    ]
    prompts = generic_prompts(args.generic, seed=args.seed + 1)
    generic = HeldOut.of(model, draw(model, prompts, 1000 + args.seed, size).latents, prompts, levels=args.levels)

    def ordinary(index: int, rate: float) -> Adapter:
        path = folder / f"ordinary-{rate:g}" / f"{entries[index].name}.safetensors"
        if not path.exists():
            adapter = train_ordinary(model, references[index], args.rank, args.steps, rate, args.batch, args.seed)
            save_adapter(path, adapter)
        return load_adapter(path)

    everyone = range(len(entries))
    tried = {r: evaluation.mean([held_out_loss(model, held_outs[i], ordinary(i, r)) for i in everyone]) for r in args.rates}
    rate = min(tried, key=tried.get)

    def chain(way: str, rate: float, count: int) -> Library:
        """The first `count` concepts taught one after another; goes on from what is there"""
        library = Library(folder / f"{way}-{rate:g}", model.fingerprint(), len(entries), create=True)
        if library.calibration() is None:
            library.keep_calibration(calibrate(model, size, args.pictures, seed=args.seed))
        if library.names != [e.name for e in entries[: len(library)]]:
            raise UserError(f"{library.folder} holds other concepts than the data set's first: remove it")
        config = TrainingConfig(
            steps=args.steps, rank=args.rank, batch=args.batch, seed=args.seed, planned=len(entries), learning_rate=rate
        )
        for entry in entries[len(library) : count]:
            train_concept(
                model, library, entry.images, entry.name, entry.trigger, entry.class_noun, [entry.caption] * len(entry.images),
                replace(config, **TRAINED[way]),
            )  # fmt: skip
        return library

    general = chain("seqlora", args.rates[0], 0).calibration().moments

    def taught(way: str, rate: float, count: int) -> tuple[list[Adapter], Stack]:
        """The first `count` concepts, each alone, and what stacks those of them that are asked for"""
        if way in TRAINED:
            library = chain(way, rate, count)
            alone = [library.load(e.name).adapter for e in entries[:count]]
            return alone, summed(alone)
        alone, moments = [ordinary(i, rate) for i in range(count)], [None] * count
        if way == "closed_form":
            texts = [model.encode_prompts(r.captions) for r in references[:count]]
            moments = [record_moments(model, r.latents, t, a, seed=args.seed) for r, t, a in zip(references, texts, alone)]
        return alone, combined(COMBINED[way], alone, moments, general)

    def best_rate(way: str) -> float:
        """By the stack of the first few concepts, in a library planned as the whole is"""
        few, scores = range(min(SEARCH, len(entries))), {}
        for each in args.rates:
            stack = taught(way, each, len(few))[1](list(few))
            scores[each] = evaluation.mean([held_out_loss(model, held_outs[i], stack) for i in few])
        return min(scores, key=scores.get)

    base = [held_out_loss(model, h) for h in held_outs]
    best = [held_out_loss(model, held_outs[i], ordinary(i, rate)) for i in everyone]
    base_generic, rows, rates = held_out_loss(model, generic), [], {"ordinary": rate}
    for name in args.rows:
        rates[name] = best_rate(name)
        alone, stack = taught(name, rates[name], len(entries))
        result = row(name, measure(model, alone, stack, held_outs, generic, seed=args.seed), base, best, base_generic)
        everything = stack(list(everyone))
        for where, adapters in (("alone", alone), ("stack", [everything] * len(entries))):
            each = []
            for entry, adapter in zip(entries, adapters):
                texts, few = entry.prompts[: args.prompts], at_once(size)
                drawn = [draw_with(model, adapter, texts[i : i + few], size, args.seed + i) for i in range(0, len(texts), few)]
                each.append(scores.of(entry, torch.cat(drawn), texts))
            result |= {f"{k}_{where}": evaluation.mean([e[k] for e in each]) for k in each[0]}
        rows.append(result)
        print(markdown([result]).splitlines()[-1], flush=True)
    about = meta("python -m benchmarks.customconcept101", args.device, [args.seed])
    about |= {"model": args.model.name, "rates": rates, "concepts": [e.name for e in entries]}
    text = json.dumps({"meta": about, "rows": rows}, indent=1) + "\n"
    (args.output / "customconcept101.json").write_text(text, encoding="utf-8")
    return rows


def main(arguments: list[str] | None = None) -> list[dict]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("model", "data", "clip", "dino", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--count", type=int, help="concepts, the first of the data set (default: all)")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*COMBINED, *TRAINED])
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4, 3e-4, 1e-3, 3e-3], help="each row takes its best")
    parser.add_argument("--levels", type=int, default=12, help="noise levels of the held-out losses")
    parser.add_argument("--generic", type=int, default=32, help="unrelated prompts")
    parser.add_argument("--pictures", type=int, default=48, help="of the calibration")
    parser.add_argument("--prompts", type=int, default=20, help="drawn for each concept")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "float16", "bfloat16"])
    return run(parser.parse_args(arguments))


if __name__ == "__main__":
    main()
