"""What tests of runs with a classifier share: brief settings, first states, commands."""

from encoders import blank_state

from ssl_jax.cli import main as cli
from ssl_jax.config import Schedule
from ssl_jax.interop.initial_weights import load_initial_weights, resolve_initial_weights
from ssl_jax.step import assemble, init_state

BRIEF = ("epochs=1.0", "batch_size=64", "log_every=100", "eval.trials=2")
WHOLE = "views.view.crop.sampler=none"  # whole images, which compile faster than crops


def command(capsys, *arguments):
    """Runs a command of ssl-jax in this process; returns its output."""
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def first_state(config, initial=blank_state):
    """The state with the weights of `config.init_from` loaded."""
    config.data.num_classes = 10
    resolve_initial_weights(config)
    return load_initial_weights(initial(config), config)


def random_state(config):
    """A newly initialized state."""
    method, optimizer, _ = assemble(config, Schedule(1, 10))
    return init_state(method, optimizer, config)
