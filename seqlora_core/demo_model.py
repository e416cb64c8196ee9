"""The embedded demo model, hosted by diffusers: SD3's MMDiT, TAESD3 and a small CLIP from one stock-layout file.

diffusers, transformers and tokenizers are imported when a model is loaded, not before.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from .attach import Site
from .denoiser import Conditioning, FlowMatching, fingerprint
from .errors import UserError
from .live_prompts import LivePrompts, clip_sites, token_site
from .metadata import Base
from .tensor_file import read_safetensors
from .transformer_sites import sd3_sites

DEMO_FOLDER = Path(__file__).resolve().parent.parent / "demo"
DEMO_MODEL = DEMO_FOLDER / "model" / "seqlora_demo.safetensors"
TOKENIZER = DEMO_FOLDER / "model" / "tokenizer.json"
# Stock SD3 pads prompts to 77 tokens.  At 64 px the picture is 16 tokens: padding would be most of the work.
CONTEXT_LENGTH = 24
END_OF_TEXT = 49407
SIZE = 64
CLIP_SIZE = {
    "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 3, "projection_dim": 64,
    "max_position_embeddings": CONTEXT_LENGTH,
}  # fmt: skip


def clip_config(vocabulary: int = 49408, end_of_text: int = END_OF_TEXT):
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        **CLIP_SIZE, vocab_size=vocabulary, hidden_act="quick_gelu", bos_token_id=0,
        eos_token_id=end_of_text,
    )  # fmt: skip


def tokenizer(length: int = CONTEXT_LENGTH):
    """Function from captions to token ids [n, length]: CLIP's own tokens, padded with end-of-text as SD3 does."""
    from tokenizers import Tokenizer

    tok = Tokenizer.from_file(str(TOKENIZER))
    tok.enable_truncation(length)
    tok.enable_padding(length=length, pad_id=END_OF_TEXT, pad_token="<|endoftext|>")
    return lambda captions: torch.tensor([encoding.ids for encoding in tok.encode_batch(list(captions))])


def encode_text(model, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """SD3's reading of a CLIP: hidden states before the last layer, and the pooled final state.

    tokens [n, length] -> [n, length, width], [n, width]
    """
    out = model(tokens, output_hidden_states=True)
    return out.hidden_states[-2], out.pooler_output


def _load_denoiser(weights: dict[str, Tensor]):
    from diffusers import SD3Transformer2DModel
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    width = weights["x_embedder.proj.weight"].shape[0]
    depth = width // 64
    grid = int(weights["pos_embed"].shape[1] ** 0.5)
    converted = convert_sd3_transformer_checkpoint_to_diffusers(dict(weights))
    # a small CLIP fills only the first columns of SD3's 4,096 text features and 2,048 pooled ones; the rest of the
    # input is always zero, so leaving its columns out changes nothing but the time
    for key in ("context_embedder.weight", "time_text_embed.text_embedder.linear_1.weight"):
        converted[key] = converted[key][:, : CLIP_SIZE["hidden_size"]].clone()
    model = SD3Transformer2DModel(
        sample_size=SIZE // 8, patch_size=2, in_channels=16, out_channels=16, num_layers=depth, attention_head_dim=64,
        num_attention_heads=depth, joint_attention_dim=CLIP_SIZE["hidden_size"], caption_projection_dim=width,
        pooled_projection_dim=CLIP_SIZE["hidden_size"], pos_embed_max_size=grid, qk_norm="rms_norm",
    )  # fmt: skip
    model.load_state_dict(converted)
    return model


def _load_autoencoder(weights: dict[str, Tensor]):
    from diffusers import AutoencoderTiny

    model = AutoencoderTiny(latent_channels=16)
    converted = {}
    for key, value in weights.items():
        if key.startswith(("taesd_encoder.", "taesd_decoder.")):
            part, index, rest = key.split(".", 2)
            part = part.removeprefix("taesd_")
            # stock counts the decoder's leading Clamp, diffusers does not
            converted[f"{part}.layers.{int(index) - (part == 'decoder')}.{rest}"] = value
    model.load_state_dict(converted)
    return model


def _load_text_encoder(weights: dict[str, Tensor]):
    from transformers import CLIPTextModel

    model = CLIPTextModel(clip_config())
    # transformers 5 dropped the `text_model.` level
    old = any(k.startswith("text_model.") for k in model.state_dict())
    weights = {k if old else k.removeprefix("text_model."): v for k, v in weights.items() if k.startswith("text_model.")}
    model.load_state_dict(weights)
    return model


class DemoModel(FlowMatching):
    """`denoiser.Denoiser` on diffusers; raises UserError for a file of another layout."""

    size, pixel_step = SIZE, 16  # 2 x 2 latents of 8 x 8 pixels are a token

    def __init__(self, path: Path = DEMO_MODEL, device: str = "cpu", dtype: torch.dtype = torch.float32):
        self.path, self.device = Path(path), torch.device(device)
        tensors, _ = read_safetensors(self.path)
        parts: dict[str, dict[str, Tensor]] = {}
        for prefix in ("model.diffusion_model.", "first_stage_model.", "text_encoders.clip_l.transformer."):
            parts[prefix] = {k.removeprefix(prefix): v.float() for k, v in tensors.items() if k.startswith(prefix)}
            if not parts[prefix]:
                raise UserError(
                    f"{path} has no '{prefix}*' tensors: the command line takes files of the demo model's layout, and diffusers folders of SD1.5, SD2, SDXL, SD3, SD3.5 and Flux.1; "
                    "use the ComfyUI nodes for other models"
                )
        mmdit, vae, text = parts.values()
        self.mmdit = self._ready(_load_denoiser(mmdit), dtype)
        self.largest_side = self.pixel_step * self.mmdit.config.pos_embed_max_size
        self.vae = self._ready(_load_autoencoder(vae), dtype)
        self.text = self._ready(_load_text_encoder(text), dtype)
        self.tokenize, self.live = tokenizer(), LivePrompts()
        self._sites: list[Site] | None = None

    def sites(self) -> list[Site]:
        return [*self.live.sites, *self._own_sites()]

    def token_tables(self) -> list[Site]:
        return [token_site(self.text, "clip_l")]

    def adapt_text(self, attention: bool, tokens: bool = False) -> None:
        self.live.sites = [
            *(self.token_tables() if tokens else ()),
            *(clip_sites(self.text, "lora_te1") if attention else ()),
        ]

    def _own_sites(self) -> list[Site]:
        if self._sites is None:
            self._sites = sd3_sites(self.mmdit)
        return self._sites

    def _ready(self, part: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
        part.eval().requires_grad_(False)
        return torch.nn.Module.to(part, self.device, dtype)  # diffusers' own warns of parts to be kept in float32: of none

    @torch.no_grad()
    def encode_prompts(self, prompts: list[str]) -> Conditioning:
        return self.live.numbered(prompts, self.device) if self.live else self.read_prompts(prompts)

    def read_prompts(self, prompts: list[str]) -> Conditioning:
        return Conditioning(*encode_text(self.text, self.tokenize(prompts).to(self.device)))

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        x = images.to(self.device, self.vae.dtype).permute(0, 3, 1, 2) * 2 - 1
        return torch.cat([self.vae.encoder(part) for part in x.split(16)]).float()

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        x = torch.cat([self.vae.decoder(part) for part in latents.to(self.vae.dtype).split(16)])
        return (x.permute(0, 2, 3, 1) / 2 + 0.5).clamp(0, 1).float()

    def predict(self, noised: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        c, dtype = self.live.encoded(conditioning, self.read_prompts), self.mmdit.dtype
        return self.mmdit(noised.to(dtype), c.context, c.pooled, sigma * 1000, return_dict=False)[0].float()

    def latent_shape(self, size: tuple[int, int]) -> tuple[int, int, int]:
        return 16, size[0] // 8, size[1] // 8

    def fingerprint(self) -> str:
        return fingerprint(self._own_sites())

    def network(self) -> nn.Module:
        return self.mmdit

    def about(self) -> Base:
        return Base(self.path.name, "sd3", file=self.path)
