"""A second architecture for the tables: a small UNet with cross-attention, on pixels, trained on the demo model's pictures.

    python -m benchmarks.pixel_unet pictures            once; needs npm and resvg-py
    python -m benchmarks.pixel_unet train --minutes 40  goes on where it was stopped
    python -m benchmarks.pixel_unet export              into benchmarks/models as fp16, and docs/results/pixel_unet.json
    python -m benchmarks.pixel_unet draw --output sheet.png

It reads prompts with the demo model's text encoder and shares nothing else with it: convolutions in place of a
transformer, cross-attention in place of joint attention, pixels in place of an autoencoder's latents, and it predicts
the picture, from which the velocity follows.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from seqlora_core.attach import Site
from seqlora_core.demo_model import DemoModel
from seqlora_core.denoiser import Conditioning, FlowMatching, fingerprint
from seqlora_core.errors import UserError
from seqlora_core.metadata import Base
from seqlora_core.tables import meta
from seqlora_core.unet_model import attention_sites

HERE = Path(__file__).resolve().parent
RESULTS = HERE.parent / "docs" / "results" / "pixel_unet.json"
WEIGHTS = HERE / "models" / "pixel_unet.safetensors"
SIZE = 32
PATCH = 8  # pixels to a token's side: on one CPU core four by four tokens are what can be trained
WIDTHS = (96, 96)
LEAST_SIGMA = 0.05  # below it a picture's error counts as at it: the velocity is that error over sigma


def build_unet(widths: tuple[int, ...] = WIDTHS) -> nn.Module:
    """A UNet with cross-attention at every level, over tokens of PATCH x PATCH pixels"""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // PATCH, in_channels=3 * PATCH**2, out_channels=3 * PATCH**2, block_out_channels=widths,
        layers_per_block=1, down_block_types=("CrossAttnDownBlock2D",) * len(widths), mid_block_type=None,
        up_block_types=("CrossAttnUpBlock2D",) * len(widths), norm_num_groups=16, attention_head_dim=2, cross_attention_dim=64,
    )  # fmt: skip


class PixelUNet(FlowMatching):
    """`denoiser.Denoiser`; latents are pictures cut into patches, [n, 3 PATCH^2, height / PATCH, width / PATCH]."""

    size, pixel_step = SIZE, PATCH
    training_shift = 3.0  # pixels show their picture through more noise than latents do

    def __init__(self, unet: nn.Module | None = None, path: Path = WEIGHTS):
        """unet: from `build_unet`; else the trained one of `path`"""
        if unet is None:
            unet = build_unet()
            unet.load_state_dict({k: v.float() for k, v in load_file(path).items()})
        self.unet, self.path = unet.eval().requires_grad_(False), path
        self.device = torch.device("cpu")
        self.reader = DemoModel()

    def sites(self) -> list[Site]:
        return attention_sites(self.unet)

    def adapt_text(self, attention: bool, tokens: bool = False) -> None:
        if attention or tokens:
            raise UserError(
                "the pixel UNet reads prompts with the demo model's text encoder, which stays as it is: leave it out"
            )

    def read_prompts(self, prompts: list[str]) -> Conditioning:
        return self.encode_prompts(prompts)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return Conditioning(self.reader.encode_prompts(prompts).context)

    def encode_images(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images.movedim(-1, 1) * 2 - 1, PATCH)

    def decode(self, latents: Tensor) -> Tensor:
        return (F.pixel_shuffle(latents, PATCH).movedim(1, -1) / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return 3 * PATCH**2, size[0] // PATCH, size[1] // PATCH

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        return velocity(self.unet, noised, sigma, conditioning.context)

    def fingerprint(self) -> str:
        return fingerprint(self.sites())

    def network(self) -> nn.Module:
        return self.unet

    def about(self) -> Base:
        return Base(self.path.name, "pixel-unet", file=self.path)


def velocity(unet: nn.Module, noised: Tensor, sigma: Tensor, context: Tensor) -> Tensor:
    """The network says what the picture is; a small one can say that, and cannot say what the noise is."""
    picture = unet(noised, sigma * 1000, context, return_dict=False)[0]
    return (noised - picture) / sigma.clamp(min=LEAST_SIGMA).view(-1, 1, 1, 1)


# --- training -------------------------------------------------------------------------------------------------------


def make_pictures(cache: Path, count: int) -> None:
    """The demo model's training scenes at half their size, in the cache"""
    from demo.train_base import make_latents

    make_latents(cache, count, lambda part: F.avg_pool2d(part, 2), "pixels")


def train(cache: Path, minutes: float, batch: int = 32, rate: float = 1.2e-3, widths: tuple[int, ...] = WIDTHS) -> dict:
    """Trains for `minutes` in all, over however many runs, on the pictures in the cache; held-out loss is of its average."""
    from demo.train_base import EMPTY_CAPTION, SEED, descend

    data = [load_file(f) for f in sorted((cache / "pixels").glob("*.safetensors"))]
    pictures, tokens = torch.cat([d["latents"] for d in data]), torch.cat([d["tokens"] for d in data])
    known = len(pictures) - min(1000, len(pictures) // 10)
    torch.manual_seed(SEED)
    unet, model = build_unet(widths), PixelUNet(build_unet(widths))
    empty, read = model.reader.tokenize([""])[0], context_reader(model.reader)

    def loss_of(net: nn.Module, pick: Tensor, generator: torch.Generator, dropped: float) -> Tensor:
        text = tokens[pick].long()
        text[torch.rand(len(pick), generator=generator) < dropped] = empty
        x = F.pixel_unshuffle(pictures[pick].float(), PATCH)
        noise, sigma = torch.randn(x.shape, generator=generator), model.draw_sigmas(len(pick), generator)
        found = velocity(net, model.noised(x, noise, sigma), sigma, read(text))
        return (found - model.target(x, noise, sigma)).square().mean()

    def loss_of_batch(generator: torch.Generator) -> Tensor:
        return loss_of(unet, torch.randint(0, known, (batch,), generator=generator), generator, EMPTY_CAPTION)

    mean, steps = descend(unet, loss_of_batch, cache / "pixel_unet.safetensors", minutes, rate, time.time)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        held_out = loss_of(mean, torch.arange(known, len(pictures)), generator, 0.0).item()
    size = sum(p.numel() for p in unet.parameters())
    result = {"parameters": size, "steps": steps, "samples": steps * batch, "minutes": minutes, "held_out": held_out}
    (cache / "pixel_unet.json").write_text(json.dumps(result) + "\n", encoding="utf-8")
    return result


def context_reader(reader: DemoModel):
    """Function from token ids [n, length] to what the text encoder says of them"""
    from seqlora_core.demo_model import encode_text

    @torch.no_grad()
    def read(tokens: Tensor) -> Tensor:
        return encode_text(reader.text, tokens)[0]

    return read


def draw(model: PixelUNet, output: Path, count: int = 64) -> None:
    """A sheet of prompts with known subjects, drawn by the model"""
    from PIL import Image

    from demo import scenes
    from seqlora_core.preview import draw_with

    names, colours, styles = sorted(scenes.SUBJECTS), list(scenes.BACKGROUNDS), ("noto", "fluent")
    prompts = [scenes.caption([n], colours[i % 10], styles[i % 2]) for i, n in enumerate(names[: count - 8])]
    prompts += [scenes.caption(names[i : i + 2], colours[i % 10], "fluent", "sides") for i in range(8)]
    drawn = draw_with(model, None, prompts, (SIZE, SIZE))
    rows = [torch.cat(list(row), 1) for row in drawn[: len(drawn) // 8 * 8].split(8)]
    sheet = Image.fromarray((torch.cat(rows) * 255).round().byte().numpy())
    sheet.resize((sheet.width * 3, sheet.height * 3), Image.Resampling.NEAREST).save(output)


def export(cache: Path) -> None:
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in load_file(cache / "pixel_unet.safetensors").items()}, WEIGHTS)
    about = meta("python -m benchmarks.pixel_unet train", "cpu", [0])
    trained = json.loads((cache / "pixel_unet.json").read_text(encoding="utf-8"))
    RESULTS.write_text(json.dumps({"meta": about} | trained, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["pictures", "train", "export", "draw"])
    parser.add_argument("--cache", type=Path, default=HERE / "cache")
    parser.add_argument("--minutes", type=float, default=40)
    parser.add_argument("--pictures", type=int, default=30_000)
    parser.add_argument("--output", type=Path, default=Path("pixel_unet.png"))
    args = parser.parse_args()
    stages = {
        "pictures": lambda: make_pictures(args.cache, args.pictures),
        "train": lambda: print(json.dumps(train(args.cache, args.minutes))),
        "export": lambda: export(args.cache),
        "draw": lambda: draw(PixelUNet(), args.output),
    }
    stages[args.stage]()


if __name__ == "__main__":
    main()
