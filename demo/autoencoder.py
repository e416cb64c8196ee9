"""The demo model's autoencoder, in TAESD3's stock layout.

Two CPU cores cannot train 2.5 million convolution weights in an hour, so the encoder is not trained at all: it is
the best linear one (principal components of 8 x 8 pixel cells), written exactly into TAESD3's convolutions.  Only
the decoder is trained, with `WIDTHS` channels by level; `stock_weights` embeds it into the stock 64 channels, the
others being zero and staying zero through every ReLU.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from demo import scenes
from demo.perceptual import PerceptualLoss

CELL, CHANNELS, STOCK_WIDTH = 8, 16, 64
WIDTHS = (64, 64, 32, 16)  # of the decoder at 1/8, 1/4, 1/2 and full size
PERCEPTUAL = 0.3  # weight beside the pixels' error
LIFT = 16.0  # added inside the encoder so that signed components pass its ReLUs, taken off at the end


# --- the linear encoder -------------------------------------------------------------------------------------------


def cells(x: Tensor) -> Tensor:
    """[n, 3, h, w] -> [n, h/8 * w/8, 192]"""
    return F.unfold(x, CELL, stride=CELL).transpose(1, 2)


def principal_components(pictures: Tensor) -> dict[str, Tensor]:
    """Projection [16, 192] and centre [192] of pictures [n, 3, h, w] in [-1, 1].

    Component k is scaled by its standard deviation to the power -1/2: between whitening, which would make the
    denoiser spend itself on fine detail, and none, which would hide detail in the noise.  Mean variance is 1.
    """
    patches = cells(pictures).reshape(-1, 3 * CELL * CELL).double()
    centre = patches.mean(0)
    values, vectors = torch.linalg.eigh((patches - centre).T @ (patches - centre) / len(patches))
    spread = values[-CHANNELS:].flip(0).sqrt()
    directions = vectors[:, -CHANNELS:].flip(1).T
    scale = spread**-0.5 / spread.mean().sqrt()
    return {"projection": (directions * scale[:, None]).float(), "centre": centre.float()}


def encode(pca: dict[str, Tensor], x: Tensor) -> Tensor:
    """[n, 3, h, w] in [-1, 1] -> latents [n, 16, h/8, w/8]"""
    z = (cells(x) - pca["centre"]) @ pca["projection"].T
    return z.transpose(1, 2).reshape(len(x), CHANNELS, x.shape[2] // CELL, x.shape[3] // CELL)


# --- the decoder --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """TAESD's residual block"""

    def __init__(self, width: int):
        super().__init__()
        conv = lambda: nn.Conv2d(width, width, 3, padding=1)  # noqa: E731
        self.conv = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv())

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def decoder() -> nn.Sequential:
    """TAESD3's decoder with its own widths; module indices are diffusers' (stock ones minus the Clamp)."""
    modules: list[nn.Module] = [nn.Conv2d(CHANNELS, WIDTHS[0], 3, padding=1), nn.ReLU()]
    for level, width in enumerate(WIDTHS):
        modules += [Block(width) for _ in range(3 if level < 3 else 1)]
        if level < 3:
            modules += [nn.Upsample(scale_factor=2), nn.Conv2d(width, WIDTHS[level + 1], 3, padding=1, bias=False)]
    return nn.Sequential(*modules, nn.Conv2d(WIDTHS[-1], 3, 3, padding=1))


def decode(net: nn.Sequential, z: Tensor) -> Tensor:
    """latents -> [n, 3, h, w] about [-1, 1]"""
    return net(torch.tanh(z / 3) * 3) * 2 - 1


def pictures(sprites: dict, rng: np.random.Generator, count: int) -> Tensor:
    """[count, 3, 64, 64] in [-1, 1]: scenes of any icon"""
    keys, out = list(sprites), []
    for _ in range(count):
        items = [(sprites[keys[i]], str(rng.choice(["", "", "small"]))) for i in rng.integers(0, len(keys), 2)]
        layout = str(rng.choice(["one", "sides", "stacked"]))
        out.append(np.asarray(scenes.compose(rng, items, str(rng.choice(list(scenes.BACKGROUNDS))), layout)))
    return torch.tensor(np.stack(out), dtype=torch.float32).permute(0, 3, 1, 2) / 127.5 - 1


def reconstruction_loss(y: Tensor, x: Tensor) -> Tensor:
    """L1 and squared error, and L1 of the image gradients so that outlines stay sharp"""
    loss = (y - x).abs().mean() + (y - x).square().mean()
    for dim in (2, 3):
        loss = loss + 0.5 * (y.diff(dim=dim) - x.diff(dim=dim)).abs().mean()
    return loss


def fit_encoder(sprites: dict, path: Path) -> None:
    save_file(principal_components(pictures(sprites, np.random.default_rng(0), 4000)), path)


def train_decoder(every: dict, known: dict, folder: Path, minutes: float, batch: int = 12, rate: float = 2e-3) -> None:
    """A third on scenes of every icon, the rest on those that the denoiser knows.

    Reads folder/encoder.safetensors; writes folder/decoder.safetensors every 200 steps, and goes on from one that is
    there.  minutes: of processor time, so that other work on the machine does not shorten the training.
    """
    torch.manual_seed(0)
    pca, net, rng = load_file(folder / "encoder.safetensors"), decoder(), np.random.default_rng(1)
    if (folder / "decoder.safetensors").exists():
        net.load_state_dict(load_file(folder / "decoder.safetensors"))
    net.to(memory_format=torch.channels_last)
    perceptual = PerceptualLoss()
    optimiser = torch.optim.AdamW(net.parameters(), rate, betas=(0.9, 0.99), weight_decay=1e-3)
    start, step, mean, out = time.process_time(), 0, 0.0, folder / "decoder.safetensors"
    while (done := (time.process_time() - start) / (minutes * 60)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 100) * min(1.0, 1.7 * (1 - done) + 0.01)
        x = torch.cat([pictures(every, rng, batch // 3), pictures(known, rng, batch - batch // 3)])
        x = x.contiguous(memory_format=torch.channels_last)
        z = encode(pca, x)
        y = decode(net, z + 0.03 * torch.randn_like(z))
        loss = reconstruction_loss(y, x) + PERCEPTUAL * perceptual(y, x)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        step += 1
        mean = loss.item() if step == 1 else 0.98 * mean + 0.02 * loss.item()
        if step % 200 == 0:
            psnr = -10 * torch.log10(((y - x) / 2).square().mean()).item()
            print(f"decoder step {step} loss {mean:.4f} psnr {psnr:.1f} {time.process_time() - start:.0f} s", flush=True)
            save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out)
    save_file({k: v.contiguous() for k, v in net.state_dict().items()}, out)


# --- both in the stock layout -------------------------------------------------------------------------------------


def stock_weights(pca: dict[str, Tensor], trained: dict[str, Tensor]) -> dict[str, Tensor]:
    """`first_stage_model.*` tensors of a stock TAESD3 that encodes and decodes just like the two above."""
    out = {}
    template = {"encoder": _stock_shapes(_encoder_modules()), "decoder": _stock_shapes(_decoder_modules())}
    for part, shapes in template.items():
        for key, shape in shapes.items():
            out[f"first_stage_model.taesd_{part}.{key}"] = torch.zeros(shape)
    encoder = "first_stage_model.taesd_encoder."
    for channel in range(3):
        out[f"{encoder}0.weight"][channel, channel, 1, 1] = 1
    # two stride-2 convolutions move each 2 x 2 neighbourhood into channels ...
    for index, width in ((2, 3), (6, 12)):
        for c in range(width):
            for dy in range(2):
                for dx in range(2):
                    out[f"{encoder}{index}.weight"][4 * c + 2 * dy + dx, c, 1 + dy, 1 + dx] = 1
    # ... and the third applies the projection.  A pixel (y, x) of an 8 x 8 cell is bits (y2 y1 y0), (x2 x1 x0):
    # the first convolution took bit 0, the second bit 1, the third takes bit 2
    projection = pca["projection"].reshape(CHANNELS, 3, 2, 2, 2, 2, 2, 2)  # k, colour, y2 y1 y0, x2 x1 x0
    third = torch.einsum("kcyjixqp->kcipjqyx", projection).reshape(CHANNELS, 48, 2, 2)
    out[f"{encoder}10.weight"][:CHANNELS, :48, 1:, 1:] = third * 2  # stock encoders see (x + 1) / 2
    out[f"{encoder}11.conv.4.bias"][:CHANNELS] = LIFT
    shift = pca["projection"] @ (pca["centre"] + 1) + LIFT
    for k in range(CHANNELS):
        out[f"{encoder}14.weight"][k, k, 1, 1] = 1
        out[f"{encoder}14.bias"][k] = -shift[k]
    for key, value in trained.items():
        index, rest = key.split(".", 1)
        target = out[f"first_stage_model.taesd_decoder.{int(index) + 1}.{rest}"]
        target[tuple(slice(0, n) for n in value.shape)] = value
    # SD3's latents are (z - 0.0609) * 1.5305; these two make our autoencoder's raw output just that
    out["first_stage_model.vae_scale"] = torch.tensor(1.5305)
    out["first_stage_model.vae_shift"] = torch.tensor(0.0609)
    return out


def from_stock(stock: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The two that `stock_weights` put into these tensors, to train on from a finished model.

    Of the encoder's centre only its projection is in the file; the shortest vector with that projection encodes alike.
    """
    encoder, trained = "first_stage_model.taesd_encoder.", {}
    third = stock[f"{encoder}10.weight"][:CHANNELS, :48, 1:, 1:].float() / 2
    projection = torch.einsum("kcipjqyx->kcyjixqp", third.reshape(CHANNELS, 3, *[2] * 6)).reshape(CHANNELS, -1).contiguous()
    shift = -stock[f"{encoder}14.bias"][:CHANNELS].float() - LIFT - projection.sum(1)
    centre = torch.linalg.pinv(projection.double()) @ shift.double()
    for key, value in decoder().state_dict().items():
        index, rest = key.split(".", 1)
        source = stock[f"first_stage_model.taesd_decoder.{int(index) + 1}.{rest}"]
        trained[key] = source[tuple(slice(0, n) for n in value.shape)].float().contiguous()
    return {"projection": projection, "centre": centre.float()}, trained


def _stock_conv(n_in: int, n_out: int, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias)


def _encoder_modules() -> nn.Sequential:
    modules: list[nn.Module] = [_stock_conv(3, STOCK_WIDTH), Block(STOCK_WIDTH)]
    for _ in range(3):
        modules += [_stock_conv(STOCK_WIDTH, STOCK_WIDTH, bias=False), *(Block(STOCK_WIDTH) for _ in range(3))]
    return nn.Sequential(*modules, _stock_conv(STOCK_WIDTH, CHANNELS))


def _decoder_modules() -> nn.Sequential:
    modules: list[nn.Module] = [nn.Identity(), _stock_conv(CHANNELS, STOCK_WIDTH), nn.ReLU()]
    for level in range(4):
        modules += [Block(STOCK_WIDTH) for _ in range(3 if level < 3 else 1)]
        if level < 3:
            modules += [nn.Upsample(scale_factor=2), _stock_conv(STOCK_WIDTH, STOCK_WIDTH, bias=False)]
    return nn.Sequential(*modules, _stock_conv(STOCK_WIDTH, 3))


def _stock_shapes(modules: nn.Sequential) -> dict[str, torch.Size]:
    return {k: v.shape for k, v in modules.state_dict().items()}
