"""ComfyUI's models behind seqlora_core's Denoiser protocol.

Nothing here names an architecture: what a family's model wants beside the noised latents is asked of ComfyUI, as its
samplers do.  Files called `comfy_*` alone touch ComfyUI's internals.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import comfy.lora
import comfy.model_management as management
import comfy.model_sampling
import comfy.sample
import torch
from torch import Tensor

from ..seqlora_core.attach import Site
from ..seqlora_core.denoiser import Conditioning, fingerprint
from ..seqlora_core.errors import UserError
from ..seqlora_core.live_prompts import LivePrompts
from ..seqlora_core.metadata import Base
from .comfy_cancel import Cancel
from .comfy_sites import attention_sites, clip_sites, named_sites, token_tables
from .comfy_training import Trainable

_FAMILIES = {"SDXL": "sdxl", "SD3": "sd3", "Flux": "flux", "Lumina2": "lumina2", "QwenImage": "qwen_image"}
BACKWARD = 3  # memory of a step whose blocks are computed twice, over ComfyUI's estimate of drawing as many pictures


class ComfyDenoiser:
    """`seqlora_core.denoiser.Denoiser` for any image model that ComfyUI loads.

    Use as a context manager, inside `torch.inference_mode(False)`.  Latents handed out are the model's own
    (after process_latent_in).  layers: of LoRA files, whose linear ones are then the sites; else all attention projections.
    offloads: pictures that a training step is to have room for, beside which ComfyUI loads as many weights as fit; 0: all.
    file: what the model was loaded from, if that is known.
    """

    pixel_step = 1  # ComfyUI crops and pads to what a model takes

    def __init__(self, model, clip, vae, layers: Iterable[str] | None = None, offloads: int = 0, file: Path | None = None):
        dynamic = getattr(model, "is_dynamic", lambda: False)()
        # a dynamic patcher may evict weights between forward and backward: train on a plain one
        self.patcher = model.clone(disable_dynamic=True) if dynamic else model.clone()
        self.clip, self.vae, self.offloads, self.file = clip, vae, offloads, file
        self.device = model.load_device
        self._trainable: list[Trainable] = []  # the model, and its text encoder if that is adapted
        self._shapes: dict[tuple[int, int], tuple[int, ...]] = {}
        self._layers, self._sites, self._attention = None if layers is None else set(layers), None, None
        self._live, self.cancel = LivePrompts(), Cancel()

    def __enter__(self) -> ComfyDenoiser:
        self._load()
        self._trainable = [Trainable(self.base, self.network())]
        return self

    def __exit__(self, *_) -> None:
        self.cancel.release()
        while self._trainable:  # the last first, for it found what the first had put in place
            self._trainable.pop().close()
        # When a clone goes ComfyUI goes on with what it was cloned from; where the collector finds both at once, as after an
        # error, it takes the model for leaked and collects garbage at every load from then on.
        self.patcher = self.patcher.parent

    @property
    def base(self):
        return self.patcher.model

    @property
    def largest_side(self) -> int:
        """Of a picture in pixels: as far as a table of positions reaches, if the model has one; else 0"""
        network = self.network()
        if self.vae is None or getattr(network, "pos_embed", None) is None:
            return 0
        return (getattr(network, "pos_embed_max_size", None) or 0) * network.patch_size * self.vae.spacial_compression_encode()

    def _load(self) -> None:
        models = [self.patcher, self.clip.patcher] if self._live else [self.patcher]
        with torch.inference_mode():
            management.load_models_gpu(models, self._room(), force_full_load=not self.offloads)

    def _room(self) -> int:
        """Bytes that a training step needs beside the weights: of its largest pictures"""
        shapes = [(self.offloads, *shape) for shape in self._shapes.values()] if self.offloads else []
        return int(BACKWARD * max(map(self.base.memory_required, shapes), default=0))

    def _prepare(self) -> None:
        """Ready for a backward pass, from here to `_restore`"""
        if not self._trainable[0].ready:
            self._load()
            for part in self._trainable:
                part.prepare()

    def _restore(self) -> None:
        for part in reversed(self._trainable):
            part.restore()

    def adapt_text(self, attention: bool, tokens: bool = False) -> None:
        self._live.sites = [
            *(self.token_tables() if tokens else ()),
            *(clip_sites(self.clip, self.about().family) if attention else ()),
        ]
        while len(self._trainable) > 1:  # of an earlier choice: its hooks would stay on the encoder
            self._trainable.pop().close()
        if self._live:
            encoder = self.clip.cond_stage_model
            self._trainable.append(Trainable(encoder, encoder))

    def token_tables(self) -> list[Site]:
        return token_tables(self.clip)

    def sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = self._attention_sites() if self._layers is None else self._sites_of(self._layers)
        return [*self._live.sites, *self._sites]

    def _attention_sites(self) -> list[Site]:
        if self._attention is None:
            self._attention = attention_sites(self.base)
            if not self._attention:
                raise UserError(f"{type(self.base).__name__} has no attention layers that can be adapted: use another model")
        return self._attention

    def _sites_of(self, layers: Iterable[str]) -> list[Site]:
        """The layers of the diffusion model that ComfyUI would patch under these names of a LoRA file"""
        found = named_sites(self.base, comfy.lora.model_lora_keys_unet(self.base, {}), layers)
        if not found and not self.text_sites():
            raise UserError(
                "the LoRAs do not fit this model: none of their layers is in it; load the model they were trained on"
            )
        return found

    def text_sites(self) -> list[Site]:
        if self._layers is None or self.clip is None:
            return []
        encoder = self.clip.cond_stage_model
        return named_sites(encoder, comfy.lora.model_lora_keys_clip(encoder, {}), self._layers)

    def fingerprint(self) -> str:
        return fingerprint(self._attention_sites())

    def network(self) -> torch.nn.Module:
        return self.base.diffusion_model

    def about(self) -> Base:
        kind = type(self.base).__name__
        kinds = comfy.model_sampling  # some that predict other things are made from these two
        velocity = isinstance(self._sampling, kinds.V_PREDICTION) and not isinstance(self._sampling, kinds.EDM)
        noise = isinstance(self._sampling, kinds.EPS) and not isinstance(self._sampling, (kinds.V_PREDICTION, kinds.X0))
        if kind == "BaseModel":  # SD1 and SD2, told apart by their text encoders' widths
            wide = self.base.model_config.unet_config.get("context_dim") == 1024
            kind = ("sd2_v" if velocity else "sd2") if wide else "sd1"
        prediction = "v" if velocity else "epsilon" if noise else ""
        return Base(self.file.name if self.file else kind, _FAMILIES.get(kind, kind), prediction, self.file)

    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        if self._live:
            return self._live.numbered(prompts, self.device)
        self._restore()
        return self.read_prompts(prompts)

    def read_prompts(self, prompts: list[str]) -> Conditioning:
        parts = []
        with torch.inference_mode(not self._live):
            for prompt in prompts:
                encoded = self.clip.encode_from_tokens(self.clip.tokenize(prompt), return_pooled=True, return_dict=True)
                # inference tensors cannot be saved for backward: clone
                parts.append({k: v.clone().to(self.device) for k, v in encoded.items() if torch.is_tensor(v)})
        return Conditioning.cat([_conditioning(p.pop("cond"), p.pop("pooled_output", None), p) for p in parts])

    def encode_images(self, images: Tensor) -> Tensor:
        self._restore()
        with torch.inference_mode():
            latents = torch.cat([self.vae.encode(image[None, ..., :3]) for image in images])
        self._shapes[tuple(images.shape[1:3])] = tuple(latents.shape[1:])
        return self.base.process_latent_in(latents.float().clone()).to(self.device)

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, ...]:
        if size not in self._shapes:
            self.encode_images(torch.zeros(1, *size, 3))
        return self._shapes[size]

    def decode(self, latents: Tensor) -> Tensor:
        self._restore()
        with torch.inference_mode():
            return self.vae.decode(self.base.process_latent_out(latents.detach().clone())).cpu().float().clone()

    @property
    def _sampling(self):
        return self.base.model_sampling

    def _sigma(self, percent: Tensor) -> Tensor:
        """Percent of the schedule done, 0.001 to 0.999, to sigma"""
        values = [float(self._sampling.percent_to_sigma(p)) for p in (0.001 + 0.998 * percent).tolist()]
        return torch.tensor(values, device=self.device)

    def draw_sigmas(self, count: int, generator: torch.Generator) -> Tensor:
        """Uniform over the schedule; logit-normal for flow models"""
        if isinstance(self._sampling, comfy.model_sampling.CONST):
            return self._sigma(torch.sigmoid(torch.randn(count, generator=generator)))
        return self._sigma(torch.rand(count, generator=generator))

    def sigma_at(self, share: Tensor) -> Tensor:
        if isinstance(self._sampling, comfy.model_sampling.CONST):  # whose schedule is shifted for sampling: not once more here
            return share.clamp(min=0.001).to(self.device)
        return self._sigma(1 - share)

    def even_sigmas(self, count: int) -> Tensor:
        middle = (torch.arange(count, dtype=torch.float64) + 0.5) / count
        if isinstance(self._sampling, comfy.model_sampling.CONST):
            middle = torch.sigmoid(torch.special.ndtri(middle))
        return self._sigma(middle.float())

    def noised(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return self._sampling.noise_scaling(sigma.view(-1, *[1] * (latents.ndim - 1)), noise, latents, False)

    def _error_scale(self, sigma: Tensor, ndim: int) -> Tensor:
        """Error of the predicted x0 over this is the model's native error (noise, velocity ...)"""
        shape = (-1, *[1] * (ndim - 1))
        one, sigma = torch.ones(len(sigma), device=sigma.device).view(shape), sigma.view(shape)
        s = self._sampling
        return s.calculate_denoised(sigma, one, one * 0) - s.calculate_denoised(sigma, one * 0, one * 0)

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        if torch.is_grad_enabled():
            self._prepare()
            self.cancel.hold()
        elif not self._trainable[0].ready:  # else it is loaded, and weights must stay where they are
            if not self.cancel.held:  # a cancel ends calibration; from the first step on the run itself looks for it
                self.cancel.check()
            self._load()
        conditioning = self._live.encoded(conditioning, self.read_prompts)
        rows, parts = [], []
        for part, conditions in self._batches(noised, conditioning):
            rows += part
            parts.append(self.base.apply_model(noised[part], sigma[part], **conditions))
        x0 = torch.cat(parts)[torch.tensor(rows, device=self.device).argsort()]
        return x0.float() / self._error_scale(sigma, noised.ndim)

    def _batches(self, noised: Tensor, conditioning: Conditioning) -> list[tuple[list[int], dict]]:
        """Rows that may go through the model together, with its keyword conditions.

        As in ComfyUI's sampler: conditions are made prompt by prompt and joined where they say they can be.
        """
        if conditioning.more is None and len(set(conditioning.lengths)) == 1:
            together = self._model_conditions(noised, conditioning)
            return [(list(range(len(noised))), {k: v.cond for k, v in together.items()})]
        groups: list[tuple[list[int], list[dict]]] = []
        for row in range(len(noised)):
            own = self._model_conditions(noised[row : row + 1], conditioning[row : row + 1])
            for rows, held in groups:
                if own.keys() == held[0].keys() and all(held[0][k].can_concat(own[k]) for k in own):
                    rows.append(row)
                    held.append(own)
                    break
            else:
                groups.append(([row], [own]))
        return [(rows, {k: c.concat([h[k] for h in held[1:]]) for k, c in held[0].items()}) for rows, held in groups]

    def _model_conditions(self, noised: Tensor, conditioning: Conditioning) -> dict:
        """What the family's model takes beside noised latents, for prompts of one length; as ComfyUI's samplers ask"""
        options = _options(conditioning)
        height, width = noised.shape[-2] * 8, noised.shape[-1] * 8
        conditions = self.base.extra_conds(
            cross_attn=options.pop("context"), noise=noised, device=self.device, width=width, height=height,
            prompt_type="positive", latent_image=torch.zeros_like(noised), denoise_mask=None, seed=0, **options,
        )  # fmt: skip
        return {k: c.process_cond(batch_size=len(noised), device=self.device, area=None) for k, c in conditions.items()}

    def target(self, latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        return latents / self._error_scale(sigma, latents.ndim)

    def sample(
        self, conditioning: Conditioning, seed: int, steps: int = 20, guidance: float = 4.0, size: tuple[int, int] = (512, 512)
    ) -> Tensor:
        """Through ComfyUI's own sampler (Euler, simple), so that every family is sampled as its users do"""
        conditioning, empty = (self._live.encoded(c, self.read_prompts) for c in (conditioning, self.encode_prompts([""])))
        shape, count = self.latent_shape(size), len(conditioning)
        noise = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) for i in range(count)])
        # one condition serves a whole batch of the sampler's: prompts that differ in more than values go one by one
        alike = conditioning.more is None and len(set(conditioning.lengths)) == 1
        parts = []
        self._restore()
        for rows in [slice(0, count)] if alike else [slice(i, i + 1) for i in range(count)]:
            wanted = _sampler_input(conditioning[rows])
            with torch.inference_mode():
                parts.append(
                    comfy.sample.sample(
                        self.patcher, noise[rows], steps, guidance, "euler", "simple", wanted, _sampler_input(empty),
                        torch.zeros_like(noise[rows]), disable_pbar=True, seed=seed, callback=lambda *_: self.cancel.check(),
                    )
                )  # fmt: skip
        return self.base.process_latent_in(torch.cat(parts).float().clone()).to(self.device)


def _conditioning(context: Tensor, pooled: Tensor | None, more: dict[str, Tensor]) -> Conditioning:
    """One prompt's; context [1, tokens, width]"""
    pooled = None if pooled is None else pooled.float()
    return Conditioning(context.float(), pooled, [context.shape[1]], [more] if more else None)


def _options(conditioning: Conditioning) -> dict[str, Tensor | None]:
    """Keywords of ComfyUI for prompts of one length: the context without its padding, and all that goes with it"""
    # a family without a pooled vector asks for it all the same
    options = {"context": conditioning.context[:, : conditioning.lengths[0]], "pooled_output": conditioning.pooled}
    for key in conditioning.more[0] if conditioning.more else ():
        options[key] = torch.cat([m[key] for m in conditioning.more])
    return options


def _sampler_input(conditioning: Conditioning) -> list:
    options = {k: None if v is None else v.cpu() for k, v in _options(conditioning).items()}
    return [[options.pop("context"), options]]
