"""Values as people read them, in tables and pictures of docs/dashboards.md."""

_STEPS = {
    "bytes": ((1e9, " GB"), (1e6, " MB"), (1e3, " kB"), (0, " B")),
    "hertz": ((1e9, " GHz"), (1e6, " MHz"), (0, " Hz")),
}
_UNITS = {"s": " s", "reqps": " /s", "d": " d", "celsius": " °C", "watt": " W"}


def shown(value: float, unit: str, decimals: int | None = None) -> str:
    """With its unit. Args: unit: one of Grafana's. decimals: as many; None: as many as tell something."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit in _STEPS:
        size, name = next((size, name) for size, name in _STEPS[unit] if value >= size)
        return f"{value / (size or 1):.3g}{name}"
    if unit == "s" and 0 < value < 1:
        return f"{1e3 * value:.3g} ms" if value >= 1e-3 else f"{1e6 * value:.3g} µs"
    text = f"{value:.4g}" if decimals is None else f"{value:.{decimals}f}"
    return text + _UNITS.get(unit, "")
