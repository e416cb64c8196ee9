"""SD3, SD3.5 and Flux.1 through diffusers."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from .attach import Site
from .denoiser import Conditioning, FlowMatching, a_few, fingerprint
from .errors import UserError
from .metadata import Base
from .transformer_sites import flux_sites, sd3_sites

EMBEDDED_GUIDANCE = 3.5  # of Flux.1 dev, while it trains and unless a picture asks for another


class TransformerModel(FlowMatching):
    """`denoiser.Denoiser` around a diffusers StableDiffusion3Pipeline or FluxPipeline."""

    def __init__(self, pipeline):
        self.pipeline, self.transformer, self.vae = pipeline, pipeline.transformer, pipeline.vae
        for part in pipeline.components.values():
            if isinstance(part, nn.Module):
                part.eval().requires_grad_(False)
        self.device, self.is_flux = self.transformer.device, type(pipeline).__name__.startswith("Flux")
        schedule = pipeline.scheduler.config
        # as ComfyUI shifts the noise levels of both
        self.training_shift = math.exp(schedule.max_shift) if self.is_flux else schedule.shift
        self.size = pipeline.default_sample_size * pipeline.vae_scale_factor
        patch = 2 if self.is_flux else self.transformer.config.patch_size
        self.pixel_step = patch * pipeline.vae_scale_factor
        self.largest_side = self.pixel_step * (self.transformer.config.get("pos_embed_max_size") or 0)  # Flux.1 has none
        self._sites: list[Site] | None = None
        pipeline.set_progress_bar_config(disable=True)

    def sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = (flux_sites if self.is_flux else sd3_sites)(self.transformer)
        return self._sites

    def adapt_text(self, attention: bool, tokens: bool = False) -> None:
        if attention or tokens:
            what = "text_encoder" if attention else "learn_trigger"
            raise UserError(
                f"text encoders of {type(self.pipeline).__name__} are not trained on the command line: leave out {what}, or use the ComfyUI nodes"
            )

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return Conditioning.cat([self._read(some) for some in a_few(prompts)])

    def _read(self, prompts: list[str]) -> Conditioning:
        if self.is_flux:
            context, pooled, _ = self.pipeline.encode_prompt(prompts, device=self.device)
        else:
            context, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, None, None, device=self.device, do_classifier_free_guidance=False
            )
        return Conditioning(context, pooled)

    def read_prompts(self, prompts: list[str]) -> Conditioning:
        return self.encode_prompts(prompts)

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        parts = (part.to(self.device, self.vae.dtype).permute(0, 3, 1, 2) * 2 - 1 for part in images.split(4))
        latents = torch.cat([self.vae.encode(part).latent_dist.mode() for part in parts])
        return (latents.float() - self.vae.config.shift_factor) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        latents = (latents / self.vae.config.scaling_factor + self.vae.config.shift_factor).to(self.vae.dtype)
        x = torch.cat([self.vae.decode(part).sample for part in latents.split(4)])
        return (x.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).float()

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        scale = self.pipeline.vae_scale_factor
        return self.vae.config.latent_channels, size[0] // scale, size[1] // scale

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        dtype = self.transformer.dtype
        x, context, pooled = noised.to(dtype), conditioning.context.to(dtype), conditioning.pooled.to(dtype)
        if not self.is_flux:
            return self.transformer(x, context, pooled, 1000 * sigma, return_dict=False)[0].float()
        (count, channels, height, width), pipeline = x.shape, self.pipeline
        packed = pipeline._pack_latents(x, count, channels, height, width)
        places = pipeline._prepare_latent_image_ids(count, height // 2, width // 2, self.device, dtype)
        guidance = None
        if self.transformer.config.guidance_embeds:
            guidance = torch.full((count,), EMBEDDED_GUIDANCE, device=self.device)
        text = torch.zeros(context.shape[1], 3, device=self.device, dtype=dtype)
        out = self.transformer(packed, context, pooled, sigma, places, text, guidance, return_dict=False)[0]
        return self._unpacked(out, height, width).float()

    def _unpacked(self, packed: Tensor, height: int, width: int) -> Tensor:
        scale = self.pipeline.vae_scale_factor
        return self.pipeline._unpack_latents(packed, height * scale, width * scale, scale)

    @torch.no_grad()
    def sample(
        self, conditioning: Conditioning, seed: int, steps: int = 28, guidance: float = EMBEDDED_GUIDANCE, size: tuple[int, int] | None = None
    ) -> Tensor:  # fmt: skip
        """guidance: of Flux.1 the embedded one"""
        height, width = size or (self.size, self.size)
        count, dtype, more = len(conditioning), self.transformer.dtype, {}
        if not self.is_flux:
            empty = self.encode_prompts([""])
            more["negative_prompt_embeds"] = empty.context.expand(count, -1, -1).to(dtype)
            more["negative_pooled_prompt_embeds"] = empty.pooled.expand(count, -1).to(dtype)
        drawn = self.pipeline(
            prompt_embeds=conditioning.context.to(dtype), pooled_prompt_embeds=conditioning.pooled.to(dtype), num_inference_steps=steps,
            guidance_scale=guidance, height=height, width=width, output_type="latent",
            generator=[torch.Generator().manual_seed(seed + i) for i in range(count)], **more,
        ).images.float()  # fmt: skip
        return self._unpacked(drawn, *self.latent_shape((height, width))[1:]) if self.is_flux else drawn

    def fingerprint(self) -> str:
        return fingerprint(self.sites())

    def network(self) -> nn.Module:
        return self.transformer

    def about(self) -> Base:
        folder = Path(self.pipeline.config.get("_name_or_path") or "")
        files = sorted((folder / "transformer").glob("*.safetensors"))
        return Base(folder.name, "flux" if self.is_flux else "sd3", file=files[0] if len(files) == 1 else None)
