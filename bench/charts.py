"""Plots as SVG, with nothing but text: lines over a number axis, and bars."""

import math
from collections.abc import Mapping, Sequence
from html import escape

_COLOURS = ("#1b6ca8", "#d1495b", "#2e933c", "#8f5bb5", "#c77d0a", "#4a4a4a", "#00929a", "#b3427f")
_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 190, 40, 50

Series = Mapping[str, Sequence[tuple[float, float]]]
"""Name of a line → its points."""


def lines(title: str, x_name: str, y_name: str, series: Series, *, log_x: bool = False, log_y: bool = False) -> str:
    """A chart of lines; its axes begin at 0 unless they are logarithmic."""
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    if not xs:
        return _frame(title, x_name, y_name, [])
    across = _Axis(min(xs) if log_x else min(0.0, *xs), max(xs), _LEFT, _WIDTH - _RIGHT, log_x)
    up = _Axis(min(y for y in ys if y > 0 or not log_y) if log_y else 0.0, max(ys), _HEIGHT - _BOTTOM, _TOP, log_y)
    parts = [_tick_x(across, x) for x in (sorted(set(xs)) if log_x and len(set(xs)) < 12 else across.ticks())]
    parts += [_tick_y(up, y) for y in up.ticks()]
    for index, (name, points) in enumerate(series.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        placed = [(across.place(x), up.place(y)) for x, y in points if y > 0 or not log_y]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(placed) < 40:
            parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in placed]
        parts.append(_legend(index, name, colour))
    return _frame(title, x_name, y_name, parts)


def bars(title: str, y_name: str, groups: Mapping[str, Mapping[str, float]], *, line: float | None = None) -> str:
    """A chart of bars: group → name of the bar → height. Args: line: a bar to reach, drawn across."""
    names = list(dict.fromkeys(name for group in groups.values() for name in group))
    highest = max([value for group in groups.values() for value in group.values()] + [line or 0.0, 1e-9])
    up = _Axis(0.0, highest, _HEIGHT - _BOTTOM, _TOP, False)
    parts = [_tick_y(up, y) for y in up.ticks()]
    wide = (_WIDTH - _LEFT - _RIGHT) / max(1, len(groups))
    each = 0.8 * wide / max(1, len(names))
    for place, (group, values) in enumerate(groups.items()):
        left = _LEFT + place * wide + 0.1 * wide
        for index, name in enumerate(names):
            if name in values:
                top, colour = up.place(values[name]), _COLOURS[index % len(_COLOURS)]
                height = _HEIGHT - _BOTTOM - top
                at = f'x="{left + index * each:.1f}" y="{top:.1f}" width="{0.9 * each:.1f}" height="{height:.1f}"'
                parts.append(f'<rect {at} fill="{colour}"/>')
        middle = _LEFT + (place + 0.5) * wide
        parts.append(f'<text x="{middle:.1f}" y="{_HEIGHT - _BOTTOM + 18}" text-anchor="middle">{escape(group)}</text>')
    parts += [_legend(index, name, _COLOURS[index % len(_COLOURS)]) for index, name in enumerate(names)]
    if line is not None:
        y, end = up.place(line), _WIDTH - _RIGHT
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{end}" stroke="black" stroke-dasharray="6 4"/>')
    return _frame(title, "", y_name, parts)


class _Axis:
    """Where values lie, in pixels."""

    def __init__(self, low: float, high: float, begin: float, end: float, log: bool) -> None:
        self._log = log
        self._low, self._high = low, high if high > low else low + 1
        self._begin, self._end = begin, end

    def place(self, value: float) -> float:
        low, high = self._low, self._high
        if self._log:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self._begin + (value - low) / (high - low) * (self._end - self._begin)

    def ticks(self) -> list[float]:
        if self._log:
            first, last = math.floor(math.log10(self._low)), math.ceil(math.log10(self._high))
            found = [
                m * 10.0**power for power in range(first, last + 1) for m in ((1, 2, 5) if last - first < 3 else (1,))
            ]
            return [value for value in found if self._low <= value <= self._high]
        step = 10 ** math.floor(math.log10((self._high - self._low) / 4))
        step *= next(m for m in (1, 2, 5, 10) if (self._high - self._low) / (m * step) <= 6)
        first = math.ceil(self._low / step)
        return [step * number for number in range(first, int(self._high / step + 1e-9) + 1)]


def _tick_x(axis: _Axis, value: float) -> str:
    x, y = axis.place(value), _HEIGHT - _BOTTOM
    return (
        f'<path d="M{x:.1f} {y}v5" stroke="black"/><text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{value:g}</text>'
    )


def _tick_y(axis: _Axis, value: float) -> str:
    y = axis.place(value)
    grid = f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#ddd"/>'
    return f'{grid}<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>'


def _legend(index: int, name: str, colour: str) -> str:
    x, y = _WIDTH - _RIGHT + 14, _TOP + 10 + 20 * index
    mark = f'<path d="M{x} {y}h18" stroke="{colour}" stroke-width="4"/>'
    return f'{mark}<text x="{x + 24}" y="{y + 4}">{escape(name)}</text>'


def _frame(title: str, x_name: str, y_name: str, parts: list[str]) -> str:
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    up = (_TOP + _HEIGHT - _BOTTOM) / 2
    axes = f'<path d="M{_LEFT} {_TOP}V{_HEIGHT - _BOTTOM}H{_WIDTH - _RIGHT}" stroke="black" fill="none"/>'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_WIDTH}" height="{_HEIGHT}" font-family="sans-serif" '
            'font-size="12">',
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
            *parts,
            axes,
            f'<text x="{middle}" y="{_HEIGHT - 10}" text-anchor="middle">{escape(x_name)}</text>',
            f'<text transform="translate(18 {up}) rotate(-90)" text-anchor="middle">{escape(y_name)}</text>',
            "</svg>\n",
        ]
    )
