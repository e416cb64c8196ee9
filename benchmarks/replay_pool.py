"""Do replayed pictures stand for real ones?  docs/results/replay_pool.json.

    python -m benchmarks.replay_pool --library demo_output/library      after `make demo`

A fit keeps predictions on a pool of pictures that the base model drew, and looks at some that it never replays.  What it does
to other pictures is what counts: how far a whole library moves predictions on the pool, on those that are looked at, on pictures
drawn alike from prompts that the pool does not have, on guided ones, and on real held-out pictures.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from seqlora_core.adapter import Adapter, concatenate
from seqlora_core.attach import Attachment, attached
from seqlora_core.demo import load_generic
from seqlora_core.demo_model import SIZE, DemoModel
from seqlora_core.drawing import UNGUIDED, draw
from seqlora_core.evaluation import HeldOut, mean
from seqlora_core.library import Library
from seqlora_core.lora_moments import GUIDANCE
from seqlora_core.prompts import generic_prompts, is_decoy
from seqlora_core.replay import WATCHED
from seqlora_core.tables import meta

ROOT = Path(__file__).resolve().parent.parent
COUNT, FRESH_SEED = 192, 77


@torch.no_grad()
def moved(model: DemoModel, pictures: HeldOut, stack: Adapter) -> dict[str, float]:
    """The bare model's loss, how much the stack raises it, and the mean squared change of the prediction"""
    attachment, base, after, change = Attachment(), [], [], []
    with attached(model.sites(), attachment):
        for part in torch.arange(len(pictures.latents)).split(96):
            x, noise, sigma = pictures.latents[part], pictures.noise[part], pictures.sigma[part]
            noised, target = model.noised(x, noise, sigma), model.target(x, noise, sigma)
            predictions = []
            for adapter in (None, stack):
                attachment.set_frozen(adapter, model.device)
                predictions.append(model.predict(noised, sigma, pictures.conditioning[part]))
            for values, (a, b) in ((base, (predictions[0], target)), (after, (predictions[1], target)), (change, predictions)):
                values += (a - b).square().flatten(1).mean(1).tolist()
    return {"base_loss": mean(base), "drift": mean(after) / mean(base) - 1, "change": mean(change)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", type=Path, default=ROOT / "demo_output" / "library")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "results" / "replay_pool.json")
    args = parser.parse_args()
    model, library = DemoModel(), Library(args.library)
    calibration, stack = library.calibration(), concatenate([c.adapter for c in library.concepts()])
    plain = [i for i, text in enumerate(calibration.prompts) if not is_decoy(text)]
    pool, watched = ([i for i in plain if bool(i % WATCHED) == replayed][:COUNT] for replayed in (True, False))
    fresh = [p for p in generic_prompts(2 * COUNT, FRESH_SEED) if p not in calibration.prompts][:COUNT]

    def kept(rows: list[int]) -> HeldOut:
        return HeldOut.of(model, calibration.latents[rows], [calibration.prompts[i] for i in rows], levels=6)

    def drawn(guidance: float) -> HeldOut:
        return HeldOut.of(model, draw(model, fresh, FRESH_SEED, (SIZE, SIZE), guidance=guidance)[0], fresh, levels=6)

    kinds = {
        "the replay pool": kept(pool),
        "drawn with it, never replayed": kept(watched),
        "drawn alike, of other prompts": drawn(UNGUIDED),
        f"the same at guidance {GUIDANCE:g}": drawn(GUIDANCE),
        "real pictures": load_generic(model),
    }
    rows = [{"row": name, **moved(model, pictures, stack)} for name, pictures in kinds.items()]
    about = meta("python -m benchmarks.replay_pool", model.device, [FRESH_SEED])
    about |= {"pool": len(calibration.prompts), "concepts": len(library)}
    text = json.dumps({"meta": about, "rows": rows}, indent=1)
    args.output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
