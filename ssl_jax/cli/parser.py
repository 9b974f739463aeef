"""The parser of the command line: what it refuses is one sentence with the word that was meant.

Nothing here imports JAX, so what is misspelt is told at once.
"""

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from ssl_jax.config import close_path, default_config, did_you_mean, flatten
from ssl_jax.errors import UserError

_KEY = "--config.KEY"  # how the help names the keys of the config
_NEEDED = "the following arguments are required: "
# Of those in a folder, one says that an encoder may be in it.
_OF_ENCODERS = ("config.json", "ssl_jax.safetensors", "variables", "saved_model")


class Parser(argparse.ArgumentParser):
    """Raises `UserError` where argparse shows its usage and exits; has --quiet and --debug.

    The help of an option ends with its default, or says that it is required.

    Attributes:
      options: all that it takes, as they are typed.
      commands: its commands' parsers by name; {} where it has none.
    """

    def __init__(self, **settings: Any) -> None:
        self.options: list[str] = []
        self.commands: dict[str, Parser] = {}
        settings = {"formatter_class": argparse.RawDescriptionHelpFormatter} | settings
        # An abbreviation would mean another option when one is added.
        super().__init__(allow_abbrev=False, **settings)
        # Without a default, so that a command's parser leaves alone what was given before it.
        for name, what in (
            ("--quiet", "print warnings, errors and results alone (default: off)"),
            ("--debug", "print the whole trace of an error (default: off)"),
        ):
            self.add_argument(name, action="store_true", default=argparse.SUPPRESS, help=what)

    def add_argument(self, *names: Any, **settings: Any) -> argparse.Action:
        """As argparse's; the help is told the default."""
        action = super().add_argument(*names, **settings)
        self.options += action.option_strings
        if action.option_strings and action.help and "default" not in action.help:
            action.help += _default(action)
        return action

    def add_subparsers(self, **settings: Any) -> Any:
        """As argparse's; the commands can be looked up."""
        commands = super().add_subparsers(**settings)
        self.commands = commands.choices
        return commands

    def add_command(self, commands: Any, name: str, does: str, example: str) -> "Parser":
        """Adds a command.

        Args:
          commands: what `add_subparsers` gave.
          name: of the command.
          does: what it does, a sentence without its capital and full stop.
          example: what is typed after its name; may go over several lines.
        """
        command: Parser = commands.add_parser(
            name,
            help=does,
            description=f"{does[0].upper()}{does[1:]}.",
            epilog=f"example:\n  {self.prog} {name} {example}".rstrip(),
        )
        return command

    def error(self, message: str) -> NoReturn:
        """Raises it as a sentence."""
        needed = message.removeprefix(_NEEDED)
        told = f" needs {needed}" if needed != message else f": {message}"
        raise UserError(f"{self.prog}{told}; `{self.prog} --help` shows an example.")


def _default(action: argparse.Action) -> str:
    if action.required:
        return " (required)"
    if action.default in (None, argparse.SUPPRESS):
        return ""
    return " (default: off)" if action.nargs == 0 else f" (default: {action.default})"


def add_from(parser: Parser) -> None:
    """Adds `--from`, the run or the file whose encoder a command takes."""
    # `from` is a word of Python's own.
    parser.add_argument(
        "--from",
        dest="run",
        required=True,
        type=Path,
        metavar="RUN",
        help="the run's workdir, or a file of weights",
    )
    parser.add_argument(
        "--import",
        dest="imported",
        type=Path,
        metavar="FILE.py",
        help="a file of Python to run first, which registers the run's method, one of your own "
        "(default: none)",
    )


def add_keys(parser: Parser, what: str) -> None:
    """Adds the keys of the config to a command's help; they are read before argparse sees them."""
    parser.add_argument(_KEY, dest="_overrides", metavar="VALUE", help=what)


def require_known(parser: Parser, argv: Sequence[str]) -> None:
    """Refuses a command or an option that there isn't, where argparse may first miss another one.

    Args:
      parser: of the whole command line.
      argv: without `--config.KEY=VALUE`.

    Raises:
      UserError: with the word that was meant, where one is close.
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
            raise UserError(f"{parser.prog} has no option {name}{_meant(parser, name)}")


def _meant(parser: Parser, name: str) -> str:
    """How the sentence about an unknown option ends."""
    key = name.lstrip("-")
    head, _, rest = name.partition(".")
    if _KEY in parser.options and key in flatten(default_config().to_dict()):
        return f": a key of the config is set by --config.{key}=VALUE."
    if _KEY in parser.options and rest and difflib.get_close_matches(head, ["--config"]):
        return f": did you mean --config.{rest}?"
    known = [option for option in parser.options if option != _KEY]
    if close := difflib.get_close_matches(name, known, n=1):
        return f": did you mean {close[0]}?"
    return f"; `{parser.prog} --help` lists those it has."


def require_encoder(path: Path) -> None:
    """Refuses a path where there can be no encoder, before the seconds that JAX's import takes.

    Args:
      path: of `--from`.

    Raises:
      UserError: nothing is there, or a folder without any of an encoder's files.
    """
    path = path.expanduser()
    if Path(f"{path}.index").is_file():
        return  # a checkpoint of TensorFlow's, which is named by the beginning of its files
    if not path.exists():
        raise UserError(f"There is no run, nor a file of weights, {path}.{close_path(path)}")
    if path.is_dir() and not any((path / name).exists() for name in _OF_ENCODERS):
        raise UserError(f"There is no run in {path}: it has no config.json.")


def require_run(workdir: Path) -> None:
    """Refuses a folder that holds no run.

    Raises:
      UserError: naming it.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(
            f"There is no run in {workdir}: it has no config.json.{close_path(workdir)}"
        )


def require_folder_of(out: Path) -> None:
    """Refuses to write where there is no folder.

    Raises:
      UserError: naming it.
    """
    if not out.parent.is_dir():
        raise UserError(f"{out.parent} (--out) is no folder: make it first.")
