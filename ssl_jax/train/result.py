"""The result of `pretrain`."""

import dataclasses
from functools import cached_property
from pathlib import Path

from ssl_jax.interop.load import Encoder, load
from ssl_jax.run.log import read_metrics
from ssl_jax.step import TrainState


@dataclasses.dataclass(frozen=True)
class PretrainResult:
    """A run when `pretrain` returns: finished, or stopped by SIGTERM.

    Attributes:
      workdir: the run's folder.
      step: steps done.
      finished: whether the run is trained and evaluated; otherwise, the same call resumes it.
      state: the train state, on the devices; a checkpoint has it, too.
    """

    workdir: Path
    step: int
    finished: bool
    state: TrainState = dataclasses.field(repr=False)

    @cached_property
    def encoder(self) -> Encoder:
        """The encoder, loaded from the run's checkpoint on first use."""
        return load(self.workdir, self.step)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The last logged value of each metric, by name, such as "loss" and "knn"."""
        last: dict[str, float] = {}
        for record in read_metrics(self.workdir / "metrics.jsonl"):
            if record.pop("step") <= self.step:
                last |= record
        return last
