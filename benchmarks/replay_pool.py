"""Do replayed pictures stand for real ones?  docs/results/replay_pool.json.

    python -m benchmarks.replay_pool --library demo_output/library      after `make demo`

A fit keeps predictions on what the base model met on its way to a pool of pictures that it drew, and looks at some pictures that
it never replays.  What it does to others is what counts: how far a whole library moves predictions on those ways, on the pool, on
pictures that are looked at, on pictures drawn alike from prompts that the pool does not have, on guided ones, and on real ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from seqlora_core.adapter import Adapter, concatenate
from seqlora_core.attach import Attachment, attached
from seqlora_core.calibration import watched
from seqlora_core.demo import load_generic
from seqlora_core.demo_model import SIZE, DemoModel
from seqlora_core.drawing import UNGUIDED, draw
from seqlora_core.evaluation import HeldOut, mean
from seqlora_core.library import Library
from seqlora_core.lora_moments import GUIDANCE
from seqlora_core.prompts import generic_prompts, is_decoy
from seqlora_core.replay import Batch
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
COUNT, FRESH_SEED = 192, 77


@torch.no_grad()
def moved(model: DemoModel, asked: Batch, stack: Adapter, drawn: bool = False) -> dict[str, float]:
    """Mean squared change of the prediction by the stack; of pictures also the bare model's loss and how much it rises.

    drawn: what the model was asked while it drew, of which nothing but its own prediction is known.
    """
    attachment, base, after, change = Attachment(), [], [], []
    with attached(model.sites(), attachment):
        for part in torch.arange(len(asked.noised)).split(96):
            predictions = []
            for adapter in (None, stack):
                attachment.set_frozen(adapter, model.device)
                predictions.append(model.predict(asked.noised[part], asked.sigma[part], asked.conditioning[part]))
            pairs = (predictions[0], asked.target[part]), (predictions[1], asked.target[part]), predictions
            for values, (a, b) in zip((base, after, change), pairs):
                values += (a - b).square().flatten(1).mean(1).tolist()
    if drawn:
        return {"change": mean(change)}
    return {"base_loss": mean(base), "drift": mean(after) / mean(base) - 1, "change": mean(change)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=ROOT / "demo_output" / "library")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "replay_pool.json")
    args = parser.parse_args()
    model, library = DemoModel(), Library(args.library)
    calibration, stack = library.calibration(), concatenate([c.adapter for c in library.concepts()])
    plain = [i for i, text in enumerate(calibration.prompts) if not is_decoy(text)]
    apart = watched(calibration.prompts)
    pool = [i for i in plain if i not in apart][:COUNT]
    fresh = [p for p in generic_prompts(2 * COUNT, FRESH_SEED) if p not in calibration.prompts][:COUNT]

    def noised(pictures: HeldOut) -> Batch:
        x, noise, sigma = pictures.latents, pictures.noise, pictures.sigma
        return Batch(model.noised(x, noise, sigma), sigma, pictures.conditioning, model.target(x, noise, sigma))

    def kept(rows: list[int]) -> Batch:
        return noised(HeldOut.of(model, calibration.latents[rows], [calibration.prompts[i] for i in rows], levels=6))

    def way(rows: list[int]) -> Batch:
        x, sigma, said = (part[rows].float() for part in calibration.visited)
        prompts = model.encode_prompts([calibration.prompts[i] for i in rows for _ in sigma[0]])
        return Batch(x.flatten(0, 1), sigma.flatten(), prompts, said.flatten(0, 1))

    def drawn(guidance: float) -> Batch:
        latents = draw(model, fresh, FRESH_SEED, (SIZE, SIZE), guidance=guidance).latents
        return noised(HeldOut.of(model, latents, fresh, levels=6))

    kinds = {
        "the replay pool, noised anew": kept(pool),
        "drawn with it, never replayed": kept(apart),
        "drawn alike, of other prompts": drawn(UNGUIDED),
        f"the same at guidance {GUIDANCE:g}": drawn(GUIDANCE),
        "real pictures": noised(load_generic(model)),
    }
    rows = [{"row": name, **moved(model, asked, stack)} for name, asked in kinds.items()]
    ways = {"what is replayed: on the way to the pool": way(pool), "on the way to those never replayed": way(apart)}
    rows[:0] = [{"row": name, **moved(model, asked, stack, drawn=True)} for name, asked in ways.items()]
    about = meta("python -m benchmarks.replay_pool", model.device, [FRESH_SEED])
    about |= {"pool": len(calibration.prompts), "concepts": len(library)}
    text = json.dumps({"meta": about, "rows": rows}, indent=1)
    args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
