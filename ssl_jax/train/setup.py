"""What a run is built from: devices, data, schedule and train step."""

from ml_collections import ConfigDict

from ssl_jax.config import from_json, run_schedule, to_json
from ssl_jax.data.index import Index
from ssl_jax.data.sources import Source, make_sources
from ssl_jax.errors import UserError
from ssl_jax.interop.initial_weights import resolve_initial_weights
from ssl_jax.run.wandb import require_wandb
from ssl_jax.spmd import make_spmd
from ssl_jax.step import Program


class Setup:
    """A config on these devices and this data; nothing is written yet.

    Attributes:
      rows: indices of the global batch that belong to this process's devices.
      watched: options of `CollapseDetector`.
      derived: recorded in the run's folder, as it depends on devices and method.
    """

    def __init__(self, config: ConfigDict) -> None:
        """Builds everything; compiles nothing.

        Raises:
          UserError: the config can't run on these devices or this data.
        """
        require_wandb(config.wandb)
        self.spmd = make_spmd(
            config.spmd, batch_size=config.batch_size, microbatch=config.microbatch
        )
        self.train, self.test = make_sources(config)
        self.config = config = resolve(config, self.train)
        self.schedule = run_schedule(config, self.train.num_examples)
        self.index = Index(self.train.num_examples, config.batch_size, config.seed)
        self.rows = self.spmd.local_indices(config.batch_size)
        self.program = Program(config, self.schedule, self.spmd)
        self.method = self.program.method
        if self.method.needs_labels and self.train.num_classes == 0:
            raise UserError(
                f"config.method is '{config.method}', but the training images have no labels. Use "
                "a folder with one subfolder per class."
            )
        optim = config.optim
        # A loss may start at its value for constant outputs and leave it as the rate warms up.
        patience = max(self.schedule.every(max(1.0, optim.warmup_epochs)), optim.frozen_steps)
        self.watched = {"trivial_loss": self.method.trivial_loss, "patience": patience}
        self.derived = {"batchnorm_images": self.program.batchnorm_images, **self.watched}


def resolve(config: ConfigDict, train: Source) -> ConfigDict:
    """A copy of the config, completed from the data and from the runs that give initial weights.

    Raises:
      UserError: labels beyond `config.data.num_classes`, or no such weights.
    """
    config = from_json(to_json(config))
    if config.data.num_classes == 0:
        config.data.num_classes = train.num_classes
    elif train.num_classes > config.data.num_classes:
        raise UserError(
            f"config.data.num_classes is {config.data.num_classes}, but the training images have "
            f"labels up to {train.num_classes - 1}. Set it to {train.num_classes}, or to 0."
        )
    resolve_initial_weights(config)
    return config
