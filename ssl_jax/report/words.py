"""Numbers and names as reports, model cards and the terminal write them."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ssl_jax.methods import title
from ssl_jax.models.registry import encoder_name


def percent(fraction: float) -> str:
    """Formats a fraction in percent, with one decimal."""
    return f"{100 * fraction:.1f}"


def points(difference: float, sign: bool = True) -> str:
    """Formats a difference of two fractions in percentage points."""
    text = f"{100 * difference:{'+' if sign else ''}.1f}"
    return text.replace("-", "−")


def range_of_points(mean: float, half: float) -> str:
    """Formats an interval in percentage points; empty if it is unknown."""
    return "" if math.isnan(half) else f"{points(mean - half)} to {points(mean + half)}"


def number(value: float) -> str:
    """Formats a number with about four significant digits."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.4g}"
    return text.replace("-", "−")


def listed(names: Sequence[str]) -> str:
    """Joins names: "A", "A and B", "A, B and C"."""
    return " and ".join([", ".join(names[:-1])] * (len(names) > 1) + [*names[-1:]])


def run_title(config: dict[str, Any]) -> str:
    """Describes a run in a few words."""
    data = config.get("data", {}).get("name", "unknown data")
    return f"{title(config.get('method', 'unknown method'))} on {data}"


def network(run: dict[str, Any]) -> str:
    """Names a run's encoder from its record."""
    model = run["config"].get("model")
    custom = (run.get("derived") or {}).get("encoder")
    if custom or not model:
        return str(custom or "unknown network")
    return encoder_text(model)


def encoder_text(model: Mapping[str, Any]) -> str:
    """Names the encoder of `config.model`, with a ResNet's stem."""
    stem = f", {model['stem']} stem" if model.get("name", "resnet") == "resnet" else ""
    return f"{encoder_name(model)}{stem}"


def devices(found: Mapping[str, Any]) -> str:
    """Describes the devices that a run has recorded."""
    if "count" not in found:
        return "not recorded"
    parts = [f"{found['count']} × {found.get('kind', found.get('platform', '?'))}"]
    if found.get("processes", 1) != 1:
        parts.append(f"{found['processes']} processes")
    if "cpu_cores" in found:
        parts.append(f"{found['cpu_cores']} CPU cores per host")
    return ", ".join(parts)


def listing(value: Any) -> str:
    """Formats a JSON value as a line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {listing(item)}" for key, item in value.items()) or "not recorded"
    if isinstance(value, list):
        return ", ".join(listing(item) for item in value) or "none"
    return str(value)
