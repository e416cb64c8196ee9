"""SD1.5, SD2 and SDXL, and any small UNet of their kind, through diffusers.

A noise level ("sigma" in `denoiser.Denoiser`) is here a timestep of the training schedule, 0 <= t < 1000.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from .attach import Site
from .denoiser import Conditioning, a_few, fingerprint
from .errors import UserError
from .live_prompts import LivePrompts, clip_sites, token_site
from .metadata import Base

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


def attention_sites(unet: torch.nn.Module) -> list[Site]:
    """Every attention projection of a UNet, by the names that kohya's files and stock loaders use"""
    sites = []
    for name, module in unet.named_modules():
        if "attn" in name and name.endswith(PROJECTIONS) and isinstance(module, torch.nn.Linear):
            stem = "lora_unet_" + name.replace(".", "_")
            sites.append(Site(stem, (module,), module.in_features, module.out_features))
    return sites


class UNetModel:
    """`denoiser.Denoiser` around a diffusers StableDiffusionPipeline or StableDiffusionXLPipeline.

    Errors are in the model's own units: noise, or velocity for models that predict it.
    """

    def __init__(self, pipeline):
        self.pipeline, self.unet, self.vae = pipeline, pipeline.unet, pipeline.vae
        for part in (self.unet, self.vae, pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)):
            if part is not None:
                part.eval().requires_grad_(False)
        self.device, self.dtype = self.unet.device, self.unet.dtype
        self.is_xl = hasattr(pipeline, "text_encoder_2")
        if self.is_xl and self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)  # as its pipeline does: SDXL's own gives no numbers in float16
        self.kind = pipeline.scheduler.config.prediction_type
        if self.kind not in ("epsilon", "v_prediction"):
            raise UserError(f"the model predicts {self.kind!r}: only models that predict noise or velocity are supported")
        self.alphas = pipeline.scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.size = self.unet.config.sample_size * pipeline.vae_scale_factor
        self.pixel_step, self.largest_side = max(8, pipeline.vae_scale_factor), 0  # its pipeline asks for eights
        self.live = LivePrompts()
        pipeline.set_progress_bar_config(disable=True)

    def sites(self) -> list[Site]:
        return [*self.live.sites, *self._own_sites()]

    def adapt_text(self, attention: bool, tokens: bool = False) -> None:
        self.live.sites = [*(self.token_tables() if tokens else ()), *(self._clip_sites() if attention else ())]

    def token_tables(self) -> list[Site]:
        first = self.pipeline.text_encoder
        found = [token_site(first, "clip_h" if first.config.hidden_size == 1024 else "clip_l")]
        return [*found, token_site(self.pipeline.text_encoder_2, "clip_g")] if self.is_xl else found

    def _clip_sites(self) -> list[Site]:
        if not self.is_xl:
            return clip_sites(self.pipeline.text_encoder, "lora_te")
        return [
            *clip_sites(self.pipeline.text_encoder, "lora_te1"),
            *clip_sites(self.pipeline.text_encoder_2, "lora_te2"),
        ]

    def _own_sites(self) -> list[Site]:
        return attention_sites(self.unet)

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self.live.numbered(prompts, self.device) if self.live else self.read_prompts(prompts)

    def read_prompts(self, prompts: list[str]) -> Conditioning:
        return Conditioning.cat([self._read(some) for some in a_few(prompts)])

    def _read(self, prompts: list[str]) -> Conditioning:
        encoded = self.pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Conditioning(encoded[0], encoded[2] if self.is_xl else None)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        parts = (part.to(self.device, self.vae.dtype).permute(0, 3, 1, 2) * 2 - 1 for part in images.split(4))
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
        return latents * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        x = torch.cat([self.vae.decode(part).sample for part in latents.split(4)])
        return (x.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).float()

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        scale = self.pipeline.vae_scale_factor
        return self.unet.config.in_channels, size[0] // scale, size[1] // scale

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(0, len(self.alphas), (count,), generator=generator).to(self.device)

    def sigma_at(self, share: Tensor) -> Tensor:
        return (share * len(self.alphas)).long().clamp(max=len(self.alphas) - 1).to(self.device)

    def even_sigmas(self, count: int) -> Tensor:
        return ((torch.arange(count) + 0.5) / count * len(self.alphas)).long().to(self.device)

    def noised(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        signal, spread = self._scales(sigma)
        return (signal * latents + spread * noise).to(self.dtype)

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        if self.kind == "epsilon":
            return noise
        signal, spread = self._scales(sigma)
        return signal * noise - spread * latents

    def _scales(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Of the picture and of the noise at a timestep, each [n, 1, 1, 1]"""
        kept = self.alphas[sigma.long()].view(-1, 1, 1, 1)
        return kept.sqrt(), (1 - kept).sqrt()

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        conditioning, more = self.live.encoded(conditioning, self.read_prompts), {}
        if self.is_xl:
            height, width = (int(n) * self.pipeline.vae_scale_factor for n in noised.shape[2:])
            shape = torch.tensor([[height, width, 0, 0, height, width]], device=self.device, dtype=self.dtype)
            more["added_cond_kwargs"] = {"text_embeds": conditioning.pooled, "time_ids": shape.expand(len(noised), -1)}
        context = conditioning.context.to(self.dtype)
        return self.unet(noised.to(self.dtype), sigma, context, return_dict=False, **more)[0].float()

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, seed: int, steps: int = 30, guidance: float = 7.0, size: tuple[int, int] | None = None
    ) -> Tensor:
        height, width = size or (self.size, self.size)
        count, empty = len(conditioning), self.read_prompts([""])
        conditioning = self.live.encoded(conditioning, self.read_prompts)
        more = {"negative_prompt_embeds": empty.context.expand(count, -1, -1)}
        if self.is_xl:
            more["pooled_prompt_embeds"] = conditioning.pooled
            more["negative_pooled_prompt_embeds"] = empty.pooled.expand(count, -1)
        return self.pipeline(
            prompt_embeds=conditioning.context, num_inference_steps=steps, guidance_scale=guidance, height=height, width=width,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)], output_type="latent", **more,
        ).images  # fmt: skip

    def fingerprint(self) -> str:
        return fingerprint(self._own_sites())

    def text_sites(self) -> list[Site]:
        return []

    def network(self) -> torch.nn.Module:
        return self.unet

    def about(self) -> Base:
        """With the file of the UNet's weights, if they are in one"""
        folder = Path(self.pipeline.config.get("_name_or_path") or "")
        velocity = self.kind == "v_prediction"
        sd2 = ("sd2_v" if velocity else "sd2") if self.unet.config.cross_attention_dim == 1024 else "sd1"
        files = sorted((folder / "unet").glob("*.safetensors"))
        return Base(
            folder.name, "sdxl" if self.is_xl else sd2, "v" if velocity else "epsilon", files[0] if len(files) == 1 else None
        )
