"""Evaluating a run: kNN while it trains; at the end a table with its baselines, and pictures."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from ml_collections import ConfigDict

from ssl_jax import diagnostics
from ssl_jax.config import Schedule
from ssl_jax.data.device_crop import resize_images
from ssl_jax.data.index import views_stream
from ssl_jax.data.pipeline import make_augment_fn, prepare_clean, unnormalised
from ssl_jax.data.sources import Source
from ssl_jax.evals import probe
from ssl_jax.evals.embedding_map import choose_images, tsne
from ssl_jax.evals.features import extract_features, padded_batches
from ssl_jax.evals.knn import knn_classify, nearest_neighbours
from ssl_jax.evals.linear import few_label_accuracies, linear_probe
from ssl_jax.evals.metrics import classification_metrics
from ssl_jax.evals.pictures import thumbnails, view_grid
from ssl_jax.evals.projector import write_projector
from ssl_jax.evals.results import read_results, result_line, write_result
from ssl_jax.files import replacing, writing
from ssl_jax.methods import make_method
from ssl_jax.methods.base import evaluated_names
from ssl_jax.run import processes
from ssl_jax.run.memory import enough_memory
from ssl_jax.spmd import AXIS, Spmd

Pytree = Any
Row = dict[str, Any]

LAST_FILE = "report_images.npz"  # of those that the end of a run writes
_PICTURES = 12  # originals with views, and queries with neighbours, kept for the report
_NEIGHBOURS = 6
_SIDE = 128  # of those pictures at most, and of a map's, in pixels
_MAP_SIDE = 32
_RETRIEVED = 5000  # held-out images at most whose nearest neighbours are looked for
_FAILURES = 24  # of them kept
_SAMPLED = 1024  # images for the diagnostics
_PIXELS = 16  # side to which images are made smaller for the baseline of raw pixels


class Evaluator:
    """Features of both splits of a run's data, and what is measured on them.

    Attributes:
      has_labels: whether there is a held-out split and both have labels.
    """

    def __init__(self, config: ConfigDict, spmd: Spmd, train: Source, test: Source | None) -> None:
        """Prepares the compiled functions.

        Args:
          config: of the run.
          spmd: the mesh; images are split over it.
          train: split whose labels are known.
          test: held-out split, or None.
        """
        self.config, self.train, self.test = config, train, test
        self.has_labels = test is not None and train.num_classes > 0 and test.num_classes > 0
        method = make_method(config, Schedule(1, 1))
        layer = config.eval.projector_layer

        def encode(variables: Pytree, images: Array) -> Array:
            return method.features(
                variables["params"],
                variables["batch_stats"],
                prepare_clean(images, config),
                projector_layer=layer,
            )

        def small(_: Pytree, images: Array) -> Array:
            if images.shape[1] > _PIXELS:
                images = jnp.round(255 * resize_images(images, _PIXELS, "bilinear"))
            return images.reshape(len(images), -1).astype(jnp.float32) / 255

        def classify(variables: Pytree, images: Array) -> Array:
            ready = prepare_clean(images, config)
            logits: Array = method.classify(variables["params"], variables["batch_stats"], ready)
            return logits

        # Of the run's own classifier, where it trains one.
        classified = method.classifies and test is not None and test.num_classes > 0
        self._classifier = tuple(method.networks) if classified else ()
        self._classify = _gathered(spmd, classify)
        self._encode, self._small = _gathered(spmd, encode), _gathered(spmd, small)
        self._augment_fn = jax.jit(make_augment_fn(unnormalised(config)))
        self._replicate, self._place = spmd.replicate, spmd.place_batch
        # Whole shares for every device.
        self._batch_size = -(-config.eval.batch_size // spmd.size) * spmd.size
        self._rows, self._devices = spmd.local_indices(self._batch_size), spmd.size

    def features(
        self, variables: Pytree, source: Source, first: int | None = None
    ) -> Float[np.ndarray, "n d"]:
        """The evaluated network's features of (the `first` images of) a split.

        Every process encodes its share; the first one has them, the others get none.

        `variables` are those of `evaluated_variables`, on the mesh.
        """
        return self._extract(self._encode, variables, source, first)

    def _extract(
        self, encode: Any, variables: Pytree, source: Source, first: int | None = None
    ) -> Float[np.ndarray, "n d"]:
        half = max(1, self._batch_size // 2)
        divisible = self._batch_size > self._devices  # it is whole shares of all devices
        suggestions = [f"--config.eval.batch_size={half}"] if divisible else []
        with enough_memory("A batch of the evaluation", suggestions):
            return extract_features(
                encode,
                variables,
                source,
                batch_size=self._batch_size,
                rows=self._rows,
                place=self._place,
                first=first,
                keep=processes.is_primary(),
            )

    def measure(self, state: Any) -> dict[str, float]:
        """What is followed during training, on features of the evaluated network.

        Every process encodes its share of the images; the first measures, and all get its numbers.

        Args:
          state: of the run.

        Returns:
          "rankme", "uniformity" and "alignment" of training images, and "knn", the accuracy of a
          weighted vote of nearest neighbours on the held-out split, where both splits have labels.
        """
        variables = evaluated_variables(state, self.config.eval.projector_layer)
        # Without labels to vote, a sample is enough.
        train = self.features(variables, self.train, None if self.has_labels else 2 * _SAMPLED)
        views = self._view_features(state, variables)
        test = self.features(variables, self.test) if self.has_labels and self.test else None
        accuracy = self._classifier_accuracy(state)
        if state.probe and test is not None and not self.config.eval.projector_layer:
            accuracy["probe_accuracy"] = self._probe_accuracy(state, test)
        names = ["rankme", "uniformity", *accuracy]
        names += ["alignment"] * (len(views) == 2) + ["knn"] * (test is not None)
        measured = dict.fromkeys(names, 0.0)
        if processes.is_primary():
            measured["rankme"] = diagnostics.rankme(train[: 2 * _SAMPLED])
            measured["uniformity"] = diagnostics.uniformity(train[:_SAMPLED])
            if len(views) == 2:
                measured["alignment"] = diagnostics.alignment(*views)
            if test is not None:
                measured["knn"] = self._knn_accuracy(train, test)
            measured |= accuracy
        return processes.from_first(measured)

    def logits(self, state: Any) -> Float[np.ndarray, "n c"]:
        """Of the held-out images by the run's own classifier; none on other processes."""
        assert self.test is not None
        return self._extract(self._classify, _variables(state, self._classifier), self.test)

    def _probe_accuracy(self, state: Any, test: Float[np.ndarray, "n d"]) -> float:
        """Of the linear classifier that was trained along; 0 where the features aren't."""
        if not len(test) or self.test is None:
            return 0.0
        logits = probe.scores(jax.device_get(state.probe["params"]), jnp.asarray(test))
        return float(np.mean(np.asarray(logits).argmax(axis=1) == self.test.labels))

    def is_done(self, workdir: Path) -> bool:
        """Whether `finish` has written its last file."""
        return (workdir / LAST_FILE).exists()

    def _classifier_accuracy(self, state: Any) -> dict[str, float]:
        if not self._classifier or self.test is None:
            return {}
        logits = self.logits(state)
        correct = logits.argmax(axis=1) == self.test.labels if len(logits) else [0.0]
        return {"test_accuracy": float(np.mean(correct))}

    def view_grid(self, state: Any) -> UInt8[np.ndarray, "rows columns 3"]:
        """One picture of the first images with the views that the first step makes of them."""
        pictures = self._view_pictures(state)
        return view_grid(pictures["originals"], pictures["views"])

    def finish(
        self,
        workdir: Path,
        initial: Pytree,
        state: Any,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Measures the run and its baselines and writes them into its folder.

        Args:
          workdir: gets `evaluation.json`, where there are labels, `report_images.npz` and the files
            of TensorBoard's embedding projector.
          initial: the evaluated variables before training, the random baseline, on the host.
          state: the trained state.
          stopping: asked before each row.

        Raises:
          StoppedError: it was answered yes.
          UserError: the folder can't be written to.
        """
        first = processes.is_primary()
        variables = evaluated_variables(state, self.config.eval.projector_layer)
        rows: list[Row] = []
        pictures = self._view_pictures(state) if first else {}
        if self._classifier and self.test is not None:
            logits = self.logits(state)
            if first:
                measured = classification_metrics(logits, np.asarray(self.test.labels))
                with writing(workdir):
                    write_result(workdir, "classifier", "the run's own classifier", measured)
        # A frozen encoder's features were measured where it was trained.
        measured_here = self.config.eval.at_end and not self.config.supervised.freeze
        if self.test is not None and measured_here:
            encoders = [(self.config.method, self._encode, variables)]
            if self.has_labels:
                encoders += [
                    ("raw pixels", self._small, {}),
                    ("random init", self._encode, self._replicate(initial)),
                ]
            for name, encode, weights in encoders:
                if stopping():
                    raise processes.StoppedError
                splits = [self._extract(encode, weights, s) for s in (self.train, self.test)]
                if not first:
                    continue  # it has encoded its share
                if name == self.config.method:
                    pictures |= self._neighbours(*splits) | self._failures(*splits)
                    pictures |= self._map(splits[1])
                    projected = self._projected(splits[1], pictures)
                    with writing(workdir):
                        write_projector(workdir, *projected, int(state.step))
                elif weights:
                    pictures["map_untrained"] = tsne(splits[1][pictures["map_index"]])
                if self.has_labels:
                    rows.append(self._row(name, *splits))
                del splits  # before the next are extracted
        if first:
            with writing(workdir):
                self._write(workdir, rows[1:] + rows[:1], pictures, int(state.step))

    def _row(self, name: str, train: np.ndarray, test: np.ndarray) -> Row:
        assert self.test is not None
        labels, test_labels = self.train.labels, self.test.labels
        assert labels is not None and test_labels is not None
        row: Row = {"name": name}
        for count in self.config.eval.labels_per_class:
            if np.bincount(labels).min() < count:
                continue
            trials = few_label_accuracies(
                train,
                labels,
                test,
                test_labels,
                labels_per_class=count,
                trials=self.config.eval.trials,
            )
            row[f"labels_{count}"] = {
                "mean": float(trials.mean()),
                "std": float(trials.std(ddof=1)) if len(trials) > 1 else 0.0,
                "trials": trials.tolist(),
            }
        fitted = self.config.eval.linear_images
        seen = np.random.default_rng(0).permutation(len(train))[:fitted]
        predicted = linear_probe(train[seen], labels[seen], test)
        row["linear"] = float(np.mean(predicted == test_labels))
        row["knn"] = self._knn_accuracy(train, test)
        return row

    def _knn_accuracy(self, train: np.ndarray, test: np.ndarray) -> float:
        assert self.test is not None and self.train.labels is not None
        predicted = knn_classify(
            train,
            self.train.labels,
            test,
            num_classes=self.config.data.num_classes,
            k=self.config.eval.knn_k,
            temperature=self.config.eval.knn_temperature,
        )
        return float(np.mean(predicted == self.test.labels))

    def _view_pictures(self, state: Any) -> dict[str, np.ndarray]:
        """Originals with the views that the first step would make of them."""
        count = min(_PICTURES, self.train.num_examples)
        views = self._views(state, np.arange(count, dtype=np.int32))
        sizes = {view.shape for view in views}
        largest = [v for v in views if v.shape == max(sizes)]
        originals = self.train.eval_transform(np.arange(count))
        return {"originals": originals, "views": pixels(np.stack(largest, axis=1))}

    def _view_features(self, state: Any, variables: Pytree) -> list[Float[np.ndarray, "n d"]]:
        """Features of two views of the first images, of each the same; none of a single view."""
        count = min(self._batch_size, self.train.num_examples)
        ids, kept = next(padded_batches(count, self._batch_size))
        views = self._views(state, ids[self._rows])[:2]
        if len(views) < 2:
            return []
        placed = [self._place(pixels(view)) for view in views]
        return [np.asarray(self._encode(variables, view), np.float32)[:kept] for view in placed]

    def _views(self, state: Any, ids: Int[np.ndarray, " n"]) -> list[np.ndarray]:
        """The views that the first step would make of images, without normalisation."""
        # Off the mesh: few images, on one device.
        key_data = jnp.asarray(np.asarray(state.key))
        key = views_stream(jax.random.wrap_key_data(key_data), 0)
        raw: dict[str, Any] = next(self.train.batches(iter([(0, ids)])))
        beyond = int(ids.max()) + 1  # no more than needed goes to that device
        device_data = {name: array[:beyond] for name, array in self.train.device_data().items()}
        batch = self._augment_fn(raw, device_data, key)
        return [np.asarray(view) for view in batch["views"]]

    def _neighbours(self, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
        """Held-out images, spread over the split, with the most similar training images."""
        assert self.test is not None
        queries = np.linspace(0, len(test) - 1, min(_PICTURES, len(test))).astype(np.int32)
        similarity, index = nearest_neighbours(train, test[queries], k=_NEIGHBOURS)
        images = self.train.eval_transform(index.reshape(-1))
        pictures = {
            "neighbours_query": self.test.eval_transform(queries),
            "neighbours": images.reshape(*index.shape, *images.shape[1:]),
            "neighbour_similarity": similarity,
        }
        if self.has_labels:
            assert self.train.labels is not None and self.test.labels is not None
            pictures["query_label"] = self.test.labels[queries]
            pictures["neighbour_label"] = self.train.labels[index]
            # A source may name fewer classes than its labels, or the other's, tell apart.
            known = self.train.class_names
            count = max(self.train.num_classes, self.test.num_classes)
            numbers = tuple(str(i) for i in range(len(known), count))
            pictures["class_names"] = np.array((*known, *numbers))
        return pictures

    def _failures(self, train: np.ndarray, test: np.ndarray) -> dict[str, np.ndarray]:
        """Held-out images whose nearest training image is of another class, nearest first."""
        if not self.has_labels:
            return {}
        assert self.test is not None and self.train.labels is not None
        assert self.test.labels is not None
        asked = np.linspace(0, len(test) - 1, min(_RETRIEVED, len(test))).astype(np.int32)
        similarity, index = nearest_neighbours(train, test[asked], k=_NEIGHBOURS)
        wrong = np.flatnonzero(self.train.labels[index[:, 0]] != self.test.labels[asked])
        shown = wrong[np.argsort(-similarity[wrong, 0], kind="stable")][:_FAILURES]
        counted = {"failures_count": np.array(len(wrong)), "failures_asked": np.array(len(asked))}
        if not len(shown):
            return counted
        images = thumbnails(self.train.eval_transform(index[shown].reshape(-1)), _SIDE)
        return counted | {
            "failures_query": thumbnails(self.test.eval_transform(asked[shown]), _SIDE),
            "failures_neighbours": images.reshape(*index[shown].shape, *images.shape[1:]),
            "failures_similarity": similarity[shown],
            "failures_query_label": self.test.labels[asked[shown]],
            "failures_neighbour_label": self.train.labels[index[shown]],
        }

    def _map(self, test: np.ndarray) -> dict[str, np.ndarray]:
        """Held-out images in a plane, with the nearest of them to each by the features."""
        assert self.test is not None
        labels = self.test.labels if self.has_labels else None
        index = choose_images(labels, len(test))
        # The nearest of all is the image itself.
        similarity, near = nearest_neighbours(test[index], test[index], k=_NEIGHBOURS + 1)
        others = near != np.arange(len(index))[:, None]
        others[others.all(axis=1), -1] = False  # it has copies that came before it
        found = {
            "map_index": index,
            "map_images": thumbnails(self.test.eval_transform(index), _MAP_SIDE),
            "map_positions": tsne(test[index]),
            "map_neighbour": near[others].reshape(len(index), -1),
            "map_similarity": similarity[others].reshape(len(index), -1),
        }
        return found if labels is None else found | {"map_label": labels[index]}

    def _projected(
        self, test: np.ndarray, pictures: dict[str, np.ndarray]
    ) -> tuple[np.ndarray, list[str], np.ndarray]:
        """The features of a map's images, their classes' names, and the images."""
        names = pictures["class_names"][pictures["map_label"]] if "map_label" in pictures else []
        return test[pictures["map_index"]], list(map(str, names)), pictures["map_images"]

    def _write(
        self, workdir: Path, rows: list[Row], pictures: dict[str, np.ndarray], step: int
    ) -> None:
        assert self.test is not None or not rows
        if rows and self.test is not None:
            record = {
                "rows": rows,
                "step": step,
                "trials": self.config.eval.trials,
                "test_examples": self.test.num_examples,
                "split": f"{self.train.num_examples} training images with their labels",
            }
            with replacing(workdir / "evaluation.json") as file:
                file.write_text(json.dumps(record, indent=1) + "\n")
        # Last, for it says that all is there.
        with replacing(workdir / LAST_FILE) as file:
            np.savez_compressed(file, **pictures)  # type: ignore[arg-type]


def _gathered(spmd: Spmd, encode: Callable[[Pytree, Array], Array]) -> Callable[..., Array]:
    """Maps an encoder over the devices' shares of images; its features are whole on each."""

    def mapped(variables: Pytree, images: Array) -> Array:
        return jax.lax.all_gather(encode(variables, images), AXIS, tiled=True)

    return spmd.map(mapped, inputs=("replicated", "sharded"), outputs="replicated")


def pixels(images: Float[np.ndarray, "*n h w 3"]) -> np.ndarray:
    """Images in [0, 1] as uint8."""
    return np.clip(np.round(images * 255), 0, 255).astype(np.uint8)


def evaluated_variables(state: Any, projector_layer: int = 0) -> Pytree:
    """The variables of what is evaluated: the online or query encoder, never the target.

    Args:
      state: of the run.
      projector_layer: see `Method.features`; with one, the projector's are there too.

    Returns:
      "params" and "batch_stats", each by the network's name.
    """
    return _variables(state, evaluated_names(projector_layer))


def _variables(state: Any, names: tuple[str, ...]) -> Pytree:
    return {
        "params": {name: state.params[name] for name in names},
        "batch_stats": {name: state.method_state["batch_stats"][name] for name in names},
    }


def evaluation_table(workdir: Path) -> list[str]:
    """The lines of `table` for the run in a folder, and of its evaluations; maybe none."""
    path = workdir / "evaluation.json"
    others = [result_line(record) for record in read_results(workdir)[0]]
    if not path.exists():
        return others
    rows = json.loads(path.read_text())["rows"]
    counts = [int(key.removeprefix("labels_")) for key in rows[0] if key.startswith("labels_")]
    return table(rows, tuple(sorted(counts))) + others


def table(rows: list[Row], labels_per_class: tuple[int, ...]) -> list[str]:
    """The rows of an evaluation as lines of text, accuracies in percent."""
    if not rows:
        return []
    counts = [count for count in labels_per_class if f"labels_{count}" in rows[0]]
    header = ["", *(f"{c} label{'s' * (c > 1)}/class" for c in counts), "full linear", "kNN"]
    cells = [header]
    for row in rows:
        few = [f"{100 * row[f'labels_{c}']['mean']:.1f}" for c in counts]
        cells.append([row["name"], *few, f"{100 * row['linear']:.1f}", f"{100 * row['knn']:.1f}"])
    widths = [max(len(line[i]) for line in cells) for i in range(len(header))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    ]
