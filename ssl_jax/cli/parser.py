"""The argument parser: errors are one line with a suggestion, defaults are part of the help.

Nothing here imports JAX, so a misspelled argument is reported at once.
"""

import argparse
import difflib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ssl_jax.config import close_path, default_config, flatten, keys_named
from ssl_jax.errors import UserError, did_you_mean
from ssl_jax.files import ANOTHER, local_path, reading, require_writable, writing

_KEY = "--config.KEY"  # stands for all config keys in the help
_MISSING = "the following arguments are required: "
# Files of which a folder with an encoder has at least one.
_ENCODER_FILES = ("config.json", "ssl_jax.safetensors", "variables", "saved_model")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse prints its usage and exits; has --quiet and --debug.

    The help of every option ends with its default, or with "(required)".

    Attributes:
      options: All option strings.
      commands: Parsers of the subcommands by name; {} if there are none.
    """

    def __init__(self, **settings: Any) -> None:
        self.options: list[str] = []
        self.commands: dict[str, Parser] = {}
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter} | settings
        # An abbreviation would change its meaning when an option is added.
        super().__init__(allow_abbrev=False, **settings)
        # No default, so that a subcommand's parser doesn't reset a flag given before the command.
        for name, what in (
            ("--quiet", "print only warnings, errors and results (default: off)"),
            ("--debug", "print the traceback of an error (default: off)"),
        ):
            self.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=what)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """Adds an argument as argparse does, with the default appended to its help."""
        action = super().add_argument(*names, **settings)
        self.options += action.option_strings
        if action.option_strings and action.help and "default" not in action.help:
            action.help += _default(action)
        return action

    def add_subparsers(self, **settings: Any) -> Any:
        """Adds subparsers as argparse does; `commands` looks them up."""
        commands = super().add_subparsers(**settings)
        self.commands = commands.choices
        return commands

    def add_command(
        self,
        commands: Any,
        name: str,
        summary: str,
        example: str,
        module: str = "",
        prepare: Callable[[argparse.Namespace], None] = lambda args: None,
    ) -> "Parser":
        """Adds a subcommand.

        Args:
          commands: The result of `add_subparsers`.
          name: The command's name.
          summary: What the command does, without capital and period.
          example: Arguments that follow the name.
          module: The module in `ssl_jax.cli` whose `run(args)` executes the command; "" for a group
            of commands.
          prepare: Checks the arguments and sets up the environment before JAX is imported.

        Returns:
          The command's parser.
        """
        command: Parser = commands.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n  {self.prog} {name} {example}".rstrip(),
        )
        command.set_defaults(module=module, prepare=prepare)
        return command

    @property
    def takes_config(self) -> bool:
        """Whether config keys can be set."""
        return _KEY in self.options

    def error(self, message: str) -> NoReturn:
        """Raises `UserError` with argparse's message."""
        missing = message.removeprefix(_MISSING)
        cause = f" requires {missing}" if missing != message else f": {message.rstrip('.')}"
        end = "" if cause.endswith("?") else "."
        raise UserError(f"{self.prog}{cause}{end} See `{self.prog} --help`.")


def _default(action: argparse.Action) -> str:
    if action.required:
        return " (required)"
    if action.default in (None, argparse.SUPPRESS):
        return ""
    return " (default: off)" if action.nargs == 0 else f" (default: {action.default})"


def add_from(parser: Parser) -> None:
    """Adds `--from`, the run or weights file with the encoder, and `--import`."""
    parser.add_argument(
        "--from",
        dest="run",  # `from` is a keyword
        required=True,
        type=path_argument,
        metavar="RUN",
        help="the run's workdir, or a weights file",
    )
    add_import(parser)


def add_import(parser: Parser) -> None:
    """Adds `--import`."""
    parser.add_argument(
        "--import",
        dest="imported",
        type=path_argument,
        metavar="FILE.py",
        help="a Python file to run first, which registers the run's own method, encoder or source "
        "of images (default: none)",
    )


def add_json(parser: Parser) -> None:
    """Adds `--json`."""
    parser.add_argument("--json", action="store_true", help="print only JSON")


def add_keys(parser: Parser, what: str) -> None:
    """Adds the config keys to a command's help; `main` takes them out before argparse runs."""
    parser.add_argument(_KEY, dest="_overrides", metavar="VALUE", help=what)


def require_known(parser: Parser, argv: Sequence[str]) -> None:
    """Rejects unknown commands and options, before argparse reports what is missing.

    Args:
      parser: The parser of the whole command line.
      argv: Arguments without `--config.KEY=VALUE`.

    Raises:
      UserError: With the closest known name, if one is close.
    """
    for word in argv:
        name = word.partition("=")[0]
        if word == "--":
            return
        if not word.startswith("-"):
            if parser.commands and word not in parser.commands:
                raise UserError(
                    f"{parser.prog} has no command '{word}'.{did_you_mean(word, parser.commands)}"
                )
            parser = parser.commands.get(word, parser)
        elif name not in parser.options and not re.match(r"-\.?\d|-$", word):
            raise UserError(f"{parser.prog} has no option {name}. {_suggestion(parser, name)}")


def _suggestion(parser: Parser, name: str) -> str:
    """What to type instead of an unknown option."""
    key = name.lstrip("-").replace("-", "_")
    head, _, rest = name.partition(".")
    if parser.takes_config and key in flatten(default_config().to_dict()):
        return f"Set the config key with --config.{key}=VALUE."
    keys = keys_named(key)
    if "--from" in parser.options:  # which sets this group
        keys = [k for k in keys if not k.startswith("init_from.")]
    if parser.takes_config and keys:
        return f"Set the config key with {' or '.join(f'--config.{k}=VALUE' for k in keys[:4])}."
    if parser.takes_config and rest and difflib.get_close_matches(head, ["--config"]):
        return f"Did you mean --config.{rest}?"
    known = [option for option in parser.options if option != _KEY]
    if close := difflib.get_close_matches(name, known, n=1):
        return f"Did you mean {close[0]}?"
    return f"See `{parser.prog} --help`."


def path_argument(text: str) -> Path:
    """The `type` of arguments that are local paths."""
    if not text:  # for Python, the current folder
        raise argparse.ArgumentTypeError("the path is empty. Give a path, or . for this folder")
    try:
        return local_path(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def require_encoder(path: Path) -> None:
    """Rejects a path without an encoder, before JAX's import takes seconds.

    Args:
      path: The value of `--from`.

    Raises:
      UserError: The path doesn't exist, or is a folder without any of an encoder's files.
    """
    with reading(path):
        if Path(f"{path}.index").is_file():
            return  # a TensorFlow checkpoint, given by its prefix
        if not path.exists():
            raise UserError(f"There is no run or weights file at {path}.{close_path(path)}")
        if path.is_dir() and not any((path / name).exists() for name in _ENCODER_FILES):
            raise UserError(f"There is no run in {path}: config.json is missing.")


def require_run(workdir: Path) -> None:
    """Rejects a folder without a run.

    Raises:
      UserError: The folder has no config.json.
    """
    with reading(workdir):
        if not (workdir / "config.json").is_file():
            raise UserError(
                f"There is no run in {workdir}: config.json is missing.{close_path(workdir)}"
            )


def require_folder_of(out: Path) -> None:
    """Rejects an output path in a folder that doesn't exist or can't be written.

    Raises:
      UserError: Names the folder.
    """
    if not out.parent.is_dir():
        raise UserError(f"There is no folder {out.parent} (--out). Create it first.")
    with writing(out, ANOTHER):
        require_writable(out.parent)
