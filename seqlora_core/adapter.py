"""One LoRA: lora_down and lora_up for each layer, and its file.

A layer's name is the stem of its keys in the file, e.g. `diffusion_model.joint_blocks.0.x_block.attn.qkv`
(`.lora_down.weight`, `.lora_up.weight`, `.alpha`), the generic spelling that stock ComfyUI loaders read.  What other
trainers write is read under the names of `spelling.canonical`.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from .errors import UserError
from .metadata import file_hashes, network
from .spelling import Factors, canonical, factors, other_kind
from .tensor_file import read_safetensors, write_safetensors

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)
HALVES = (torch.float16, torch.bfloat16)
TOKEN_TABLES = ("token_embedding", ".shared", "embed_tokens")  # how the names of text encoders' token tables end
SIDES = (2, 4, 5)  # dimensions of a factor: of a linear layer, of a convolution over pictures, over videos
LARGEST_SCALE = 1000  # alpha over rank that is still believed


@dataclass
class LayerDelta:
    """The change of one weight: `up @ down`, any alpha already folded into `up`.  down [r, in], up [out, r].

    kernel: height and width of a convolution's kernel (of video models depth before them); its `in` is channels times
    these.  () of a linear layer.
    """

    down: Tensor
    up: Tensor
    kernel: tuple[int, ...] = ()

    @property
    def rank(self) -> int:
        """Directions r, in the file's own factors"""
        return self.stored()[0].shape[0]

    @property
    def shape(self) -> list[int]:
        """Of the weight that it changes, [out, in]"""
        down, up, _ = self.stored()
        return [up.shape[0], down.shape[1]]

    @property
    def acts(self) -> bool:
        """Whether it changes anything: of a layer that was never trained lora_up is zero"""
        down, up, _ = self.stored()
        return bool(up.abs().amax() and down.abs().amax())  # several times as fast as any()

    def stored(self) -> tuple[Tensor, Tensor, float]:
        """lora_down and lora_up as they lie in memory, and what their product is still to be multiplied by"""
        return self.down, self.up, 1.0

    def dense(self) -> Tensor:
        """[out, in]"""
        return self.up @ self.down

    def float(self) -> LayerDelta:
        """With factors of half precision in float32"""
        if not {t.dtype for t in self.stored()[:2]} & set(HALVES):
            return self
        return replace(self, down=self.down.float(), up=self.up.float())

    def scaled(self, strength: float) -> LayerDelta:
        """So many times this change; of factors of half precision, which would be rounded, when they are first read"""
        down, up, scale = self.stored()
        if {down.dtype, up.dtype} & set(HALVES):
            return Unfolded(down, up, self.kernel, scale * strength)
        return replace(self, up=self.up * strength)

    def by_channel(self, width: int) -> LayerDelta:
        """A convolution's change as one of its `width` input channels, each place of the kernel with outputs of its own:
        what it does where the places see unrelated inputs of one and the same moment.  Of equal energy; linear ones as they are.
        """
        places = self.down.shape[1] // width
        return (
            self
            if places == 1
            else replace(self, down=channel_rows(self.down, width), up=torch.block_diag(*[self.up] * places))
        )

    def energy(self) -> Tensor:
        """Squared Frobenius norm of the change, from r x r products only."""
        return ((self.up.mT @ self.up) * (self.down @ self.down.mT)).sum()


def channel_rows(down: Tensor, width: int) -> Tensor:
    """lora_down of a convolution [r, width x places] as rows of its input channels, place by place: [places x r, width]"""
    return down.view(len(down), width, -1).permute(2, 0, 1).reshape(-1, width)


def kernel_rows(rows: Tensor, rank: int) -> Tensor:
    """Back from `channel_rows`"""
    return rows.view(-1, rank, rows.shape[1]).permute(1, 2, 0).reshape(rank, -1)


class Unfolded(LayerDelta):
    """As a file holds it: when a factor is first read both become float32 and what alpha and strengths say is folded into `up`.

    Of a stack that is only added none is: a hundred files of many layers take less time to read, and less room.
    """

    def __init__(self, down: Tensor, up: Tensor, kernel: tuple[int, ...] = (), scale: float = 1.0):
        self._stored, self.kernel = (down, up, scale), kernel

    @property
    def down(self) -> Tensor:
        return self._folded()[0]

    @property
    def up(self) -> Tensor:
        return self._folded()[1]

    def _folded(self) -> tuple[Tensor, Tensor, float]:
        down, up, scale = self._stored
        if scale != 1:
            self._stored = down.float(), up.float() * scale, 1.0
        return self._stored

    def stored(self) -> tuple[Tensor, Tensor, float]:
        return self._stored


@dataclass
class Adapter:
    """Layer name -> change, with the text metadata of its file."""

    layers: dict[str, LayerDelta]
    metadata: dict[str, str] = field(default_factory=dict)

    def scaled(self, strength: float) -> Adapter:
        """Every change times the strength, those of token tables too"""
        return Adapter({n: d.scaled(strength) for n, d in self.layers.items()}, self.metadata)

    def to(self, *args, **kwargs) -> Adapter:
        """All factors as `Tensor.to` makes them: on a device, in a dtype"""
        moved = {n: replace(d, down=d.down.to(*args, **kwargs), up=d.up.to(*args, **kwargs)) for n, d in self.layers.items()}
        return Adapter(moved, self.metadata)

    def without_token_tables(self) -> Adapter:
        """Without what its own tokens' embeddings learnt: no prompt without these tokens meets that"""
        if not any(map(is_token_table, self.layers)):
            return self
        return Adapter({n: d for n, d in self.layers.items() if not is_token_table(n)}, self.metadata)

    @property
    def triggers(self) -> list[str]:
        """Of a concept's file its one, which may hold commas; of a stack's all of them"""
        said = self.metadata.get("seqlora.trigger", "")
        return [t.strip() for t in ([said] if "seqlora.name" in self.metadata else said.split(",")) if t.strip()]


def is_token_table(layer: str) -> bool:
    """Whether a layer of a LoRA file changes the embeddings of tokens: lora_up [vocabulary, r], lora_down [r, width]"""
    return layer.endswith(TOKEN_TABLES)


def concatenate(adapters: list[Adapter]) -> Adapter:
    """The plain sum of several adapters as one of summed rank: down and up stacked, layer by layer."""
    names = dict.fromkeys(name for a in adapters for name in a.layers)
    layers = {}
    for name in names:
        layers[name] = joined([a.layers[name] for a in adapters if name in a.layers])
    return Adapter(layers)


def joined(parts: list[LayerDelta]) -> LayerDelta:
    """The sum of several changes of one weight as one of summed rank"""
    return LayerDelta(torch.cat([p.down for p in parts]), torch.cat([p.up for p in parts], dim=1), parts[0].kernel)


def check_useful(path: Path, adapter: Adapter, extra: bool = False) -> None:
    """UserError for an adapter that does nothing or is not finite.  extra: something beside it in the file does something."""
    for name, delta in adapter.layers.items():
        if not (delta.up.isfinite().all() and delta.down.isfinite().all()):
            raise UserError(f"not saving {path}: layer {name} is not finite; lower the learning rate and train again")
    if not extra and not any(delta.up.any() for delta in adapter.layers.values()):
        raise UserError(
            f"not saving {path}: every lora_up is zero, it would do nothing; train for more steps, or give a strength other than 0"
        )


def save_adapter(
    path: Path, adapter: Adapter, dtype: torch.dtype = torch.float32, extra: dict[str, Tensor] | None = None
) -> None:
    """Write an ordinary LoRA file, with the hashes that other programs know it by.  Refuses what `check_useful` does.

    extra: tensors that go into it as they are, such as changes of biases.
    """
    check_useful(path, adapter, any(t.any() for t in (extra or {}).values()))
    tensors = dict(extra or {})
    for name, delta in adapter.layers.items():
        down, up = delta.down.to(dtype), delta.up.to(dtype)
        if delta.kernel:
            down, up = down.reshape(delta.rank, -1, *delta.kernel), up.reshape(*up.shape, *[1] * len(delta.kernel))
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = down.contiguous(), up.contiguous()
        tensors[f"{name}.alpha"] = torch.tensor(float(delta.rank))
    metadata = {**adapter.metadata, **network(adapter)}
    write_safetensors(path, tensors, metadata | file_hashes(tensors, metadata))


def load_adapter(path: Path) -> Adapter:
    """Read a LoRA file of any trainer's spelling, in float32, alpha / rank folded into lora_up.

    UserError for a file that is missing, damaged, of another kind than plain low-rank, or not finite.
    """
    tensors, metadata = read_safetensors(path)
    kind = other_kind(tensors)
    if kind:
        raise UserError(f"{path} is {kind}, no plain LoRA: only the nodes read it, with the model that it is for connected")
    found = factors(tensors, str(path))
    if not found:
        raise UserError(f"{path} holds no lora_down or lora_A tensors among its {len(tensors)}: it is not a LoRA")
    two_encoders = any("text_encoder_2." in stem for stem in found)
    tensors.clear()  # what is converted is let go: a file of half precision takes twice its size, not three times
    layers: dict[str, LayerDelta] = {}
    for stem in list(found):
        name = canonical(stem, two_encoders)
        if name in layers:
            raise UserError(f"{path} holds the layer {name} twice, under two spellings; the file is damaged, get it again")
        layers[name] = layer_delta(found.pop(stem), f"{path}: {stem}")
    return Adapter(layers, metadata)


def layer_delta(layer: Factors, source: str, as_stored: bool = False) -> LayerDelta:
    """A layer's factors in float32 and two dimensions; the middle of a Tucker LoCon goes into lora_down.

    as_stored: factors of half precision stay so, or until alpha is folded in when they are first read.
    """
    _check_numbers(layer, source)
    scale = 1.0 if layer.alpha is None else layer.alpha / layer.down.shape[0]
    as_stored = as_stored and layer.mid is None and {layer.down.dtype, layer.up.dtype} <= {*HALVES, torch.float32}
    down, up = (layer.down, layer.up) if as_stored else (layer.down.float(), layer.up.float())
    if scale != 1 and not as_stored:
        up = up * scale
    fits = down.ndim in SIDES and up.ndim in SIDES and down.shape[0] == up.shape[1] and up.shape[2:].numel() == 1
    if layer.mid is not None:
        fits = fits and layer.mid.ndim == 4 and layer.mid.shape[:2] == (len(down), len(down)) and down.shape[2:].numel() == 1
    if not fits:
        turned = down.ndim == up.ndim == 2 and down.shape[1] == up.shape[0]
        raise UserError(
            f"{source} has lora_down {list(layer.down.shape)} and lora_up {list(layer.up.shape)}, which do not multiply; "
            f"{'both are transposed, write them as [rank, in] and [out, rank]' if turned else 'the file is damaged, get it again'}"
        )
    if layer.mid is not None:
        down = torch.einsum("r q h w, q i -> r i h w", layer.mid.float(), down.flatten(1))
    delta = LayerDelta(down.flatten(1), up.flatten(1), tuple(down.shape[2:]))
    if scale != 1 and as_stored:
        delta = Unfolded(delta.down, delta.up, delta.kernel, scale)
    # the factors' lengths, nan or infinite if any value is, bound the root of the energy
    stored_down, stored_up, left = delta.stored()
    bound = _length(stored_down) * _length(stored_up) * abs(left)
    if not bound < 1e18 and not math.isfinite(delta.float().energy()):
        if not all(part.float().isfinite().all() for part in (layer.down, layer.up, layer.mid) if part is not None):
            raise UserError(f"{source} holds values that are not finite; the file is damaged, get it again")
        raise UserError(
            f"{source} holds values so large that lora_up @ lora_down is not finite; the file is damaged, get it again"
        )
    return delta


def _length(part: Tensor) -> float:
    return float(torch.linalg.vector_norm(part, dtype=torch.float32))


def _check_numbers(layer: Factors, source: str) -> None:
    """UserError for factors of a wrong type, without a rank, or with an alpha that no training sets."""
    for part in (layer.down, layer.up, layer.mid):
        if part is not None and part.dtype not in FLOATS:
            raise UserError(
                f"{source} is of {str(part.dtype).removeprefix('torch.')}: convert the LoRA to float16 or float32 first"
            )
        if part is not None and (part.numel() == 0 or part.ndim == 0):
            raise UserError(f"{source} is of rank 0 or of no size, {list(part.shape)}: the file is damaged, get it again")
    rank = layer.down.shape[0]
    if layer.alpha is not None and not abs(layer.alpha) <= LARGEST_SCALE * max(rank, 1):
        raise UserError(
            f"{source} has alpha {layer.alpha:g} at rank {rank}, more than {LARGEST_SCALE} times the rank: it would drown "
            "everything else; the file is damaged, or its alpha must be set right"
        )


def json_metadata(values: dict) -> dict[str, str]:
    """safetensors metadata holds text only: everything else as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
