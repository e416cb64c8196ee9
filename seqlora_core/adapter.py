"""One LoRA: lora_down and lora_up for each layer, and its file.

A layer's name is the stem of its keys in the file, e.g. `diffusion_model.joint_blocks.0.x_block.attn.qkv`
(`.lora_down.weight`, `.lora_up.weight`, `.alpha`), the generic spelling that stock ComfyUI loaders read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import UserError
from .metadata import file_hashes, network


@dataclass
class LayerDelta:
    """The change of one weight: `up @ down`, any alpha already folded into `up`.  down [r, in], up [out, r]."""

    down: Tensor
    up: Tensor

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    def dense(self) -> Tensor:
        """[out, in]"""
        return self.up @ self.down

    def energy(self) -> Tensor:
        """Squared Frobenius norm of the change, from r x r products only."""
        return ((self.up.mT @ self.up) * (self.down @ self.down.mT)).sum()


@dataclass
class Adapter:
    """Layer name -> change, with the text metadata of its file."""

    layers: dict[str, LayerDelta]
    metadata: dict[str, str] = field(default_factory=dict)

    def scaled(self, strength: float) -> Adapter:
        return Adapter({n: LayerDelta(d.down, d.up * strength) for n, d in self.layers.items()}, self.metadata)

    def to(self, *args, **kwargs) -> Adapter:
        moved = {n: LayerDelta(d.down.to(*args, **kwargs), d.up.to(*args, **kwargs)) for n, d in self.layers.items()}
        return Adapter(moved, self.metadata)

    @property
    def triggers(self) -> list[str]:
        return [t.strip() for t in self.metadata.get("seqlora.trigger", "").split(",") if t.strip()]


def concatenate(adapters: list[Adapter]) -> Adapter:
    """The plain sum of several adapters as one of summed rank: down and up stacked, layer by layer."""
    names = dict.fromkeys(name for a in adapters for name in a.layers)
    layers = {}
    for name in names:
        parts = [a.layers[name] for a in adapters if name in a.layers]
        layers[name] = LayerDelta(torch.cat([p.down for p in parts]), torch.cat([p.up for p in parts], dim=1))
    return Adapter(layers)


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write aside, flush to the disk, rename: the file is whole or not there, whatever is killed when.

    Equal contents give equal bytes: the library writes metadata in an order of its own each time, so the header is
    put together here.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    blob = save({k: v.detach().cpu().contiguous() for k, v in tensors.items()})
    end = 8 + int.from_bytes(blob[:8], "little")
    header = {"__metadata__": dict(sorted(metadata.items())), **json.loads(blob[8:end])}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as f:
            f.write(len(text).to_bytes(8, "little") + text)
            f.write(memoryview(blob)[end:])
            f.flush()
            os.fsync(f.fileno())
        os.replace(part, path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror or error}; free some space or choose another folder") from error


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no file at {path}: check the name")
    try:
        with safe_open(path, "pt") as f:
            return {k: f.get_tensor(k) for k in f.keys()}, dict(f.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is not a readable safetensors file ({error}); download or export it again") from error


def check_useful(path: Path, adapter: Adapter) -> None:
    """UserError for an adapter that does nothing or is not finite."""
    for name, delta in adapter.layers.items():
        if not (delta.up.isfinite().all() and delta.down.isfinite().all()):
            raise UserError(f"not saving {path}: layer {name} is not finite; lower the learning rate and train again")
    if not any(delta.up.any() for delta in adapter.layers.values()):
        raise UserError(f"not saving {path}: every lora_up is zero, the adapter does nothing; train for more steps")


def save_adapter(path: Path, adapter: Adapter, dtype: torch.dtype = torch.float32) -> None:
    """Write an ordinary LoRA file, with the hashes that other programs know it by.  Refuses what `check_useful` does."""
    check_useful(path, adapter)
    tensors = {}
    for name, delta in adapter.layers.items():
        tensors[f"{name}.lora_down.weight"] = delta.down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = delta.up.to(dtype)
        tensors[f"{name}.alpha"] = torch.tensor(float(delta.rank))
    metadata = {**adapter.metadata, **network(adapter)}
    write_safetensors(path, tensors, metadata | file_hashes(tensors, metadata))


def load_adapter(path: Path) -> Adapter:
    """Read a LoRA file in the spelling above, in float32, alpha / rank folded into lora_up."""
    tensors, metadata = read_safetensors(path)
    layers = {}
    stems = sorted(k.removesuffix(".lora_down.weight") for k in tensors if k.endswith(".lora_down.weight"))
    for stem in stems:
        down, up = tensors[f"{stem}.lora_down.weight"].float(), tensors.get(f"{stem}.lora_up.weight")
        if up is None:
            raise UserError(f"{path}: {stem} has lora_down but no lora_up; the file is incomplete, get it again")
        up = up.float()
        if down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            raise UserError(
                f"{path}: {stem} has lora_down {list(down.shape)} and lora_up {list(up.shape)}, which do not multiply; "
                "it may be a convolution LoRA or a transposed file, load it with the stock LoraLoader instead"
            )
        if not (down.isfinite().all() and up.isfinite().all()):
            raise UserError(f"{path}: {stem} holds values that are not finite; the file is damaged, get it again")
        alpha = tensors.get(f"{stem}.alpha")
        scale = float(alpha) / down.shape[0] if alpha is not None else 1.0
        layers[stem] = LayerDelta(down, up * scale)
    if not layers:
        raise UserError(f"{path} holds no '*.lora_down.weight' tensors: it is not a LoRA in kohya's spelling")
    return Adapter(layers, metadata)


def json_metadata(values: dict) -> dict[str, str]:
    """safetensors metadata holds text only: everything else as JSON."""
    return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in values.items()}
