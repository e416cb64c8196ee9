"""A font that has the characters of a text: Pillow's own has Latin letters alone, and draws one and the same box for all others."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

# files that systems keep among their fonts, which Pillow looks for there
OF_SYSTEMS = (
    "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "wqy-zenhei.ttc", "msyh.ttc", "simsun.ttc", "YuGothM.ttc", "msgothic.ttc",
    "malgun.ttf", "PingFang.ttc", "Hiragino Sans GB.ttc", "AppleSDGothicNeo.ttc", "Arial Unicode.ttf", "DejaVuSans.ttf", "arial.ttf",
)  # fmt: skip
FAMILIES = (  # the same as matplotlib calls them
    "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Microsoft YaHei", "SimSun", "Yu Gothic",
    "MS Gothic", "Malgun Gothic", "PingFang SC", "PingFang HK", "Hiragino Sans GB", "Apple SD Gothic Neo", "Arial Unicode MS",
)  # fmt: skip
IN_NONE = "\U0010ffff"  # drawn as what a font lacks


def lettered(text: str, size: int):
    """The text and a font of that size with all its characters; where there is none, each that is lacking is spelt by its number"""
    from PIL import ImageFont

    for font in _fonts(size):
        if not _lacking(font, text):
            return text, font
    font = ImageFont.load_default(size)
    lacking = _lacking(font, text)
    return "".join(ascii(c)[1:-1] if c in lacking else c for c in text), font


def _fonts(size: int) -> Iterator:
    from PIL import ImageFont

    yield ImageFont.load_default(size)
    with contextlib.suppress(ImportError, OSError):
        from matplotlib import get_data_path

        yield ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", size)
    for file in OF_SYSTEMS:
        with contextlib.suppress(OSError):
            yield ImageFont.truetype(file, size)


def _lacking(font, text: str) -> set[str]:
    box = bytes(font.getmask(IN_NONE))
    return {c for c in set(text) if not c.isspace() and bytes(font.getmask(c)) == box}
