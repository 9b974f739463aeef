"""Transfer: one encoder on a list of other datasets, linear and fine-tuned, in one table.

As in SimCLR's appendix B.8 (arXiv:2002.05709; after Kornblith et al., 2019, arXiv:1805.08974):
settings are chosen on held-out training images, then the classifier is trained on all of them and
evaluated once on the test split, by the dataset's own metric.
"""

import contextlib
import dataclasses
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from ssl_jax.config import apply_overrides, default_config, run_schedule
from ssl_jax.data.labels import targets_of
from ssl_jax.data.sources import (
    Source,
    Subset,
    held_out_ids,
    make_sources,
    require_measurable,
    why_no_mean_ap,
)
from ssl_jax.downstream.classifier import (
    PLAIN_SGD,
    derived_config,
    is_overridden,
    overridden,
    train_classifier,
)
from ssl_jax.downstream.features import SEEN, linear_metrics, require_channels, run_features
from ssl_jax.downstream.keeping import result_name, results_of, source_of
from ssl_jax.errors import UserError, did_you_mean, require_choice
from ssl_jax.evals.linear import METRICS
from ssl_jax.evals.metrics import interval_text
from ssl_jax.evals.multi_label import MULTI_LABEL_METRICS
from ssl_jax.evals.results import (
    ELSEWHERE,
    read_result,
    require_writable_results,
    write_result,
)
from ssl_jax.files import local_path, own_folder, read_regular, reading, writing
from ssl_jax.interop.load import config_at, network_at, newest_step, weights_fingerprint
from ssl_jax.recipes import set_channels
from ssl_jax.run.nonfinite import NonFiniteError

RATES = (0.1, 0.01, 0.001)
DECAYS = (0.0, 1e-4)
# SimCLR's appendix B.8; learning rate and weight decay are chosen for each dataset.
_RECIPE: dict[str, Any] = {
    "batch_size": 256,
    "steps": 20_000,
    "optim": {**PLAIN_SGD, "nesterov": True, "per_epoch": False},
    # Of these runs only the classifier's accuracy is used.
    "eval": {"at_end": False, "knn_every_epochs": 0.0, "probe": False},
    "checkpoint": {"keep": 1},
}
_CHOSEN = ("optim.lr", "optim.weight_decay", "data.validation")
_HELD_OUT = 0.1  # share of the training images on which settings are chosen
_SAVE_STEPS = 1000  # between checkpoints


@dataclasses.dataclass(frozen=True)
class DataSet:
    """An entry of the list of datasets.

    Attributes:
      name: in the table and of its folder.
      metric: "top1" or "mean_per_class"; for images of several classes each, "mean_ap" or, as for
        VOC2007, "mean_ap_11_point".
      overrides: strings `data.KEY=VALUE`, for every key of `config.data`.
    """

    name: str
    metric: str
    overrides: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """An encoder's results on one dataset.

    Attributes:
      dataset: its name.
      metric: of the dataset.
      linear: `classification_metrics`, or `multi_label_metrics`, of a linear classifier on
        features.
      finetune: the same of the fine-tuned network; None without fine-tuning, like the next two.
      rate: chosen learning rate.
      decay: chosen weight decay.
    """

    dataset: str
    metric: str
    linear: dict[str, Any]
    finetune: dict[str, Any] | None = None
    rate: float | None = None
    decay: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The attributes that are not None."""
        return {key: value for key, value in vars(self).items() if value is not None}


def read_sets(path: str | Path) -> list[DataSet]:
    """Reads a list of datasets, JSON: {NAME: {"metric": "top1", "data": {KEY: VALUE}}}.

    Args:
      path: the file; keys are those of `config.data`, with their defaults.

    Raises:
      UserError: the file can't be read or is not such a list.
    """
    with reading(path):
        text = read_regular(local_path(path))
    try:
        listed = json.loads(text)
        if not isinstance(listed, dict) or not listed:
            raise ValueError('write {"NAME": {"metric": "top1", "data": {"name": "tfds"}}}')
    except (ValueError, RecursionError) as error:
        raise UserError(f"Cannot read the list of datasets {path} ({error}).") from error
    return [_data_set(str(path), name, entry) for name, entry in listed.items()]


def _data_set(path: str, name: str, entry: Any) -> DataSet:
    if not isinstance(entry, dict) or not isinstance(entry.get("data"), dict):
        raise UserError(f'{path}: {name} needs a group "data" with keys of config.data.')
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"{path}: '{name}' can't be the name of a folder. Rename the dataset.")
    for key in entry:
        if key not in ("data", "metric"):
            hint = did_you_mean(key, ("data", "metric"))
            raise UserError(f"{path}: {name} has no key '{key}'.{hint}")
    metric = entry.get("metric", "top1")
    require_choice(f"{path}: {name}'s metric", str(metric), (*METRICS, *MULTI_LABEL_METRICS))
    data = default_config().data.to_dict()
    del data["validation"]  # set by `transfer`
    for key, value in entry["data"].items():
        if key not in data:
            raise UserError(f"{path}: {name}: config.data.{key}.{did_you_mean(key, data)}")
        default = data[key]
        if isinstance(default, tuple) and isinstance(value, list):  # JSON has no tuples
            value = tuple(value)
        is_whole_float = isinstance(default, float) and type(value) is int
        if type(value) is not type(default) and not is_whole_float:
            raise UserError(
                f"{path}: {name}: config.data.{key} is {value!r}. Give a value like {default!r}."
            )
        data[key] = value
    if "channels" not in entry["data"]:
        del data["channels"]  # those of the encoder
    overrides = tuple(f"data.{key}={value}" for key, value in data.items())
    plain = default_config()
    set_channels(plain, data.get("channels", 3))
    try:
        apply_overrides(plain, overrides)
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}") from error
    return DataSet(name, metric, overrides)


def transfer_config(
    path: str | Path, overrides: Iterable[str] = (), step: int | None = None
) -> ConfigDict:
    """The config of fine-tuning a run's whole encoder with a classifier on another dataset.

    Args:
      path: the run's workdir.
      overrides: strings `a.b=VALUE`; `data.…` names the data, `optim.…` sets rate and decay.
      step: of the run's checkpoint; default the newest.

    Returns:
      The config, for `train_classifier`.

    Raises:
      UserError: no run at `path`, or a bad override.
    """
    overrides = list(overrides)
    config = derived_config(path, _RECIPE, step)
    config.data.update(default_config().data.to_dict() | {"channels": config.data.channels})
    if is_overridden(overrides, "epochs"):
        config.steps = 0
    return overridden(config, overrides)


def transfer(
    path: str | Path,
    sets: Iterable[DataSet],
    workdir: str | Path | None = None,
    *,
    results: str | Path | None = None,
    step: int | None = None,
    rates: Sequence[float] = RATES,
    decays: Sequence[float] = DECAYS,
    overrides: Iterable[str] = (),
    command: str = "",
    log: Callable[[str], None] = lambda text: None,
    verbosity: str = "warnings",
) -> list[Row]:
    """Evaluates a run's encoder on other datasets, linear and fine-tuned, or resumes.

    Args:
      path: the run's workdir.
      sets: from `read_sets`.
      workdir: of the fine-tuning runs; default `transfer` in `results`.
      results: folder that keeps the results, in its `evals/`; default the run's workdir.
      step: of the checkpoint; default the newest.
      rates: learning rates of fine-tuning at a batch of 256, each tried with each of `decays`;
        empty: no fine-tuning.
      decays: weight decays.
      overrides: strings `a.b=VALUE` that change the fine-tuning config for every dataset; `data`,
        `dtype` and the keys of `eval` that prepare images apply to the linear classifier, too.
      command: recorded with the results.
      log: receives a line per result.
      verbosity: how much the fine-tuning runs print, as for `pretrain`.

    Returns:
      A row per dataset; fewer if SIGTERM stopped a run.

    Raises:
      UserError: bad input; raised before training.
    """
    path, overrides = local_path(path), tuple(overrides)
    _check_settings(overrides, rates, decays)
    grid = [(rate, decay) for rate in rates for decay in decays]
    kept = results_of(path, results)
    require_writable_results(kept)
    folder = local_path(workdir) if workdir else own_folder(kept, "transfer")
    step = newest_step(path) if step is None else step
    more = (kept, weights_fingerprint(path, step)["checksum"], overrides, command, verbosity, log)
    jobs = [_Job(path, each, step, own_folder(folder, each.name), *more) for each in sets]
    for job in jobs:
        job.check(grid)
    rows: list[Row] = []
    for job in jobs:
        row = Row(job.data_set.name, job.data_set.metric, job.linear())
        if grid:
            tuned = job.finetuned(grid)
            if tuned is None:
                return rows
            row = dataclasses.replace(row, **tuned)
        rows.append(row)
    return rows


def _check_settings(
    overrides: Iterable[str], rates: Sequence[float], decays: Sequence[float]
) -> None:
    """Refuses keys that `transfer` sets, and without fine-tuning those that apply only to it."""
    if rates and not decays:
        raise UserError("There is no weight decay to fine-tune with. Give at least one.")
    for override in overrides:
        key = override.partition("=")[0]
        if key in _CHOSEN or key.startswith("init_from."):
            raise UserError(f"config.{key} is set by transfer. Use --rates, --decays or --step.")
        if not rates and not key.startswith(SEEN):
            raise UserError(
                f"config.{key} applies only to fine-tuning. Leave it out, or drop --no-finetune."
            )


def table(rows: Sequence[Row]) -> list[str]:
    """Formats rows as lines of a Markdown table, in percent with 95 % intervals."""
    head = ["dataset", "metric", "linear", "fine-tuned", "rate, weight decay"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        results = [interval_text(each[row.metric]) for each in (row.linear, row.finetune) if each]
        chosen = [] if row.finetune is None else [f"{row.rate:g}, {row.decay:g}"]
        cells = [row.dataset, row.metric.replace("_", " "), *results, *chosen]
        lines.append(cells + [""] * (len(head) - len(cells)))
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _require_held_out(train: Source) -> int:
    """The number of training images on which settings are chosen.

    Raises:
      UserError: there are none, or none of a class that the other images have.
    """
    count = train.num_examples
    held = held_out_ids(train.labels, count, _HELD_OUT)
    rest = np.setdiff1d(np.arange(count), held)
    if (
        not len(held)
        or targets_of(train)
        and why_no_mean_ap(Subset(train, rest), Subset(train, held))
    ):
        raise UserError(
            "The classes are too small to hold a tenth out. Fine-tune with one rate "
            "and one decay, so that there is nothing to choose."
        )
    return len(held)


@dataclasses.dataclass
class _Job:
    """Transfer of a run's encoder to one dataset."""

    path: Path
    data_set: DataSet
    step: int
    folder: Path
    results: Path
    weights: str  # their checksum
    overrides: tuple[str, ...]
    command: str
    verbosity: str
    log: Callable[[str], None]
    fingerprints: tuple[str, ...] = ()
    every_epochs: float = 0.0

    def config(self, rate: float, decay: float, validation: float = 0.0) -> ConfigDict:
        """The config of fine-tuning."""
        settings = dict(zip(_CHOSEN, (rate, decay, validation), strict=True))
        settings["checkpoint.every_epochs"] = self.every_epochs
        chosen = tuple(f"{key}={value}" for key, value in settings.items())
        return transfer_config(
            self.path, (*self.data_set.overrides, *chosen, *self.overrides), self.step
        )

    def check(self, grid: Sequence[tuple[float, float]]) -> None:
        """Opens the data, and refuses what could not be trained and evaluated."""
        try:
            for pair, chosen in itertools.product(grid, (False, True)):
                self.trial(*pair, chosen)  # refuses links
            require_channels(config_at(self.path), self.data_set.overrides)
            configs = [self.config(*pair, _HELD_OUT) for pair in grid] or [self.config(0.0, 0.0)]
            config = configs[0]
            config.data.validation = 0.0
            train, test = make_sources(config)
            self.fingerprints = (train.fingerprint, test.fingerprint if test else "")
            self._require_metric(bool(targets_of(train) or targets_of(test)))
            require_measurable(train, test)
            if not grid:
                return
            held_out = _require_held_out(train) if len(grid) > 1 else 0
            schedule = run_schedule(config, train.num_examples - held_out)
        except UserError as error:
            raise UserError(f"{self.data_set.name}: {error}") from error
        self.every_epochs = _SAVE_STEPS / schedule.steps_per_epoch

    def _require_metric(self, several: bool) -> None:
        """Checks that the metric applies to images of one class, or of several, each."""
        allowed = MULTI_LABEL_METRICS if several else METRICS
        if self.data_set.metric not in allowed:
            labels = "several labels" if several else "one label"
            raise UserError(
                f"The metric is {self.data_set.metric}, but the images have {labels} each. Set it "
                f"to {' or '.join(allowed)}."
            )

    def linear(self) -> dict[str, Any]:
        """Metrics of a linear classifier on features; kept, and reused for the same settings."""
        own = tuple(override for override in self.overrides if override.startswith(SEEN))
        changes = (*self.data_set.overrides, "data.validation=0.0", *own)
        # The encoder is a network of its run's method, whose classes are those of that run's data.
        changes = tuple(each for each in changes if not each.startswith("data.num_classes="))
        config = apply_overrides(config_at(self.path), changes)
        settings: dict[str, Any] = {"step": self.step, "weights": self.weights}
        settings["network"] = network_at(self.path, config.eval.network)
        settings["metric"] = self.data_set.metric
        settings |= {"overrides": list(changes), "data": list(self.fingerprints)}
        name = f"transfer_{self.data_set.name}_linear"
        known = read_result(self.results, self.kept_as(name))
        if known is not None and known.get("settings") == settings:
            metrics: dict[str, Any] = known["metrics"]
            self.log_result("linear", metrics)
            return metrics
        features = run_features(
            self.path, step=self.step, overrides=changes, labeled_only=True, multi_label=True
        )
        metrics, penalty = linear_metrics(features, metric=self.data_set.metric)
        self.log_result("linear", metrics)
        what = f"{self.data_set.name}: linear classifier on features, penalty {penalty:g}"
        self.keep(name, what + self.suffix(own), metrics, settings=settings)
        return metrics

    def log_result(self, what: str, metrics: dict[str, Any]) -> None:
        """Logs the dataset's own metric."""
        value = metrics[self.data_set.metric]["value"]
        self.log(f"{self.data_set.name}: {what} {100 * value:.2f} %")

    def keep(self, name: str, what: str, metrics: dict[str, Any], **more: Any) -> None:
        """Writes a result."""
        with writing(self.results, ELSEWHERE):
            more |= {"command": self.command, **source_of(self.path, self.results)}
            write_result(self.results, self.kept_as(name), what, metrics, **more)

    def kept_as(self, name: str) -> str:
        """The name of a result in its folder."""
        return result_name(name, source_of(self.path, self.results))

    def finetuned(self, grid: Sequence[tuple[float, float]]) -> dict[str, Any] | None:
        """Chooses a setting of the grid and fine-tunes with it on all training images.

        Returns:
          "finetune", "rate" and "decay" of a `Row`; None if a run was stopped.
        """
        name, metric = self.data_set.name, self.data_set.metric
        best = (-1.0, grid[0])
        for rate, decay in grid if len(grid) > 1 else []:
            try:
                metrics = self.trained(rate, decay)
            except NonFiniteError:
                self.log(f"{name}: rate {rate:g}, decay {decay:g}: diverged")
                continue
            if metrics is None:
                return None
            value = metrics[metric]["value"]
            self.log(f"{name}: rate {rate:g}, decay {decay:g}: {100 * value:.2f} % held out")
            best = max(best, (value, (rate, decay)), key=lambda pair: pair[0])
        if len(grid) > 1 and best[0] < 0:
            raise UserError(f"{name}: fine-tuning diverges at all rates. Lower --rates.")
        rate, decay = best[1]
        metrics = self.trained(rate, decay, chosen=True)
        if metrics is None:
            return None
        self.log_result("fine-tuned", metrics)
        what = f"{name}: fine-tuned, rate {rate:g}, weight decay {decay:g}"
        what += self.suffix(self.overrides, "from step")
        more = {"step": self.step, "rate": rate, "decay": decay}
        self.keep(f"transfer_{name}_finetune", what, metrics, **more)
        return {"finetune": metrics, "rate": rate, "decay": decay}

    def suffix(self, overrides: Sequence[str], at: str = "step") -> str:
        """Step and overrides, for the description of a result."""
        steps = [f"{at} {self.step}"] if self.step else []  # a file of weights has none
        return "".join(f", {each}" for each in (*steps, *overrides))

    def trial(self, rate: float, decay: float, chosen: bool) -> Path:
        """The folder of a fine-tuning run."""
        name = f"rate_{rate:g}_decay_{decay:g}"
        return own_folder(self.folder, f"chosen_{name}" if chosen else name)

    def trained(self, rate: float, decay: float, chosen: bool = False) -> dict[str, Any] | None:
        """Metrics of a fine-tuning run; None if it was stopped.

        Args:
          rate: learning rate.
          decay: weight decay.
          chosen: train on all images, not only those with which the setting is chosen.
        """
        config = self.config(rate, decay, 0.0 if chosen else _HELD_OUT)
        workdir = self.trial(rate, decay, chosen)
        # Standard output is for the table.
        with contextlib.redirect_stdout(sys.stderr):
            return train_classifier(config, workdir, self.command, self.verbosity)[1]
