"""The page around a report's sections: one HTML file with everything inside."""

import base64
import hashlib
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from ssl_jax.files import RERUN, replacing, writing


def write_page(
    path: Path, *, title: str, kind: str, lead: str, sections: dict[str, tuple[str, str]]
) -> None:
    """Writes a page, as a whole: a reader sees the old one or the new one.

    Args:
      path: of the file.
      title: what is reported on, plain text.
      kind: of page, plain text.
      lead: the result in a sentence, HTML.
      sections: by id, the heading and the HTML of each.

    Raises:
      UserError: it can't be written.
    """
    files = resources.files("ssl_jax.report")
    script = files.joinpath("page.js").read_text(encoding="utf-8")
    digest = hashlib.sha256(script.encode()).digest()
    body = "".join(
        f'<section aria-labelledby="{name}">\n<h2 id="{name}">{escape(heading)}</h2>\n'
        f'<div class="body">{html}</div>\n</section>\n'
        for name, (heading, html) in sections.items()
    )
    page = Template(files.joinpath("page.html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        kind=escape(kind),
        lead=lead,
        sections=body,
        script=script,
        digest=base64.b64encode(digest).decode("ascii"),
    )
    with writing(path, RERUN), replacing(path) as file:
        # A lone surrogate, which JSON can carry, has no UTF-8 form.
        file.write_text(page, encoding="utf-8", errors="replace")
