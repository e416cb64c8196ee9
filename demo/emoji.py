"""Sprites of the permissively licensed emoji sets, rendered once and cached.

The sets come from npm as one JSON file of SVG bodies each (package `@iconify-json/<set>`).
An icon's name is its caption.  Licences: see THIRD_PARTY_NOTICES.md.
"""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

# style word in captions -> (npm package, version)
SETS = {
    "noto": ("@iconify-json/noto", "1.2.9"),
    "classic": ("@iconify-json/noto-v1", "1.2.5"),
    "firefox": ("@iconify-json/fxemoji", "1.2.2"),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7"),
    "flat": ("@iconify-json/fluent-emoji-flat", "1.2.6"),
}
STYLES = ("noto", "fluent")  # that the denoiser learns; the autoencoder sees all sets
SPRITE_SIZE = 96  # px; scenes are 64 px, so a sprite is only ever shrunk


def npm_package(name: str, version: str, cache: Path) -> Path:
    """Folder with the unpacked npm package; downloads it on first use."""
    folder = cache / f"{name.strip('@').replace('/', '-')}-{version}"
    if not (folder / "package.json").exists():
        cache.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(
            ["npm", "pack", "--silent", f"{name}@{version}"], cwd=cache, check=True, capture_output=True, text=True
        ).stdout.split()[-1]
        with tarfile.open(cache / packed) as tar:
            for member in tar.getmembers():
                member.name = str(Path(*Path(member.name).parts[1:]))
            tar.extractall(folder, filter="data")
        (cache / packed).unlink()
    return folder


def icon_set(style: str, cache: Path) -> dict[str, str]:
    """Icon name -> SVG text of one style, skin tones left out."""
    data = json.loads((npm_package(*SETS[style], cache) / "icons.json").read_text())
    width, height = data.get("width", 16), data.get("height", 16)
    svg = {}
    for name, icon in data["icons"].items():
        if "skin-tone" in name or name.endswith(("-light", "-dark", "-medium", "-medium-light", "-medium-dark")):
            continue
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {icon.get('width', width)} {icon.get('height', height)}"
        svg[name] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{box}">{icon["body"]}</svg>'
        )
    for name, alias in data.get("aliases", {}).items():
        if alias["parent"] in svg and set(alias) == {"parent"}:
            svg.setdefault(name, svg[alias["parent"]])
    return svg


def render(svg: str, size: int = SPRITE_SIZE) -> np.ndarray:
    """[size, size, 4] uint8 RGBA."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def sprites(cache: Path, names: list[str] | None = None) -> dict[tuple[str, str], np.ndarray]:
    """(style, name) -> RGBA sprite, for the names given in STYLES, or for every icon of every set."""
    stored = cache / ("sprites_all.npz" if names is None else f"sprites_{len(names)}.npz")
    if stored.exists():
        with np.load(stored) as data:
            return {tuple(key.split("|")): data[key] for key in data.files}
    result = {}
    for style in SETS if names is None else STYLES:
        icons = icon_set(style, cache)
        for name in sorted(icons) if names is None else names:
            if name in icons:
                result[style, name] = render(icons[name], 64 if names is None else SPRITE_SIZE)
    np.savez(stored, **{"|".join(key): sprite for key, sprite in result.items()})
    return result
