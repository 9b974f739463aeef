"""Numbers and names as the report writes them."""

import math
from html import escape
from typing import Any

from ssl_jax.methods import title
from ssl_jax.models.resnet import resnet_name


def percent(fraction: float) -> str:
    """A fraction in percent, with a decimal."""
    return f"{100 * fraction:.1f}"


def points(difference: float, sign: bool = True) -> str:
    """A difference of two fractions in percentage points."""
    text = f"{100 * difference:{'+' if sign else ''}.1f}"
    return text.replace("-", "−")


def range_of_points(mean: float, half: float) -> str:
    """An interval in percentage points; nothing where it has no width."""
    return "" if math.isnan(half) else f"{points(mean - half)} to {points(mean + half)}"


def number(value: float) -> str:
    """About four significant digits, thousands separated."""
    text = f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:#.4g}"
    return text.replace("-", "−")


def labels_text(count: int) -> str:
    """So many labels, in words."""
    return f"{count} label{'' if count == 1 else 's'}"


def absent(sentence: str) -> str:
    """A note that says what is not there, as HTML."""
    return f'<p class="note">{escape(sentence)}</p>'


def method_name(config: dict[str, Any]) -> str:
    """A method's name as its paper writes it."""
    return title(str(config.get("method", "unknown method")))


def run_title(config: dict[str, Any]) -> str:
    """What a run is, in a few words."""
    data = config.get("data", {}).get("name", "unknown data")
    return f"{method_name(config)} on {data}"


def network(model: dict[str, Any]) -> str:
    """A run's encoder in a few words."""
    return f"{resnet_name(model)}, {model['stem']} stem" if model else "unknown network"


def listing(value: Any) -> str:
    """A value of JSON in a line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{key} {listing(item)}" for key, item in value.items()) or "not recorded"
    if isinstance(value, list):
        return ", ".join(listing(item) for item in value) or "none"
    return str(value)
