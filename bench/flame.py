"""A flame graph as SVG from folded stacks: width is time, callers below what they call."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from html import escape
from zlib import crc32

_WIDTH, _ROW, _LEAST = 1400, 17, 0.6


@dataclass(slots=True)
class _Frame:
    weight: float = 0.0
    parts: "dict[str, _Frame]" = field(default_factory=dict)


def draw(title: str, stacks: Mapping[tuple[str, ...], float]) -> str:
    """Args: stacks: frames, outermost first → samples."""
    root = _Frame()
    for frames, weight in stacks.items():
        here = root
        here.weight += weight
        for name in frames:
            here = here.parts.setdefault(name, _Frame())
            here.weight += weight
    parts: list[str] = []
    scale = _WIDTH / max(1e-9, root.weight)
    depth = _depth(root, scale)
    height = 40 + _ROW * depth

    def add(frame: _Frame, left: float, level: int) -> None:
        for name, part in sorted(frame.parts.items()):
            width = part.weight * scale
            if width >= _LEAST:
                y = height - _ROW * (level + 1)
                share = f"{escape(name)}: {part.weight / root.weight:.1%}"
                text = escape(name[: int(width / 6.5)]) if width > 25 else ""
                parts.append(
                    f'<g><title>{share}</title><rect x="{left:.1f}" y="{y}" width="{width:.1f}" height="{_ROW - 1}" '
                    f'fill="{_colour(name)}"/><text x="{left + 2:.1f}" y="{y + 12}">{text}</text></g>'
                )
                add(part, left, level + 1)
            left += width

    add(root, 0.0, 0)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{height}" font-family="monospace" '
            'font-size="11">',
            f'<rect width="100%" height="100%" fill="white"/><text x="4" y="20" font-size="15">{escape(title)}</text>',
            *parts,
            "</svg>\n",
        ]
    )


def _depth(frame: _Frame, scale: float) -> int:
    return 1 + max((_depth(part, scale) for part in frame.parts.values() if part.weight * scale >= _LEAST), default=0)


def _colour(name: str) -> str:
    room = name.partition("(")[2].partition(":")[0].rpartition("/")[0]
    hue = crc32(room.encode()) % 360
    return f"hsl({hue} 60% {72 + crc32(name.encode()) % 12}%)"
