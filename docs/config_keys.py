"""The directive `config-keys`: a table of all config keys, from `ssl_jax.schema`."""

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from ssl_jax.config import schema_keys


def rows() -> list[tuple[str, str, str]]:
    """Name, default and meaning of every key; the keys of a view are `views.*.NAME`."""
    return [(name, repr(key.default), key.meaning) for name, key in schema_keys().items()]


class ConfigKeys(SphinxDirective):
    """The table."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx for each use of the directive."""
        text = ["| key | default | meaning |", "| --- | --- | --- |"]
        for name, default, meaning in rows():
            cells = (f"`config.{name}`", f"`{default}`", meaning.replace("|", "\\|"))
            text.append("| " + " | ".join(cells) + " |")
        return self.parse_text_to_nodes("\n".join(text))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    # The table depends on a module that Sphinx doesn't watch.
    app.connect("env-get-outdated", lambda *_: ["configs"])
    return {"parallel_read_safe": True}
