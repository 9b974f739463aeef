"""The table of all config keys, read off the schema's source when the site is built.

In Markdown, a block of the directive `config-keys`. A key's meaning is the comment beside it in
ssl_jax/config.py, or above it; tests/test_docs.py holds that every key has one.
"""

import ast
import io
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from ssl_jax import config as schema

# Which dictionaries of the source hold which group's keys.
_GROUPS = {"_DATA": "data", "_MODEL": "model", "_OPTIM": "optim", "_EVAL": "eval"} | {
    f"_{name.upper()}": name
    for name in ("simclr", "moco", "swav", "byol", "simsiam", "supervised", "distill", "init_from")
}
_FUNCTIONS = {"view": "views.*.", "default_config": ""}


def keys() -> dict[str, Any]:
    """Every key with its default; those of a view are without `views.NAME`."""
    plain = schema.default_config().to_dict()
    view = plain.pop("views")["view1"]
    return {**schema.flatten(plain), **{f"views.*.{k}": v for k, v in schema.flatten(view).items()}}


def comments() -> dict[str, str]:
    """The comment beside each key in the schema's source, or in the lines above it."""
    source = Path(schema.__file__).read_text()
    told: dict[int, str] = {}
    alone: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            told[token.start[0]] = token.string.lstrip("# ")
            if not token.line[: token.start[1]].strip():
                alone.add(token.start[0])
    found = {}
    for key, line in _lines(ast.parse(source)):
        above = line - 1
        while above in alone:
            above -= 1
        words = [told[n] for n in range(above + 1, line) if n in alone]
        words += [told[line]] if line in told else []
        if words:
            found[key] = " ".join(words)
    return found


def _lines(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Keys and the lines they stand in, of the dictionaries and of the functions named above."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            group = _GROUPS.get(node.targets[0].id)
            if group:
                yield from _entries(node.value, f"{group}.")
        if isinstance(node, ast.FunctionDef) and node.name in _FUNCTIONS:
            for call in ast.walk(node):
                if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "ConfigDict":
                    yield from _entries(call.args[0], _FUNCTIONS[node.name])


def _entries(value: ast.AST, prefix: str) -> Iterator[tuple[str, int]]:
    assert isinstance(value, ast.Dict)
    for key, inner in zip(value.keys, value.values, strict=True):
        if not isinstance(key, ast.Constant):
            continue  # groups that users have registered
        yield f"{prefix}{key.value}", key.lineno
        if isinstance(inner, ast.Dict):
            yield from _entries(inner, f"{prefix}{key.value}.")


def rows() -> list[tuple[str, str, str]]:
    """Key, default and meaning of every key; "" for a meaning that nobody has written."""
    written = comments()
    return [(key, repr(value), written.get(key, "")) for key, value in keys().items()]


class ConfigKeys(SphinxDirective):
    """The table."""

    def run(self) -> list[nodes.Node]:
        """Called by Sphinx where the directive stands."""
        text = ["| key | default | meaning |", "| --- | --- | --- |"]
        for key, default, meaning in rows():
            cells = (f"`config.{key}`", f"`{default}`", meaning.replace("|", "\\|"))
            text.append("| " + " | ".join(cells) + " |")
        return self.parse_text_to_nodes("\n".join(text))


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("config-keys", ConfigKeys)
    # The table follows from a file that Sphinx doesn't watch.
    app.connect("env-get-outdated", lambda *_: ["configs"])
    return {"parallel_read_safe": True}
