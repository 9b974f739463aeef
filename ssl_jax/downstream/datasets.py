"""Transfer: one encoder on a list of other data sets, linear and fine-tuned, in one table.

As in SimCLR's appendix B.8 (arXiv:2002.05709; after Kornblith et al., 2019, arXiv:1805.08974):
settings are chosen on held-out training images, then the classifier is trained on all of them and
measured once on the test split, by the data set's own metric.
"""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssl_jax.config import apply_overrides, default_config, did_you_mean, run_schedule
from ssl_jax.data.sources import held_out_ids, make_sources
from ssl_jax.downstream.frozen import SEEN, linear_metrics, run_features
from ssl_jax.downstream.runs import train_classifier, transfer_config
from ssl_jax.errors import UserError
from ssl_jax.evals.linear import METRICS
from ssl_jax.evals.metrics import interval_text
from ssl_jax.evals.results import read_result, write_result
from ssl_jax.interop.load import newest_step, results_folder
from ssl_jax.run.nonfinite import NonFiniteError

RATES = (0.1, 0.01, 0.001)
DECAYS = (0.0, 1e-4)
_CHOSEN = ("optim.lr", "optim.weight_decay", "data.validation")
_HELD = 0.1  # of the training images, to choose on
_SAVE_STEPS = 1000  # between checkpoints


@dataclasses.dataclass(frozen=True)
class DataSet:
    """One of the list.

    Attributes:
      name: in the table, and of its folder.
      metric: "top1" or "mean_per_class".
      overrides: strings `data.KEY=VALUE`, for every key of `config.data`.
    """

    name: str
    metric: str
    overrides: tuple[str, ...]


def read_sets(path: str | Path) -> list[DataSet]:
    """Reads a list of data sets, JSON: {NAME: {"metric": "top1", "data": {KEY: VALUE}}}.

    Args:
      path: of the file; keys are those of `config.data`, and what isn't named has its default.

    Raises:
      UserError: it can't be read, or names what there isn't.
    """
    try:
        listed = json.loads(Path(path).read_text())
        if not isinstance(listed, dict) or not listed:
            raise ValueError('write {"NAME": {"metric": "top1", "data": {"name": "tfds"}}}')
    except (OSError, ValueError) as error:
        raise UserError(f"The list of data sets {path} can't be read: {error}.") from error
    return [_data_set(str(path), name, entry) for name, entry in listed.items()]


def _data_set(path: str, name: str, entry: Any) -> DataSet:
    if not isinstance(entry, dict) or not isinstance(entry.get("data"), dict):
        raise UserError(f'{path}: {name} needs a group "data" of config.data\'s keys.')
    if not name or Path(name).name != name or name.startswith("."):
        raise UserError(f"{path}: '{name}' can't name a folder: choose a plain word.")
    for key in entry:
        if key not in ("data", "metric"):
            raise UserError(f"{path}: {name} has no key '{key}': it may have data and metric.")
    metric = entry.get("metric", "top1")
    if metric not in METRICS:
        hint = did_you_mean(str(metric), METRICS)
        raise UserError(f"{path}: {name}'s metric is '{metric}'.{hint}")
    data = default_config().data.to_dict()
    del data["validation"]  # transfer's own
    for key, value in entry["data"].items():
        if key not in data:
            raise UserError(f"{path}: {name}: config.data.{key}.{did_you_mean(key, data)}")
        default = data[key]
        whole = isinstance(default, float) and type(value) is int
        if type(value) is not type(default) and not whole:
            raise UserError(
                f"{path}: {name}: config.data.{key} is {value!r}: it takes such as {default!r}."
            )
        data[key] = value
    overrides = tuple(f"data.{key}={value}" for key, value in data.items())
    try:
        apply_overrides(default_config(), overrides)
    except UserError as error:
        raise UserError(f"{path}: {name}: {error}") from error
    return DataSet(name, metric, overrides)


def transfer(
    path: str | Path,
    sets: Iterable[DataSet],
    workdir: str | Path | None = None,
    *,
    step: int | None = None,
    rates: Sequence[float] = RATES,
    decays: Sequence[float] = DECAYS,
    overrides: Iterable[str] = (),
    command: str = "",
    log: Callable[[str], None] = lambda text: None,
    verbosity: str = "warnings",
) -> list[dict[str, Any]]:
    """Measures a run's encoder on other data sets, linear and fine-tuned, or goes on.

    Args:
      path: the run's workdir, whose `evals/` get the results too.
      sets: of `read_sets`.
      workdir: of the fine-tuning's runs, default `transfer` in the run's.
      step: of the checkpoint, default the newest.
      rates: learning rates of fine-tuning at a batch of 256, each with each of `decays`; none: no
        fine-tuning.
      decays: weight decays.
      overrides: strings `a.b=VALUE` that change every data set's config of fine-tuning; those of
        `data`, `dtype` and what `eval` says of images change what the linear classifier sees, too.
      command: recorded with the results.
      log: is told what is done.
      verbosity: how much the runs of fine-tuning print, as `pretrain` takes it.

    Returns:
      For each data set {"dataset", "metric", "linear", "finetune", "rate", "decay"}: metrics are
      those of `classification_metrics`; without fine-tuning the last three are absent. They end
      early where SIGTERM has stopped a run.

    Raises:
      UserError: bad input, in one sentence, before anything is trained.
    """
    path, overrides = Path(path), tuple(overrides)
    _require_free(overrides, bool(rates))
    if rates and not decays:
        raise UserError("There is no weight decay to fine-tune with: give at least one.")
    grid = [(rate, decay) for rate in rates for decay in decays]
    folder = Path(workdir) if workdir else results_folder(path) / "transfer"
    step = newest_step(path) if step is None else step
    jobs = [
        _Job(path, each, step, folder / each.name, overrides, command, verbosity) for each in sets
    ]
    for job in jobs:
        job.check(grid)
    rows: list[dict[str, Any]] = []
    for job in jobs:
        name, metric = job.data_set.name, job.data_set.metric
        row: dict[str, Any] = {"dataset": name, "metric": metric, "linear": job.linear()}
        log(f"{name}: linear {100 * row['linear'][metric]['value']:.2f} %")
        if grid:
            tuned = job.finetuned(grid, log)
            if tuned is None:
                return rows
            row |= tuned
        rows.append(row)
    return rows


def _require_free(overrides: Iterable[str], finetunes: bool) -> None:
    """Refuses to change what is chosen here, and what only fine-tuning takes without it."""
    for override in overrides:
        key = override.partition("=")[0]
        if key in _CHOSEN or key.startswith("init_from."):
            raise UserError(f"config.{key} is what transfer sets: give --rates, --decays, --step.")
        if not finetunes and not key.startswith(SEEN):
            raise UserError(f"config.{key} is for fine-tuning: leave it or --no-finetune out.")


def table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows of `transfer` as lines of a Markdown table, in percent with 95 % intervals."""
    head = ["data set", "metric", "linear", "fine-tuned", "rate, weight decay"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        cells = [row["dataset"], row["metric"].replace("_", " ")]
        for kind in ("linear", "finetune"):
            cells.append(interval_text(row[kind][row["metric"]]) if kind in row else "")
        cells.append(f"{row['rate']:g}, {row['decay']:g}" if "rate" in row else "")
        lines.append(cells)
    return ["| " + " | ".join(cells) + " |" for cells in lines]


class _Job:
    """The encoder of a run on one data set."""

    def __init__(
        self,
        path: Path,
        data_set: DataSet,
        step: int,
        folder: Path,
        overrides: tuple[str, ...],
        command: str,
        verbosity: str,
    ) -> None:
        self.path, self.data_set, self.step = path, data_set, step
        self.folder, self.overrides, self.command = folder, overrides, command
        self.verbosity = verbosity
        self.fingerprints: list[str] = []
        self.every_epochs = 0.0

    def config(self, rate: float, decay: float, validation: float = 0.0) -> ConfigDict:
        """Of fine-tuning."""
        settings = dict(zip(_CHOSEN, (rate, decay, validation), strict=True))
        settings["checkpoint.every_epochs"] = self.every_epochs
        chosen = tuple(f"{key}={value}" for key, value in settings.items())
        return transfer_config(
            self.path, (*self.data_set.overrides, *chosen, *self.overrides), self.step
        )

    def check(self, grid: Sequence[tuple[float, float]]) -> None:
        """Refuses what couldn't be run to its end; opens the data."""
        name = self.data_set.name
        try:
            configs = [self.config(*pair, _HELD) for pair in grid] or [self.config(0.0, 0.0)]
            config = configs[0]
            config.data.validation = 0.0
            train, test = make_sources(config)
            self.fingerprints = [train.fingerprint, test.fingerprint if test else ""]
            if test is None or not train.num_classes or not test.num_classes:
                raise UserError("It has no test split with labels: set test_split or test_dir.")
            if not grid:
                return
            held = 0
            if len(grid) > 1:
                held = len(held_out_ids(train.labels, train.num_examples, _HELD))
                if not held:
                    raise UserError(
                        "Its classes are too small for a tenth to be held out: fine-tune with one "
                        "rate and one decay, which nothing has to choose."
                    )
            schedule = run_schedule(config, train.num_examples - held)
        except UserError as error:
            raise UserError(f"{name}: {error}") from error
        self.every_epochs = _SAVE_STEPS / schedule.steps_per_epoch

    def linear(self) -> dict[str, Any]:
        """Of logistic regression on features; kept, and read where it is the same again."""
        own = tuple(override for override in self.overrides if override.startswith(SEEN))
        changes = (*self.data_set.overrides, "data.validation=0.0", *own)
        settings: dict[str, Any] = {"step": self.step, "metric": self.data_set.metric}
        settings |= {"overrides": list(changes), "data": self.fingerprints}
        name = f"transfer_{self.data_set.name}_linear"
        known = read_result(results_folder(self.path), name)
        if known is not None and known.get("settings") == settings:
            metrics: dict[str, Any] = known["metrics"]
            return metrics
        features = run_features(self.path, step=self.step, overrides=changes)
        metrics, penalty = linear_metrics(features, metric=self.data_set.metric)
        what = f"{self.data_set.name}: linear classifier on features, penalty {penalty:g}"
        what += self.of(own)
        write_result(
            results_folder(self.path), name, what, metrics, settings=settings, command=self.command
        )
        return metrics

    def finetuned(
        self, grid: Sequence[tuple[float, float]], log: Callable[[str], None]
    ) -> dict[str, Any] | None:
        """Fine-tunes by each setting of the grid, then by the best on all training images."""
        name, metric = self.data_set.name, self.data_set.metric
        best = (-1.0, grid[0])
        for rate, decay in grid if len(grid) > 1 else []:
            trial = f"rate_{rate:g}_decay_{decay:g}"
            try:
                metrics = self.trained(trial, rate, decay, _HELD)
            except NonFiniteError:
                log(f"{name}: rate {rate:g}, decay {decay:g}: diverged")
                continue
            if metrics is None:
                return None
            found = metrics[metric]["value"]
            log(f"{name}: rate {rate:g}, decay {decay:g}: {100 * found:.2f} % of held out")
            best = max(best, (found, (rate, decay)), key=lambda pair: pair[0])
        if len(grid) > 1 and best[0] < 0:
            raise UserError(f"{name}: fine-tuning diverges at all rates: give lower --rates.")
        rate, decay = best[1]
        metrics = self.trained(f"chosen_rate_{rate:g}_decay_{decay:g}", rate, decay, 0.0)
        if metrics is None:
            return None
        log(f"{name}: fine-tuned {100 * metrics[metric]['value']:.2f} %")
        what = f"{name}: fine-tuned, rate {rate:g}, weight decay {decay:g}{self.of(self.overrides)}"
        more = {"step": self.step, "rate": rate, "decay": decay, "command": self.command}
        write_result(results_folder(self.path), f"transfer_{name}_finetune", what, metrics, **more)
        return {"finetune": metrics, "rate": rate, "decay": decay}

    def of(self, overrides: Sequence[str]) -> str:
        """What a result says of the encoder and its settings."""
        steps = [f"step {self.step}"] if self.step else []  # a file of weights has none
        return "".join(f", {each}" for each in (*steps, *overrides))

    def trained(self, name: str, rate: float, decay: float, validation: float) -> Any:
        """Metrics of a run of its own; None where it was stopped."""
        config = self.config(rate, decay, validation)
        # What a run says is not the table's business.
        with contextlib.redirect_stdout(sys.stderr):
            return train_classifier(config, self.folder / name, self.command, self.verbosity)[1]
