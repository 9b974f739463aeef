"""Reading images for evaluation: one tf.data pipeline per pass, and one per batch.

Photographs of smooth noise are written to a temporary folder, 500×375 pixels. Both ways decode and
crop them with the same functions and threads, in alternation, so that a busy machine slows both
alike.

    python benchmarks/evaluation_images.py [--images=2000] [--batch=256] [--rounds=3]
"""

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEIGHT = 500, 375


def write_photographs(folder: Path, count: int) -> None:
    """Writes JPEG files of smooth noise with some grain."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), np.uint8))
        smooth = np.asarray(coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC), np.int16)
        grain = rng.integers(-12, 13, (HEIGHT, WIDTH, 1), np.int16)
        pixels = np.clip(smooth + grain, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:06}.jpg", quality=90)


def make_config(folder: Path) -> Any:
    """Returns SimCLR's ImageNet views of the folder's images."""
    from ssl_jax.config import default_config

    config = default_config()
    config.data.update(name="folder", dir=str(folder))
    return config


def one_pipeline(config: Any, batch: int) -> Iterator[np.ndarray]:
    """Yields the batches of a new source's evaluation."""
    from ssl_jax.data.folder import FolderSource

    source = FolderSource(config)
    yield from source.eval_batches(iter(in_batches(source.num_examples, batch)))


def pipeline_per_batch(config: Any, batch: int) -> Iterator[np.ndarray]:
    """Yields the same batches, each from a pipeline of its own."""
    from ssl_jax.config import flat_views
    from ssl_jax.data import views
    from ssl_jax.data.folder import FolderSource
    from ssl_jax.data.tensorflow import tf

    source, options, threads = FolderSource(config), config.eval, len(os.sched_getaffinity(0))
    view = flat_views(config)[0]
    for ids in in_batches(source.num_examples, batch):

        @tf.autograph.experimental.do_not_convert
        def prepare(file: Any) -> Any:
            image = views.decode(tf.io.read_file(file))
            return views.center_crop(image, view, options.crop_fraction, options.interpolation)

        settings = tf.data.Options()
        settings.threading.max_intra_op_parallelism = 1
        settings.threading.private_threadpool_size = threads
        files, _ = source.handles(ids)
        spec = tf.TensorSpec([len(ids)], tf.string)
        dataset = tf.data.Dataset.from_generator(
            lambda files=files: iter([files]), output_signature=spec
        )
        dataset = dataset.unbatch().map(prepare, num_parallel_calls=threads).batch(len(ids))
        yield next(dataset.prefetch(1).with_options(settings).as_numpy_iterator())


def in_batches(count: int, batch: int) -> list[np.ndarray]:
    """Returns the ids of all images in batches, the last one smaller."""
    return np.split(np.arange(count, dtype=np.int32), range(batch, count, batch))


def seconds_of(batches: Iterator[np.ndarray]) -> tuple[float, int]:
    """Returns the seconds of a pass and a checksum of its images."""
    start, checksum = time.perf_counter(), 0
    for images in batches:
        checksum += int(images.sum(dtype=np.int64))
    return time.perf_counter() - start, checksum


def main() -> None:
    """Prints a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    ways: dict[str, Callable[[Any, int], Iterator[np.ndarray]]] = {
        "one pipeline (ssl_jax)": one_pipeline,
        "one pipeline per batch": pipeline_per_batch,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    checksums = set()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), args.images)
        config = make_config(Path(folder))
        for repeated in range(args.rounds + 1):
            for name, way in ways.items():
                taken, checksum = seconds_of(way(config, args.batch))
                checksums.add(checksum)
                if repeated:  # the first imports TensorFlow
                    seconds[name].append(taken)
    assert len(checksums) == 1, "the images differ"
    print(f"{args.images:,} images, batches of {args.batch}\n")
    print("| | seconds (median) | images/s | times ssl_jax |\n| --- | --- | --- | --- |")
    medians = {name: statistics.median(taken) for name, taken in seconds.items()}
    for name, median in medians.items():
        ratio = median / next(iter(medians.values()))
        print(f"| {name} | {median:.2f} | {args.images / median:,.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
