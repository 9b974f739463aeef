"""Compares the input pipeline with lightly's and torchvision's: images per second from files.

An image counts once, with all its views. Pipelines take turns, so a busy machine slows all of them
alike. Prints medians, the ratio to lightly's rate, and the share of the rate at which TensorFlow
only decodes the files. Files are read repeatedly and come from the page cache.

    python benchmarks/input_pipeline.py --images=DIR [--peer-python=PATH] [--rounds=5] [--seconds=6]
        [--batch=32] [--only=decode,simclr,lightly_simclr] [--json=FILE]
    python benchmarks/input_pipeline.py --images=DIR --profile   host time per stage
    python benchmarks/input_pipeline.py --device                 time and FLOPs of the device half
    python benchmarks/input_pipeline.py --images=DIR --wait      time a consumer waits for data
    python benchmarks/input_pipeline.py --images=DIR --memory    resident memory over 2,000 steps

The peer's environment: torch, lightly, lightly-utils, torchvision, NumPy and Pillow.
"""

import argparse
import contextlib
import dataclasses
import gc
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markdown_table import print_table

ROOT = Path(__file__).parents[1]
SUFFIXES = (".jpg", ".jpeg", ".png")
COLUMNS = (
    *("pipeline", "views", "images/s (median)", "relative to lightly"),
    "share of the decode-only limit",
)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """A pipeline in the table; `lightly_row` is lightly's row with the same views."""

    pipeline: str
    views: str
    lightly_row: str = ""
    of_peer: bool = False


TWO, MULTICROP = "2×224", "2×224 + 6×96"
ROWS = {
    "decode": Row("limit: decode only", "none"),
    "decode_fast": Row("limit: decode only, fast DCT, plain upscaling", "none"),
    "simclr": Row("ssl_jax, host half (SimCLR: tf crops, bicubic)", TWO, "lightly_simclr"),
    "moco": Row("ssl_jax, host half (MoCo: antialiased bilinear)", TWO, "lightly_simclr"),
    "simclr_device": Row("ssl_jax, host and device half (SimCLR)", TWO, "lightly_simclr"),
    "moco_device": Row("ssl_jax, host and device half (MoCo)", TWO, "lightly_simclr"),
    "lightly_simclr": Row("lightly SimCLRTransform, DataLoader", TWO, "lightly_simclr", True),
    "torchvision": Row("torchvision v2, DataLoader", TWO, "lightly_simclr", True),
    "swav": Row("ssl_jax, host half (SwAV)", MULTICROP, "lightly_swav"),
    "swav_device": Row("ssl_jax, host and device half (SwAV)", MULTICROP, "lightly_swav"),
    "lightly_swav": Row("lightly SwaVTransform, DataLoader", MULTICROP, "lightly_swav", True),
}


def cores() -> int:
    """Number of cores available to this process."""
    return len(os.sched_getaffinity(0))


def image_files(folder: Path) -> list[str]:
    """All image files under a folder, sorted."""
    files = sorted(str(f) for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    return files or sys.exit(f"{folder} contains no .jpg, .jpeg or .png files.")


def rate(
    batches: Iterator[int], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Measures the steady rate of a pipeline, in images per second.

    Args:
      batches: batch sizes, from a newly opened endless pipeline.
      seconds: measuring time, after a warmup of the first batch and a quarter of this time, in
        which buffers fill and autotuning settles.
      clock: clock of the rate, such as CPU time; the measuring time is always wall time.
    """
    next(batches)
    opened, images = time.perf_counter(), 0
    for _ in batches:
        if time.perf_counter() - opened >= seconds / 4:
            break
    start, started = time.perf_counter(), clock()
    for size in batches:
        images += size
        if time.perf_counter() - start >= seconds:
            return images / (clock() - started)
    raise RuntimeError("The pipeline ended.")


# In the peer's process: no JAX, no TensorFlow.


def tolerate_missing_lightning() -> None:
    """Lets lightly be imported without lightning-utilities, of which it uses one version check."""
    with contextlib.suppress(ImportError):
        import lightning_utilities.core.imports  # noqa: F401

        return
    for name in ("lightning_utilities", "lightning_utilities.core"):
        sys.modules[name] = types.ModuleType(name)
    imports = types.ModuleType("lightning_utilities.core.imports")
    imports.RequirementCache = lambda requirement: True
    sys.modules[imports.__name__] = imports


class Photos:
    """Files as an endless torch dataset, read with PIL as by torchvision's ImageFolder."""

    def __init__(self, files: Sequence[str], transform: Callable[[Any], list[Any]]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        """More than is read in any turn."""
        return 10**9

    def __getitem__(self, number: int) -> list[Any]:
        """All views of an image; files repeat."""
        from PIL import Image

        with open(self.files[number % len(self.files)], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


class Twice:
    """Makes two views with one transform."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[Any]:
        """Both views."""
        return [self.transform(image), self.transform(image)]


def peer_transform(name: str) -> Callable[[Any], list[Any]]:
    """The transform of a peer's row."""
    import torch
    from lightly.transforms import SimCLRTransform, SwaVTransform
    from torchvision.transforms import v2

    if name == "lightly_simclr":
        return SimCLRTransform(input_size=224)
    if name == "lightly_swav":
        return SwaVTransform()
    steps = [
        v2.RandomResizedCrop(224, scale=(0.08, 1.0)),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.8, 0.8, 0.8, 0.2)], p=0.8),
        v2.RandomGrayscale(p=0.2),
        v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    return Twice(v2.Compose(steps))


def peer_batches(name: str, files: Sequence[str], batch: int) -> Iterator[int]:
    """Batch sizes from a DataLoader with one worker per core."""
    from torch.utils.data import DataLoader

    photos = Photos(files, peer_transform(name))
    for views in DataLoader(photos, batch_size=batch, num_workers=cores()):
        yield len(views[0])


def serve() -> None:
    """Serves measurements: "name seconds" in, images per second out; the first line lists files."""
    from loss import tolerate_missing_operators

    tolerate_missing_operators()
    tolerate_missing_lightning()
    files, batch = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        name, seconds = line.split()
        with contextlib.closing(peer_batches(name, files, batch)) as batches:
            measured = rate(batches, float(seconds))
        gc.collect()
        # After the workers have ended, which would slow down the next turn.
        print(measured, flush=True)


class Peer:
    """A process of another interpreter that measures the peers' pipelines."""

    def __init__(self, python: str, files: Sequence[str], batch: int) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        print(json.dumps([files, batch]), file=self.process.stdin, flush=True)

    def rate(self, name: str, seconds: float) -> float:
        """Images per second of a row."""
        print(name, seconds, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        return float(answer) if answer else sys.exit("The peer's process failed; see above.")

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


# In this process: TensorFlow and JAX.


def make_config(method: str, images: Path, *changes: str) -> Any:
    """The method's config for ImageNet, reading a folder."""
    from ssl_jax.config import load_config

    file = ROOT / "configs" / f"{method}_imagenet.py"
    return load_config(str(file), ["data.name=folder", f"data.dir={images}", *changes])


def round_robin(num_examples: int, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """Endless steps with ids in order, repeated: a folder may have fewer images than a batch."""
    for step in itertools.count():
        ids = np.arange(step * batch, (step + 1) * batch) % num_examples
        yield step, ids.astype(np.int32)


def host_batches(source: Any, batch: int) -> Iterator[int]:
    """Batch sizes of a source's uint8 views."""
    for made in source.batches(round_robin(source.num_examples, batch)):
        yield len(made["id"])


def device_batches(source: Any, augment_fn: Callable[..., Any], batch: int) -> Iterator[int]:
    """Batch sizes after the device half, which runs while the host makes the next batch."""
    import jax

    key, pending = jax.random.key(0), None
    for made in source.batches(round_robin(source.num_examples, batch)):
        current = augment_fn(jax.device_put(made), {}, key)
        if pending is not None:
            yield len(jax.block_until_ready(pending)["id"])
        pending = current


def decode_batches(files: Sequence[str], fast: bool, batch: int) -> Iterator[int]:
    """Batch sizes when images are only decoded, with one thread per core."""
    from ssl_jax.data.tensorflow import tf
    from ssl_jax.data.views import decode

    @tf.autograph.experimental.do_not_convert
    def byte(file: Any) -> Any:
        contents = tf.io.read_file(file)
        if not fast:
            return decode(contents)[0, 0, 0]
        image = tf.io.decode_jpeg(
            contents, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False
        )
        return image[0, 0, 0]

    options = tf.data.Options()
    options.threading.max_intra_op_parallelism = 1
    dataset = tf.data.Dataset.from_tensor_slices(files).repeat().map(byte, cores())
    dataset = dataset.batch(batch).prefetch(1).with_options(options)
    yield from map(len, dataset.as_numpy_iterator())


def open_pipelines(
    names: Sequence[str], images: Path, batch: int
) -> dict[str, Callable[[], Iterator[int]]]:
    """Functions that open the pipelines of ssl_jax's rows."""
    import jax

    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.data.sources import make_sources

    files = image_files(images)

    def opener(name: str) -> Callable[[], Iterator[int]]:
        if name in ("decode", "decode_fast"):
            return lambda: decode_batches(files, name == "decode_fast", batch)
        config = make_config(name.removesuffix("_device"), images)
        source, _ = make_sources(config)
        if not name.endswith("_device"):
            return lambda: host_batches(source, batch)
        augment_fn = jax.jit(make_augment_fn(config))
        return lambda: device_batches(source, augment_fn, batch)

    return {name: opener(name) for name in names}


def measure(
    names: Sequence[str], images: Path, batch: int, rounds: int, seconds: float, peer_python: str
) -> dict[str, list[float]]:
    """Images per second of each row in each round; peers' rows only with `peer_python`."""
    own = open_pipelines([name for name in names if not ROWS[name].of_peer], images, batch)
    names = [name for name in names if peer_python or name in own]
    peer = Peer(peer_python, image_files(images), batch) if len(names) > len(own) else None
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if name in own:
                with contextlib.closing(own[name]()) as batches:
                    rates[name].append(rate(batches, seconds))
            else:
                rates[name].append(peer.rate(name, seconds))
            print(f"{name}: {rates[name][-1]:,.0f} images/s", file=sys.stderr, flush=True)
    if peer is not None:
        peer.close()
    return rates


def rate_table(rates: dict[str, list[float]]) -> list[list[str]]:
    """Table cells from medians over the rounds."""
    medians = {name: statistics.median(values) for name, values in rates.items()}

    def ratio(name: str, other: str, form: str) -> str:
        return format(medians[name] / medians[other], form) if other in medians else ""

    return [
        [
            *(ROWS[name].pipeline, ROWS[name].views, f"{median:,.0f}"),
            *(ratio(name, ROWS[name].lightly_row, ".2f"), ratio(name, "decode", ".0%")),
        ]
        for name, median in medians.items()
    ]


def stages(views: Sequence[Any], seed: int) -> dict[str, Callable[[Any, Any], Any]]:
    """The host's work per image, truncated after each stage, as functions of step and (id, file).

    Every stage but the last returns one number that depends on all its results, so nothing is
    optimized away and nothing large is stacked. Boxes are always sampled for all views: those of
    views that a stage doesn't crop yet are sampled separately.
    """
    from ssl_jax.data.tensorflow import tf
    from ssl_jax.data.views import decode, draw_boxes, image_seed, make_views

    def sizes(file: Any) -> Any:
        return tf.strings.length(tf.io.read_file(file))

    def some(image: Any) -> Any:
        return tf.cast(image[0, 0, 0], tf.int32)

    def cropped(count: int) -> Callable[[Any, Any], Any]:
        def crop(step: Any, example: Any) -> Any:
            image = decode(tf.io.read_file(example[1]))
            key = image_seed(seed, step, example[0])
            numbers = [some(image)]
            if count:
                numbers += map(some, make_views(image, key, views[:count]))
            if count < len(views):
                boxes = draw_boxes(tf.shape(image)[:2], key, views[count:])
                numbers.append(tf.reduce_sum(boxes))
            return tf.add_n(numbers)

        return crop

    def whole(step: Any, example: Any) -> Any:
        image = decode(tf.io.read_file(example[1]))
        return make_views(image, image_seed(seed, step, example[0]), views)

    cuts: dict[str, Callable[[Any, Any], Any]] = {
        "feeding ids and names": lambda step, example: example[0],
        "read": lambda step, example: sizes(example[1]),
        "decode": lambda step, example: some(decode(tf.io.read_file(example[1]))),
        "sample seeds and boxes": cropped(0),
    }
    done = 0
    for size, group in itertools.groupby(view.size for view in views):
        count = len(list(group))
        done += count
        cuts[f"cut and resize {count}×{size}"] = cropped(done)
    return {**cuts, "stack into batches": whole}


def stage_batches(files: Sequence[str], stage: Callable[..., Any], batch: int) -> Iterator[int]:
    """Batch sizes of a single-threaded pipeline that ends with a stage."""
    from ssl_jax.data.tensorflow import tf

    options = tf.data.Options()
    options.threading.max_intra_op_parallelism = 1
    options.threading.private_threadpool_size = 1
    options.autotune.enabled = False  # it would add threads
    examples = (np.arange(len(files), dtype=np.int64), list(files))
    dataset = tf.data.Dataset.from_tensor_slices(examples).repeat().enumerate()
    dataset = dataset.map(tf.autograph.experimental.do_not_convert(stage)).batch(batch)
    for made in dataset.with_options(options).as_numpy_iterator():
        yield len(made[0] if isinstance(made, tuple) else made)


def profile(
    method: str, images: Path, batch: int, rounds: int, seconds: float
) -> dict[str, tuple[float, float]]:
    """CPU microseconds per image: for each stage, its own time and that of all stages so far.

    CPU time of all threads of this process; the minimum over the rounds, because other jobs on the
    machine only add to it. The last stage is the overhead of the source's own pipeline, limited to
    one thread.
    """
    from ssl_jax.config import flat_views
    from ssl_jax.data.sources import make_sources

    config = make_config(method, images, "data.threads=1")
    source, _ = make_sources(config)
    files = image_files(images)

    def opener(stage: Callable[..., Any]) -> Callable[[], Iterator[int]]:
        return lambda: stage_batches(files, stage, batch)

    cuts = stages(flat_views(config), config.seed)
    openers = {name: opener(stage) for name, stage in cuts.items()}
    openers["the source's own pipeline"] = lambda: host_batches(source, batch)
    times: dict[str, list[float]] = {name: [] for name in openers}
    for _ in range(rounds):
        for name, open_ in openers.items():
            with contextlib.closing(open_()) as batches:
                times[name].append(1e6 / rate(batches, seconds, time.process_time))
    least = {name: min(values) for name, values in times.items()}
    before = [0.0, *least.values()]
    return {
        name: (total - earlier, total)
        for (name, total), earlier in zip(least.items(), before[:-1], strict=True)
    }


def profile_table(stages: dict[str, tuple[float, float]]) -> list[list[str]]:
    """Table cells; shares are relative to the last row's total."""
    whole = list(stages.values())[-1][1]
    return [
        [name, f"{own:,.0f}", f"{total:,.0f}", f"{own / whole:.0%}"]
        for name, (own, total) in stages.items()
    ]


def augment_flops(config: Any) -> tuple[float, float]:
    """FLOPs of the device half of a batch: as compiled, and with all iterations of the jitter loop.

    XLA counts the body of a loop once, but the loop of the jitter in random order runs four times.
    Its FLOPs are the difference to the program without jitter.
    """
    import jax

    from ssl_jax.config import from_json, to_json
    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.step import batch_shapes

    def flops(config: Any) -> float:
        raw = batch_shapes(config, config.batch_size, labeled=False)
        arguments = (raw, {}, jax.random.key(0))
        program = jax.jit(make_augment_fn(config)).lower(*arguments).compile()
        return program.cost_analysis()["flops"]

    without = from_json(to_json(config))
    for name in without.views:
        without.views[name].jitter.prob = 0.0
    counted = flops(config)
    return counted, counted + 3 * (counted - flops(without))


def step_flops(config: Any) -> float:
    """FLOPs of the whole train step, device half included, from its compilation."""
    from large_batch import build, shapes_of

    program = build(config)
    return program.lower(*shapes_of(program)).compile().cost_analysis()["flops"]


def device_rows(config: Any, images: int, rounds: int) -> list[list[str]]:
    """Time of the device half for `images` images, and its share of a step in compiled FLOPs.

    Args:
      config: the run's config; its batch size is used for the FLOPs.
      images: size of the timed batch.
      rounds: number of timings.
    """
    import jax

    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.step import batch_shapes

    key, rng = jax.random.key(0), np.random.default_rng(0)
    raw = jax.tree.map(
        lambda s: jax.device_put(rng.integers(0, 256, s.shape, np.uint8).astype(s.dtype)),
        batch_shapes(config, images, labeled=False),
    )
    barrier = jax.lax.optimization_barrier
    versions = {}
    for name, replaced in (("", barrier), (", blur fused with its input", lambda x: x)):
        jax.lax.optimization_barrier = replaced
        versions[name] = jax.jit(make_augment_fn(config)).lower(raw, {}, key).compile()
    jax.lax.optimization_barrier = barrier
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(rounds + 1):
        for name, augment_fn in versions.items():
            start = time.perf_counter()
            jax.block_until_ready(augment_fn(raw, {}, key))
            seconds[name].append(time.perf_counter() - start)
    counted, whole = augment_flops(config)
    step = step_flops(config) + whole - counted
    views, n = len(raw["views"]), config.batch_size
    return [
        *(
            [f"ms for {views * images} views{name}", f"{1e3 * statistics.median(taken[1:]):,.0f}"]
            for name, taken in seconds.items()
        ),
        [f"GFLOP of the device half, {n} images", f"{whole / 1e9:.3g}"],
        [f"GFLOP of the train step, {n} images", f"{step / 1e9:.3g}"],
        ["share of the step", f"{whole / step:.2%}"],
    ]


@contextlib.contextmanager
def prefetching(images: Path, batch: int, last_step: int) -> Iterator[Any]:
    """The train loop's prefetcher on SimCLR's views of a folder, for the first device."""
    import jax

    from ssl_jax.data.index import Index
    from ssl_jax.data.pipeline import Prefetcher
    from ssl_jax.data.sources import make_sources
    from ssl_jax.spmd import make_spmd

    config = make_config("simclr", images, f"batch_size={batch}")
    source, _ = make_sources(config)
    if source.num_examples < batch:
        sys.exit(f"{images} has {source.num_examples} images. Give at least {batch}.")
    place = make_spmd(devices=jax.devices()[:1]).place_batch
    index = Index(source.num_examples, batch, config.seed)
    with Prefetcher(source, index, np.arange(index.batch_size), place, 0, last_step) as batches:
        yield batches


def wait_share(images: Path, batch: int, busy: float, warmup: int, steps: int) -> float:
    """The share of its time that a consumer, busy for some seconds per step, waits for data."""
    with prefetching(images, batch, warmup + steps) as batches:
        for step in range(warmup + steps):
            if step == warmup:
                start, waited = time.perf_counter(), batches.wait_seconds
            batches.next()
            time.sleep(busy)
        return (batches.wait_seconds - waited) / (time.perf_counter() - start)


def resident_mib(images: Path, batch: int, marks: Sequence[int]) -> dict[int, float]:
    """This process's resident memory in MiB after some numbers of steps."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = {}
    with prefetching(images, batch, max(marks)) as batches:
        for step in range(1, max(marks) + 1):
            batches.next()
            if step in marks:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident[step] = pages * page / MIB
    return resident


def compare(args: argparse.Namespace) -> None:
    """Measures the requested rows and prints their table."""
    rates = measure(
        *(args.only or list(ROWS), args.images, args.batch),
        *(args.rounds, args.seconds, args.peer_python),
    )
    print_table(COLUMNS, rate_table(rates))
    print(
        f"{cores()} cores, load {os.getloadavg()[0]:.1f}, batches of {args.batch}, {args.rounds} "
        f"rounds of {args.seconds:g} s. On a CPU both halves share the cores."
    )
    if args.json:
        args.json.write_text(json.dumps(rates, indent=1))


def names(text: str) -> list[str]:
    """Parses the names of rows from the command line."""
    unknown = set(text.split(",")) - set(ROWS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))} not in {list(ROWS)}")
    return text.split(",")


def parse_arguments() -> argparse.Namespace:
    """Parses the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of image files")
    parser.add_argument(
        "--peer-python", default="", help="Python interpreter of the peers' environment"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=6, help="measuring time per pipeline and round"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", type=names, help=f"rows to measure: {','.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="write the rates of all rounds to this file")
    parser.add_argument(
        "--profile", action="store_true", help="profile simclr, moco and swav, or --only"
    )
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.peer_python and any(ROWS[name].of_peer for name in args.only or ()):
        parser.error("--peer-python is missing. Give the interpreter of the peers' environment.")
    if args.images is None and not (args.device or args.serve):
        parser.error("--images is missing. Give a folder of image files.")
    return args


def main() -> None:
    """Runs the requested measurements, by default the table of rates."""
    args = parse_arguments()
    if args.serve:
        serve()
        return
    from ssl_jax.cli.backend import tune_cpu

    tune_cpu()
    if args.profile:
        for method in ("simclr", "moco", "swav"):
            if not args.only or method in args.only:
                stages = profile(method, args.images, args.batch, args.rounds, args.seconds)
                header = (f"{method}, one thread", "CPU µs per image", "cumulative", "share")
                print_table(header, profile_table(stages))
    if args.device:
        config = make_config("simclr", Path(), "batch_size=8", "dtype=float32")
        print_table(("SimCLR, ResNet-50, 224", ""), device_rows(config, 256, args.rounds))
    if args.wait:
        share = wait_share(args.images, 16, busy=0.1, warmup=5, steps=50)
        print(f"A consumer of 16 images per 100 ms waits {share:.1%} of its time.")
    if args.memory:
        resident = resident_mib(args.images, 8, (200, 500, 1000, 1500, 2000))
        rows = [[f"{step:,}", f"{mib:,.0f}"] for step, mib in resident.items()]
        print_table(("steps of 8 images", "resident, MiB"), rows)
    if not (args.profile or args.device or args.wait or args.memory):
        compare(args)


if __name__ == "__main__":
    main()
