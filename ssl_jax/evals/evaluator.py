"""Evaluates a run: kNN during training; at the end accuracies of the run and its baselines."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ssl_jax import diagnostics
from ssl_jax.config import Schedule, flat_views
from ssl_jax.data.augment import to_float
from ssl_jax.data.device_crop import resize_images
from ssl_jax.data.index import fixed_sample, views_stream
from ssl_jax.data.labels import NO_LABEL, Targets, common_targets, targets_of
from ssl_jax.data.listing import some
from ssl_jax.data.pipeline import make_augment_fn, prepare_eval, unnormalized
from ssl_jax.data.reader import read_all
from ssl_jax.data.sources import (
    Source,
    Subset,
    labeled,
    several_labels,
    why_no_mean_ap,
    why_not_scored,
)
from ssl_jax.data.values import is_float, rgb
from ssl_jax.evals import probe
from ssl_jax.evals.features import extract_features, padded_batches
from ssl_jax.evals.knn import knn_classify, require_neighbors_memory
from ssl_jax.evals.linear import few_label_accuracies, fit_multi_label, linear_probe
from ssl_jax.evals.metrics import classification_metrics
from ssl_jax.evals.multi_label import mean_average_precision, multi_label_metrics
from ssl_jax.evals.pictures import PICTURES, image_names, retrieval_pictures, view_grid
from ssl_jax.evals.results import (
    BASELINE,
    EVALUATION,
    FINE_TUNED,
    ONLINE,
    UNTRAINED,
    Evaluation,
    Row,
    end_settings,
    measured_with,
    read_evaluation,
    read_result,
    write_evaluation,
    write_result,
)
from ssl_jax.files import writing
from ssl_jax.memory import enough_memory, require_host_memory
from ssl_jax.methods import make_method, title
from ssl_jax.methods.base import Method, evaluated_names
from ssl_jax.run import processes
from ssl_jax.run.log import Progress
from ssl_jax.spmd import AXIS, Spmd

Pytree = Any

_SAMPLED = 2048  # images for RankMe, half of them for uniformity, which compares all pairs
_ALIGNED = 256  # images whose views are compared
_PIXELS = 16  # side to which images are shrunk for the raw pixels baseline


# Why some accuracies are missing of images of several classes each.
_SEVERAL = (
    "The images have several labels each, so mean average precision is measured; kNN and few "
    "labels per class, which need one class per image, are not."
)


class Evaluator:
    """Extracts the features of both splits of a run's data and evaluates them.

    Attributes:
      not_scored: why accuracies of frozen features can't be measured; "" if they can.
    """

    _seconds = _waited = 0.0  # of passes over images

    def __init__(
        self,
        config: ConfigDict,
        spmd: Spmd,
        train: Source,
        test: Source | None,
        *,
        progress: Progress | None = None,
    ) -> None:
        """Prepares the compiled functions.

        Args:
          config: of the run.
          spmd: the mesh; images are split over it.
          train: the split with labels to learn from.
          test: held-out split, or None.
          progress: shows what is being evaluated; None for nothing.

        Raises:
          UserError: features or nearest neighbors can't fit in the primary process's memory.
        """
        self.config, self.train, self.test = config, train, test
        self._several, self.not_scored = _scored(train, test, config.eval.linear_images)
        self._held_out = test.fingerprint if test is not None else ""
        self._progress = progress or Progress(verbosity="warnings")
        self._method = method = make_method(config, Schedule(1, 1))
        # Measured next to the target.
        self._other = "online" if method.network_name() == "target" else ""
        if test is not None and processes.is_primary():
            _require_memory(config, train.num_examples, test.num_examples, method.num_features)
        layer = config.eval.projector_layer

        def encode(variables: Pytree, images: Array) -> Array:
            return method.features(
                variables["params"],
                variables["batch_stats"],
                prepare_eval(images, config),
                projector_layer=layer,
            )

        def small(_: Pytree, images: Array) -> Array:
            return _raw_pixels(images, config.data.range)

        def classify(variables: Pytree, images: Array) -> Array:
            ready = prepare_eval(images, config)
            return method.classify(variables["params"], variables["batch_stats"], ready)

        # The run's own classifier, if it trains one.
        self._needs_labels = method.needs_labels
        self._sigmoid = config.method == "supervised" and config.supervised.sigmoid
        classified = method.classifies and test is not None and test.num_classes > 0
        classified |= self._sigmoid and not why_no_mean_ap(train, test)
        self._classifier = tuple(method.networks) if classified else ()
        self._classify = _gathered(spmd, classify)
        self._encode, self._small = _gathered(spmd, encode), _gathered(spmd, small)
        self._augment_fn = jax.jit(make_augment_fn(unnormalized(config)))
        self._replicate, self._place = spmd.replicate, spmd.place_batch
        # A multiple of the number of devices.
        self._batch_size = -(-config.eval.batch_size // spmd.size) * spmd.size
        self._rows, self._devices = spmd.local_indices(self._batch_size), spmd.size

    @functools.cached_property
    def _labeled_train(self) -> Source:
        """The training images that have labels; all processes use it first together."""
        return _labeled_everywhere(self.train)

    @functools.cached_property
    def _labeled_test(self) -> Source:
        """The held-out images that have labels; all processes use it first together."""
        assert self.test is not None
        return _labeled_everywhere(self.test)

    def features(self, variables: Pytree, source: Source) -> Float[np.ndarray, "n d"]:
        """Extracts the evaluated network's features of a split.

        Every process encodes its share; only the primary process receives the features.

        Args:
          variables: from `evaluated_variables`, on the mesh.
          source: of the images.

        Returns:
          float32 [n, d]; no rows on other processes.
        """
        return self._extract(self._encode, variables, source)

    def _extract(self, encode: Any, variables: Pytree, source: Source) -> Float[np.ndarray, "n d"]:
        half = max(1, self._batch_size // 2)
        divisible = self._batch_size > self._devices  # a multiple of the devices
        suggestions = [f"--config.eval.batch_size={half}"] if divisible else []
        with enough_memory("A batch of the evaluation", suggestions):
            return extract_features(
                encode,
                variables,
                source,
                batch_size=self._batch_size,
                rows=self._rows,
                place=self._place,
                keep=processes.is_primary(),
                timeout_s=self.config.data.timeout_s,
                update=self._progress.update,
                timed=self._count,
            )

    def _count(self, seconds: float, waited: float) -> None:
        """Adds a pass over images to what `measure` has taken."""
        self._seconds, self._waited = self._seconds + seconds, self._waited + waited

    def measure(self, state: Any) -> dict[str, float]:
        """Measures what is tracked during training, on features of the evaluated network.

        Every process encodes its share of the images; the primary process measures, and all
        processes receive the results.

        Args:
          state: of the run.

        Returns:
          "rankme", "uniformity" and, given two views, "alignment" of a fixed sample of training
          images; "eval_data_wait", the share of the time for features that the primary process
          waited for images. If both splits have labels, "knn", the accuracy of weighted kNN on
          the held-out split, "knn_online" of the online network if the target is evaluated, and
          "probe_accuracy" if there is an online probe, which is the online network's.
          "test_accuracy" of the run's own classifier, or "test_mean_ap" of one of several classes
          per image. Images without a label are neither neighbors nor scored.
        """
        self._seconds = self._waited = 0.0
        accuracy = self._classifier_accuracy(state)
        if self._other and not self.not_scored:
            accuracy |= self._online_accuracy(state)
        variables = evaluated_variables(self._method, state)
        if self.not_scored:  # kNN would need all images
            some = fixed_sample(self.train.num_examples, _SAMPLED)
            train, test = self.features(variables, Subset(self.train, some)), None
        else:
            train = self.features(variables, self._labeled_train)
            test = self.features(variables, self._labeled_test)
        views = self._view_features(state, variables)
        if test is not None and not self._other:
            accuracy |= self._probe_accuracy(state, test)
        names = ["eval_data_wait", "rankme", "uniformity", *accuracy]
        names += ["alignment"] * (len(views) == 2) + ["knn"] * (test is not None)
        measured = dict.fromkeys(names, 0.0)
        if processes.is_primary():
            sample = train[fixed_sample(len(train), _SAMPLED)] if test is not None else train
            measured["eval_data_wait"] = self._waited / max(self._seconds, 1e-9)
            measured["rankme"] = diagnostics.rankme(sample)
            measured["uniformity"] = diagnostics.uniformity(sample[: _SAMPLED // 2])
            if len(views) == 2:
                measured["alignment"] = diagnostics.alignment(*views)
            if test is not None:
                measured["knn"] = self._knn_accuracy(train, test)
            measured |= accuracy
        return processes.from_first(measured)

    def logits(self, state: Any) -> Float[np.ndarray, "n c"]:
        """Logits of labeled held-out images by the run's own classifier, on the primary process."""
        scored = self.test if self._sigmoid else self._labeled_test
        assert scored is not None
        return self._extract(self._classify, _variables(state, self._classifier), scored)

    def _online_accuracy(self, state: Any) -> dict[str, float]:
        """Accuracies of the online network next to the target; 0 without the features."""
        variables = evaluated_variables(self._method, state, "online")
        train = self.features(variables, self._labeled_train)
        test = self.features(variables, self._labeled_test)
        knn = self._knn_accuracy(train, test) if processes.is_primary() else 0.0
        return {"knn_online": knn, **self._probe_accuracy(state, test)}

    def _probe_accuracy(self, state: Any, test: Float[np.ndarray, "n d"]) -> dict[str, float]:
        """Accuracy of the online probe, if there is one; 0 on processes without the features."""
        if not state.probe or self.config.eval.projector_layer:
            return {}
        if not len(test):
            return {"probe_accuracy": 0.0}
        logits = probe.scores(jax.device_get(state.probe["params"]), jnp.asarray(test))
        correct = np.asarray(logits).argmax(axis=1) == self._labeled_test.labels
        return {"probe_accuracy": float(np.mean(correct))}

    def is_done(self, workdir: Path, settings: str | None) -> bool:
        """Whether the accuracies of the run's end have all been written and can be read.

        Args:
          workdir: of the run.
          settings: with which they were measured, from the last file of the run's end; None if it
            is missing or corrupt.
        """
        if not measured_with(settings, self.config, self._held_out):
            return False
        if self._classifier and read_result(workdir, "classifier") is None:
            return False
        try:
            return not self._fits_rows or bool(read_evaluation(workdir / EVALUATION))
        except (OSError, ValueError):
            return False

    @property
    def _extracts(self) -> bool:
        """Whether `finish` extracts features: those of a frozen encoder have been measured."""
        end = self.config.eval.at_end and not self.config.supervised.freeze
        return bool(end) and self.test is not None

    @property
    def _fine_tuned(self) -> bool:
        """Whether the encoder was pretrained, and then trained with labels."""
        return self.config.method == "supervised" and bool(self.config.init_from.path)

    @property
    def _fits_rows(self) -> bool:
        return self._extracts and (self._several or not self.not_scored)

    def plan(self) -> str:
        """Describes what `finish` measures of the encoder; "" if that is turned off."""
        if self._fits_rows:
            kind = "fine-tuned" if self._fine_tuned else "frozen"
            two = "target and online encoders" if self._other else "encoder"
            text = f"Evaluating the features of the {kind} {two} and two baselines."
            return f"{text} {_SEVERAL}" if self._several else text
        if not self.config.eval.at_end or self.config.supervised.freeze:
            return ""
        what = "Evaluating nearest neighbors and a map only." if self.test else "Not evaluated."
        return f"{what} {self.not_scored}"

    def _classifier_accuracy(self, state: Any) -> dict[str, float]:
        if not self._classifier:
            return {}
        logits = self.logits(state)
        if self._sigmoid:
            precision = self._mean_ap(logits) if len(logits) else 0.0
            return {"test_mean_ap": precision}
        correct = logits.argmax(axis=1) == self._labeled_test.labels if len(logits) else [0.0]
        return {"test_accuracy": float(np.mean(correct))}

    def _mean_ap(self, logits: Float[np.ndarray, "n c"]) -> float:
        """Mean average precision of the run's own classifier, over classes of both splits."""
        learned, test = _both_targets(self.train, self.test)
        kept = np.flatnonzero(learned.counts[: logits.shape[1]])
        return mean_average_precision(logits[:, kept], test.values[:, kept])

    def view_grid(self, state: Any) -> UInt8[np.ndarray, "rows columns 3"]:
        """Draws some images with the views that the first step makes of them."""
        pictures = self._view_pictures(state)
        return view_grid(pictures["originals"], pictures["views"])

    def finish(
        self,
        workdir: Path,
        initial: Pytree,
        state: Any,
        stopping: Callable[[], bool] = lambda: False,
    ) -> dict[str, np.ndarray]:
        """Evaluates the run and its baselines; writes the accuracies into the run's folder.

        Args:
          workdir: gets `evaluation.json` if there are labels.
          initial: the evaluated variables before training, for the random baseline, on the host.
          state: the trained state.
          stopping: called before each encoder; returns whether to stop.

        Returns:
          Arrays for `report.write_images`: images and, as "not_scored", the reason if accuracies
          can't be measured; empty on processes other than the primary.

        Raises:
          StoppedError: `stopping` returned True.
          UserError: the folder cannot be written.
        """
        first = processes.is_primary()
        rows: list[Row] = []
        pictures = self._about(state) if first else {}
        self._write_classifier(workdir, state)
        if self.test is None or not self._extracts:
            return pictures
        encoders = self._encoders(state, initial)
        own = encoders[0][0]
        train, test = self.train, self.test
        if not self.not_scored:
            train, test = self._labeled_train, self._labeled_test
        for name, encode, weights in encoders:
            if stopping():
                raise processes.StoppedError
            self._progress.line(f"Evaluating {title(name)}: features …")
            splits = [self._extract(encode, weights, split) for split in (train, test)]
            if not first:
                continue  # it has encoded its share
            if name == own:
                pictures |= self._retrieval(train, test, splits)
            if self._fits_rows:
                self._progress.line(f"Evaluating {title(name)}: classifiers …")
                rows.append(self._row(name, *splits))
            del splits  # before the next are extracted
        if rows:
            rows = rows[1:] + rows[:1]  # the run's own comes last
            split = f"{train.num_examples} training images with their labels"
            found = Evaluation(rows, test.num_examples, split, int(state.step), self._notes())
            with writing(workdir):
                write_evaluation(workdir, found)
        return pictures

    def _encoders(self, state: Any, initial: Pytree) -> list[tuple[str, Any, Pytree]]:
        """The rows' names, encoders and variables: the run's own, baselines, the other network."""
        own = FINE_TUNED if self._fine_tuned else self.config.method
        encoders = [(own, self._encode, evaluated_variables(self._method, state))]
        if not self._fits_rows:
            return encoders
        encoders.append((BASELINE, self._small, {}))
        encoders.append((UNTRAINED, self._encode, self._replicate(initial)))
        if self._other:
            online = evaluated_variables(self._method, state, self._other)
            encoders.append((ONLINE, self._encode, online))
        return encoders

    def _retrieval(
        self, train: Source, test: Source, features: list[np.ndarray]
    ) -> dict[str, np.ndarray]:
        scored, limits = not self.not_scored, self.config.data.range
        return retrieval_pictures(train, test, *features, labeled=scored, limits=limits)

    def _notes(self) -> tuple[str, ...]:
        """Limits of the accuracies, as sentences for the report."""
        if self._several:
            return self._network_note() + self._several_notes()
        notes = [*self._network_note()]
        fewest, name = self._smallest_class()
        if self._needs_labels and min(self.config.eval.labels_per_class, default=fewest) < fewest:
            notes.append(
                "The encoder itself was trained with labels: results with few labels per class "
                "rest on more labels than that."
            )
        if self.config.data.subset < 1:
            seen = self._labeled_train.num_examples
            notes.append(
                f"Linear probe and kNN learn from the {seen:,} labeled images of "
                f"config.data.subset={self.config.data.subset:g}."
            )
        few = [str(n) for n in self.config.eval.labels_per_class if n > fewest]
        if few:
            notes.append(
                f"Not measured: {' and '.join(few)} labels per class, as class '{name}' has only "
                f"{fewest:,} in the training images."
            )
        return tuple(notes)

    def _network_note(self) -> tuple[str, ...]:
        """What the run's own row is, if the target is evaluated."""
        name = title(self.config.method)
        return (f"{name} is evaluated by its target network.",) if self._other else ()

    def _several_notes(self) -> tuple[str, ...]:
        """What is not measured on images of several classes each."""
        train, test = self._targets()
        names = [
            name
            for name, *counts in zip(train.names, train.counts, test.counts, strict=True)
            if not all(counts)
        ]
        if not names:
            return (_SEVERAL,)
        return _SEVERAL, f"mAP is without {some(names)}, which a split has no images of."

    def _targets(self) -> tuple[Targets, Targets]:
        """Targets of the training images that classifiers learn from, and of the held-out ones."""
        train, test = _both_targets(self.train, self.test)
        return train.of(fixed_sample(len(train.values), self.config.eval.linear_images)), test

    def _several_row(self, name: str, train: np.ndarray, test: np.ndarray) -> Row:
        """The row of images of several classes each."""
        targets, test_targets = self._targets()
        seen = fixed_sample(len(train), self.config.eval.linear_images)
        metrics, _ = fit_multi_label(
            train[seen],
            targets.values,
            test,
            test_targets.values,
            targets.names,
            # That of the probe of one class per image.
            penalties=[10 / len(seen)],
        )
        found = metrics["mean_ap"]
        interval = {"mean_ap": (found["low"], found["high"])}
        return Row(name, {}, {"mean_ap": found["value"]}, interval)

    def _smallest_class(self) -> tuple[int, str]:
        """The number of images in the smallest class that has any, and its name."""
        labels = self._labeled_train.labels
        assert labels is not None
        found, counts = np.unique(labels, return_counts=True)
        return int(counts.min()), self.train.class_names[found[counts.argmin()]]

    def _write_classifier(self, workdir: Path, state: Any) -> None:
        """Evaluates the run's own classifier, if it has one."""
        if not self._classifier:
            return
        logits = self.logits(state)
        if processes.is_primary():
            if self._sigmoid:
                measured = _precisions(logits, *_both_targets(self.train, self.test))
            else:
                measured = classification_metrics(logits, np.asarray(self._labeled_test.labels))
            with writing(workdir):
                write_result(workdir, "classifier", "the run's own classifier", measured)

    def _row(self, name: str, train: np.ndarray, test: np.ndarray) -> Row:
        if self._several:
            return self._several_row(name, train, test)
        labels, test_labels = self._labeled_train.labels, self._labeled_test.labels
        assert labels is not None and test_labels is not None
        trials = {}
        fewest, _ = self._smallest_class()
        for count in self.config.eval.labels_per_class:
            if count > fewest:
                continue
            trials[count] = few_label_accuracies(
                train,
                labels,
                test,
                test_labels,
                labels_per_class=count,
                trials=self.config.eval.trials,
            )
        seen = fixed_sample(len(train), self.config.eval.linear_images)
        predicted = linear_probe(train[seen], labels[seen], test)
        linear = float(np.mean(predicted == test_labels))
        return Row(name, trials, {"linear": linear, "knn": self._knn_accuracy(train, test)})

    def _knn_accuracy(self, train: np.ndarray, test: np.ndarray) -> float:
        labels = self._labeled_train.labels
        assert labels is not None
        predicted = knn_classify(
            train,
            labels,
            test,
            num_classes=self.train.num_classes,
            k=self.config.eval.knn_k,
            temperature=self.config.eval.knn_temperature,
        )
        return float(np.mean(predicted == self._labeled_test.labels))

    def _about(self, state: Any) -> dict[str, np.ndarray]:
        """Views of the training images, and how the run's end is measured, if at all."""
        about = {"settings": np.array(end_settings(self.config, self._held_out))}
        if self.not_scored:
            about["not_scored"] = np.array(self.not_scored)
        return self._view_pictures(state) | about

    def _view_pictures(self, state: Any) -> dict[str, np.ndarray]:
        """Some images with the views that the first step makes of them."""
        ids = fixed_sample(self.train.num_examples, PICTURES)
        views = self._views(state, ids)
        sizes = {view.shape for view in views}
        largest = [v for v in views if v.shape == max(sizes)]
        originals = rgb(self.train.eval_transform(ids), self.config.data.range)
        return {
            "originals": originals,
            "original_name": image_names(self.train, ids),
            "views": rgb(np.stack(largest, axis=1)),
        }

    def _view_features(self, state: Any, variables: Pytree) -> list[Float[np.ndarray, "n d"]]:
        """Features of two views of the same images; empty if there is one view."""
        if len(flat_views(self.config)) < 2:
            return []
        data, found = self.config.data, []
        kept_floats = is_float(data.bits, data.range)
        sample = fixed_sample(self.train.num_examples, _ALIGNED)
        for rows, kept in padded_batches(len(sample), self._batch_size):
            views = self._views(state, sample[rows][self._rows])[:2]
            # Rounded like the images of 8 bits that the encoder gets in evaluations.
            placed = [self._place(view if kept_floats else pixels(view)) for view in views]
            encoded = [np.asarray(self._encode(variables, view), np.float32) for view in placed]
            found.append([features[:kept] for features in encoded])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _views(self, state: Any, ids: Int[np.ndarray, " n"]) -> list[np.ndarray]:
        """The views that the first step makes of images, not normalized."""
        # Few images: one device, without the mesh.
        key_data = jnp.asarray(np.asarray(state.key))
        key = views_stream(jax.random.wrap_key_data(key_data), 0)
        batches = self.train.batches(iter([(0, ids)]))
        (raw,) = read_all(batches, self.config.data.timeout_s)
        images = {name: array[ids] for name, array in self.train.device_data().items()}
        batch = self._augment_fn(raw | images, {}, key)
        return [np.asarray(view) for view in batch["views"]]


def _scored(train: Source, test: Source | None, sampled: int) -> tuple[bool, str]:
    """Whether average precision is measured, and why accuracies are not, or ""; see `_targets`."""
    if not several_labels(train, test):
        return False, why_not_scored(train, test)
    missing = why_no_mean_ap(train, test)
    if not missing and why_no_mean_ap(_sample(train, sampled), test):
        missing = (
            f"No class has an image both among the {sampled:,} training images that the linear "
            "probe learns from and in the held-out images, so there is no average precision. Raise "
            "config.eval.linear_images."
        )
    return not missing, missing or _SEVERAL


def _sample(source: Source, most: int) -> Source:
    return Subset(source, fixed_sample(source.num_examples, most))


def _both_targets(train: Source, test: Source | None) -> tuple[Targets, Targets]:
    """Targets of both splits, with the same classes: first those of the training images."""
    learned, held_out = targets_of(train), targets_of(test)
    assert learned is not None and held_out is not None
    return common_targets(learned, held_out)


def _precisions(logits: Float[np.ndarray, "n c"], train: Targets, test: Targets) -> dict[str, Any]:
    """`multi_label_metrics` of a classifier, without classes that it has no image of to learn.

    Args:
      logits: of the training images' classes.
      train: targets of the training images, from `_both_targets`.
      test: of the held-out images.
    """
    scores = np.zeros(test.values.shape, np.float32)
    scores[:, : logits.shape[1]] = logits
    skipped = np.flatnonzero(train.counts == 0)
    return multi_label_metrics(scores, test.values, test.names, skipped=skipped)


def _require_memory(config: ConfigDict, learned: int, held_out: int, width: int) -> None:
    """Refuses features, float32, or neighbors that don't fit in the host's memory."""
    require_neighbors_memory(held_out, min(config.eval.knn_k, learned))
    require_host_memory(
        4 * (learned + held_out) * width,
        "The features of all training and held-out images, which are evaluated together,",
        "Evaluate fewer images, such as --config.data.subset=0.1.",
    )


def _labeled_everywhere(source: Source) -> Source:
    """`labeled`; only the primary process reads labels, which may take reading all records."""
    labels = source.labels if processes.is_primary() else None
    has_label = np.zeros(source.num_examples, bool) if labels is None else labels != NO_LABEL
    return labeled(source, processes.array_from_first(has_label))


def _raw_pixels(images: Array, limits: Sequence[float]) -> Array:
    """The images as features [n, values], at most `_PIXELS` wide; 8 bits are kept as such."""
    plain = images.dtype == jnp.uint8 and not limits
    images = to_float(images, limits)
    if max(images.shape[1:3]) > _PIXELS:
        images = resize_images(images, (_PIXELS, _PIXELS), "bilinear")
        images = jnp.round(255 * images) / 255 if plain else images
    return images.reshape(len(images), -1)


def _gathered(spmd: Spmd, encode: Callable[[Pytree, Array], Array]) -> Callable[..., Array]:
    """Maps an encoder over the devices' shares of images and all-gathers its features."""

    def mapped(variables: Pytree, images: Array) -> Array:
        return jax.lax.all_gather(encode(variables, images), AXIS, tiled=True)

    return spmd.map(mapped, inputs=("replicated", "sharded"), outputs="replicated")


def pixels(images: Float[np.ndarray, "*n h w 3"]) -> np.ndarray:
    """Converts images in [0, 1] to uint8."""
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8)


def evaluated_variables(method: Method, state: Any, network: str = "") -> Pytree:
    """Selects the variables of the evaluated network.

    Args:
      method: of the run. With `config.eval.projector_layer`, the projector's variables are
        included.
      state: of the run.
      network: "online" or "target"; "" for that of `config.eval.network`.

    Returns:
      "params" and "batch_stats", each by the network's name.
    """
    params, stats = method.evaluated(state.params, state.method_state, network)
    names = evaluated_names(method.config.eval.projector_layer)
    return {
        "params": {name: params[name] for name in names},
        "batch_stats": {name: stats[name] for name in names},
    }


def _variables(state: Any, names: tuple[str, ...]) -> Pytree:
    return {
        "params": {name: state.params[name] for name in names},
        "batch_stats": {name: state.method_state["batch_stats"][name] for name in names},
    }
