"""`ssl-jax config`."""

import argparse
import json
import re

from ssl_jax.config import flatten, schema_keys, to_json
from ssl_jax.errors import UserError, did_you_mean


def run(args: argparse.Namespace) -> None:
    """Prints config keys in the form in which they are set on the command line."""
    config = args.experiment
    if args.json and args.key:
        raise UserError(f"--json prints the whole config. Leave out '{args.key}'.")
    if args.json:
        print(json.dumps(to_json(config), indent=1))
        return
    keys, values = schema_keys(), flatten(config.to_dict())
    wanted = args.key.removeprefix("config.")
    shown = [name for name in values if not wanted or f"{name}.".startswith(f"{wanted}.")]
    if not shown:
        raise UserError(f"config has no key '{wanted}'.{did_you_mean(wanted, values)}")
    for name in shown:
        key = keys[re.sub(r"^views\.[^.]+", "views.*", name)]
        if wanted:
            print(f"# {key.meaning}")
        note = "" if values[name] == key.default else f"  # default: {key.default}"
        print(f"--config.{name}={values[name]}{note}")
