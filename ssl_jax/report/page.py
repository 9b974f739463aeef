"""Renders a report's template into one self-contained HTML file."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

from ssl_jax.files import RERUN, replacing, writing
from ssl_jax.report.charts import BOTTOM, HEIGHT, TOP, WIDTH
from ssl_jax.report.words import number, percent, points

_COPY = f"{RERUN}, or report a copy of the run's folder"
_TEMPLATES = jinja2.Environment(
    loader=jinja2.PackageLoader("ssl_jax", "report/templates"),
    autoescape=True,  # names of classes, files and config keys are arbitrary text
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {
    "comma": "{:,}".format,
    "number": number,
    "percent": percent,
    "points": points,
    "px": "{:.1f}".format,
}
_TEMPLATES.globals |= {"WIDTH": WIDTH, "HEIGHT": HEIGHT, "TOP": TOP, "BOTTOM": BOTTOM}
_TEMPLATES.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


def write_page(path: Path, template: str, fix: str = _COPY, /, **values: Any) -> None:
    """Writes a page atomically.

    Args:
      path: of the file.
      template: its name in the folder `templates`.
      fix: ends the message if the file cannot be written.
      **values: of the template's variables; text is escaped.

    Raises:
      UserError: the file cannot be written.
    """
    script = _TEMPLATES.get_template("page.js").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = _TEMPLATES.get_template(template).render(script=script, digest=digest, **values)
    # JSON may contain a lone surrogate, which has no UTF-8 encoding.
    with writing(path, fix), replacing(path) as file:
        file.write_text(page, encoding="utf-8", errors="replace")
