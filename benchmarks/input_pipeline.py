"""The input pipeline beside lightly's and torchvision's: images per second from image files.

An image counts once, with all of its views. Pipelines take turns, so that a busy machine slows all
alike; medians are printed, how many times lightly's rate each has, and which share of the rate at
which TensorFlow only decodes the files. Files are read again and again: they are in the page cache.

    python benchmarks/input_pipeline.py --images=DIR [--peer-python=PATH] [--rounds=5] [--seconds=6]
        [--batch=32] [--only=decode,simclr,lightly_simclr] [--json=FILE]
    python benchmarks/input_pipeline.py --images=DIR --profile   where the host's time goes
    python benchmarks/input_pipeline.py --device                 time and FLOPs of the device half
    python benchmarks/input_pipeline.py --images=DIR --wait      how long a consumer waits for data
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

ROOT = Path(__file__).parents[1]
SUFFIXES = (".jpg", ".jpeg", ".png")
COLUMNS = (
    *("pipeline", "views", "images/s (median)", "relative to lightly"),
    "share of the decode-only limit",
)
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Row:
    """A pipeline of the table; `beside` is the row of lightly with the same views."""

    pipeline: str
    views: str
    beside: str = ""
    of_peer: bool = False


TWO, MULTICROP = "2×224", "2×224 + 6×96"
ROWS = {
    "decode": Row("limit: decode only", "none"),
    "decode_fast": Row("limit: decode only, fast DCT, plain upscaling", "none"),
    "simclr": Row("ours, host half (SimCLR: tf crops, bicubic)", TWO, "lightly_simclr"),
    "moco": Row("ours, host half (MoCo: antialiased bilinear)", TWO, "lightly_simclr"),
    "simclr_device": Row("ours, host and device half (SimCLR)", TWO, "lightly_simclr"),
    "moco_device": Row("ours, host and device half (MoCo)", TWO, "lightly_simclr"),
    "lightly_simclr": Row("lightly SimCLRTransform, DataLoader", TWO, "lightly_simclr", True),
    "torchvision": Row("torchvision v2, DataLoader", TWO, "lightly_simclr", True),
    "swav": Row("ours, host half (SwAV)", MULTICROP, "lightly_swav"),
    "swav_device": Row("ours, host and device half (SwAV)", MULTICROP, "lightly_swav"),
    "lightly_swav": Row("lightly SwaVTransform, DataLoader", MULTICROP, "lightly_swav", True),
}


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def image_files(folder: Path) -> list[str]:
    """All image files under a folder, sorted."""
    files = sorted(str(f) for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES)
    return files or sys.exit(f"There are no .jpg, .jpeg or .png files under {folder}.")


def rate(
    batches: Iterator[int], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Images per second of what yields numbers of images, once it runs steadily.

    Args:
      batches: of a pipeline just opened; never ends.
      seconds: to count for, after the first batch and a quarter of this time for buffers to fill
        and tuning to settle.
      clock: by which the rate is taken, such as the processors' time; the turn's length is real.
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
    raise RuntimeError("the pipeline ended")


# In the peer's process: no JAX, no TensorFlow.


def tolerate_missing_lightning() -> None:
    """Lets lightly be imported without lightning-utilities, which asks for a version once."""
    with contextlib.suppress(ImportError):
        import lightning_utilities.core.imports  # noqa: F401

        return
    for name in ("lightning_utilities", "lightning_utilities.core"):
        sys.modules[name] = types.ModuleType(name)
    imports = types.ModuleType("lightning_utilities.core.imports")
    imports.RequirementCache = lambda requirement: True
    sys.modules[imports.__name__] = imports


class Photos:
    """Files as a torch data set without end, read by PIL as torchvision's ImageFolder does."""

    def __init__(self, files: Sequence[str], transform: Callable[[Any], list[Any]]) -> None:
        self.files, self.transform = files, transform

    def __len__(self) -> int:
        """More than any turn reads."""
        return 10**9

    def __getitem__(self, number: int) -> list[Any]:
        """All views of an image; the files come round and round."""
        from PIL import Image

        with open(self.files[number % len(self.files)], "rb") as file:
            return self.transform(Image.open(file).convert("RGB"))


class Twice:
    """Two views by one transform."""

    def __init__(self, transform: Callable[[Any], Any]) -> None:
        self.transform = transform

    def __call__(self, image: Any) -> list[Any]:
        """Both views."""
        return [self.transform(image), self.transform(image)]


def peer_transform(name: str) -> Callable[[Any], list[Any]]:
    """What a row of the peer's makes of an image."""
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
    """Sizes of batches as a DataLoader with a worker per core makes them."""
    from torch.utils.data import DataLoader

    photos = Photos(files, peer_transform(name))
    for views in DataLoader(photos, batch_size=batch, num_workers=cores()):
        yield len(views[0])


def serve() -> None:
    """Answers each line "name seconds" with images per second; the first line is what to read."""
    from loss import tolerate_missing_operators

    tolerate_missing_operators()
    tolerate_missing_lightning()
    files, batch = json.loads(sys.stdin.readline())
    for line in sys.stdin:
        name, seconds = line.split()
        with contextlib.closing(peer_batches(name, files, batch)) as batches:
            measured = rate(batches, float(seconds))
        gc.collect()
        # Not before the workers have ended: they would slow down whose turn is next.
        print(measured, flush=True)


class Peer:
    """A process of another interpreter that measures the peers' pipelines on demand."""

    def __init__(self, python: str, files: Sequence[str], batch: int) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--serve"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        print(json.dumps([files, batch]), file=self.process.stdin, flush=True)

    def rate(self, name: str, seconds: float) -> float:
        """Images per second of a row."""
        print(name, seconds, file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        return float(answer) if answer else sys.exit("The peer's process ended; see above.")

    def close(self) -> None:
        """Ends the process."""
        self.process.communicate()


# In this process: TensorFlow and JAX.


def our_config(method: str, images: Path, *changes: str) -> Any:
    """The method's config for ImageNet, reading a folder."""
    from ssl_jax.config import load_config

    file = ROOT / "configs" / f"{method}_imagenet.py"
    return load_config(str(file), ["data.name=folder", f"data.dir={images}", *changes])


def round_robin(num_examples: int, batch: int) -> Iterator[tuple[int, np.ndarray]]:
    """Steps without end, their ids in order, over and over: a folder may hold less than a batch."""
    for step in itertools.count():
        ids = np.arange(step * batch, (step + 1) * batch) % num_examples
        yield step, ids.astype(np.int32)


def host_batches(source: Any, batch: int) -> Iterator[int]:
    """Sizes of the batches of uint8 views that a source yields."""
    for made in source.batches(round_robin(source.num_examples, batch)):
        yield len(made["id"])


def device_batches(source: Any, prepare: Callable[..., Any], batch: int) -> Iterator[int]:
    """The same, then the device half, which works on a batch while the host makes the next."""
    import jax

    key, pending = jax.random.key(0), None
    for made in source.batches(round_robin(source.num_examples, batch)):
        current = prepare(jax.device_put(made), {}, key)
        if pending is not None:
            yield len(jax.block_until_ready(pending)["id"])
        pending = current


def decode_batches(files: Sequence[str], fast: bool, batch: int) -> Iterator[int]:
    """Sizes of batches of one byte per decoded image, a thread for each core."""
    from ssl_jax.data.views import decode, tf

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


def our_pipelines(
    names: Sequence[str], images: Path, batch: int
) -> dict[str, Callable[[], Iterator[int]]]:
    """What opens each of the rows that are not a peer's."""
    import jax

    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.data.sources import make_sources

    files = image_files(images)

    def opener(name: str) -> Callable[[], Iterator[int]]:
        if name in ("decode", "decode_fast"):
            return lambda: decode_batches(files, name == "decode_fast", batch)
        config = our_config(name.removesuffix("_device"), images)
        source, _ = make_sources(config)
        if not name.endswith("_device"):
            return lambda: host_batches(source, batch)
        prepare = jax.jit(make_augment_fn(config))
        return lambda: device_batches(source, prepare, batch)

    return {name: opener(name) for name in names}


def measure(
    names: Sequence[str], images: Path, batch: int, rounds: int, seconds: float, peer_python: str
) -> dict[str, list[float]]:
    """Images per second of each row in each round; a peer's rows only with its interpreter."""
    ours = our_pipelines([name for name in names if not ROWS[name].of_peer], images, batch)
    names = [name for name in names if peer_python or name in ours]
    peer = Peer(peer_python, image_files(images), batch) if len(names) > len(ours) else None
    rates: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(rounds):
        for name in names:
            if name in ours:
                with contextlib.closing(ours[name]()) as batches:
                    rates[name].append(rate(batches, seconds))
            else:
                rates[name].append(peer.rate(name, seconds))
            print(f"{name}: {rates[name][-1]:,.0f} images/s", file=sys.stderr, flush=True)
    if peer is not None:
        peer.close()
    return rates


def rate_table(rates: dict[str, list[float]]) -> list[list[str]]:
    """The rows' cells, from medians over the rounds."""
    medians = {name: statistics.median(values) for name, values in rates.items()}

    def ratio(name: str, other: str, form: str) -> str:
        return format(medians[name] / medians[other], form) if other in medians else ""

    return [
        [
            *(ROWS[name].pipeline, ROWS[name].views, f"{median:,.0f}"),
            *(ratio(name, ROWS[name].beside, ".2f"), ratio(name, "decode", ".0%")),
        ]
        for name, median in medians.items()
    ]


def stages(views: Sequence[Any], seed: int) -> dict[str, Callable[[Any, Any], Any]]:
    """The host's work on an image, cut off after each stage, as functions of step and (id, file).

    Every stage but the last gives one number that depends on all it did, so that nothing is left
    out and nothing large is stacked. Once boxes are drawn, they are for all views: those of views
    that a stage does not cut yet are drawn apart.
    """
    from ssl_jax.data.views import decode, draw_boxes, image_seed, make_views, tf

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
        "draw seeds and boxes": cropped(0),
    }
    done = 0
    for size, group in itertools.groupby(view.size for view in views):
        count = len(list(group))
        done += count
        cuts[f"cut and resize {count}×{size}"] = cropped(done)
    return {**cuts, "stack into batches": whole}


def stage_batches(files: Sequence[str], stage: Callable[..., Any], batch: int) -> Iterator[int]:
    """Sizes of batches from a pipeline in one thread that ends with a stage."""
    from ssl_jax.data.views import tf

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
    """Microseconds of a processor that an image takes: by stage, of it and of all up to it.

    This is the time of all threads of this process, and the least of all rounds: other jobs on the
    machine only add to it. The last stage is what the source's own pipeline, held to one thread,
    needs beside the others.
    """
    from ssl_jax.config import flat_views
    from ssl_jax.data.sources import make_sources

    config = our_config(method, images, "data.threads=1")
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
    """The rows' cells; shares are of the last row's total."""
    whole = list(stages.values())[-1][1]
    return [
        [name, f"{own:,.0f}", f"{total:,.0f}", f"{own / whole:.0%}"]
        for name, (own, total) in stages.items()
    ]


def prepare_flops(config: Any) -> tuple[float, float]:
    """FLOPs of the device half of a batch: as compiled, and with the jitter's loop run in full.

    XLA counts a loop's body once. That of the jitter in random order runs four times; what it
    amounts to is what the program without jitter lacks.
    """
    import jax

    from ssl_jax.config import from_json, to_json
    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.step import batch_shapes

    def flops(config: Any) -> float:
        raw = batch_shapes(config, config.batch_size, labelled=False)
        arguments = (raw, {}, jax.random.key(0))
        program = jax.jit(make_augment_fn(config)).lower(*arguments).compile()
        return program.cost_analysis()["flops"]

    without = from_json(to_json(config))
    for name in without.views:
        without.views[name].jitter.prob = 0.0
    counted = flops(config)
    return counted, counted + 3 * (counted - flops(without))


def step_flops(config: Any) -> float:
    """FLOPs of the whole train step, device half included, as compiled; it is not run."""
    from large_batch import build, shapes_of

    program = build(config)
    return program.lower(*shapes_of(program)).compile().cost_analysis()["flops"]


def device_rows(config: Any, images: int, rounds: int) -> list[list[str]]:
    """Time of the device half of `images` images, and its share of a step by compiled FLOPs.

    Args:
      config: of the run; its batch size is that of the FLOPs.
      images: in the batch that is timed.
      rounds: how often it is timed.
    """
    import jax

    from ssl_jax.data.pipeline import make_augment_fn
    from ssl_jax.step import batch_shapes

    key, rng = jax.random.key(0), np.random.default_rng(0)
    raw = jax.tree.map(
        lambda s: jax.device_put(rng.integers(0, 256, s.shape, np.uint8).astype(s.dtype)),
        batch_shapes(config, images, labelled=False),
    )
    barrier = jax.lax.optimization_barrier
    versions = {}
    for name, replaced in (("", barrier), (", blur fused with what made the image", lambda x: x)):
        jax.lax.optimization_barrier = replaced
        versions[name] = jax.jit(make_augment_fn(config)).lower(raw, {}, key).compile()
    jax.lax.optimization_barrier = barrier
    seconds: dict[str, list[float]] = {name: [] for name in versions}
    for _ in range(rounds + 1):
        for name, prepare in versions.items():
            start = time.perf_counter()
            jax.block_until_ready(prepare(raw, {}, key))
            seconds[name].append(time.perf_counter() - start)
    counted, whole = prepare_flops(config)
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
    """The loop's own prefetcher on SimCLR's views of a folder, placing on the first device."""
    import jax

    from ssl_jax.data.index import Index
    from ssl_jax.data.pipeline import Prefetcher
    from ssl_jax.data.sources import make_sources
    from ssl_jax.spmd import make_spmd

    config = our_config("simclr", images, f"batch_size={batch}")
    source, _ = make_sources(config)
    if source.num_examples < batch:
        sys.exit(f"This takes {batch} images or more, and {images} has {source.num_examples}.")
    place = make_spmd(devices=jax.devices()[:1]).place_batch
    index = Index(source.num_examples, batch, config.seed)
    with Prefetcher(source, index, np.arange(index.batch_size), place, 0, last_step) as batches:
        yield batches


def wait_share(images: Path, batch: int, busy: float, warmup: int, steps: int) -> float:
    """The share of time a consumer waits for data that is busy for some seconds at each step."""
    with prefetching(images, batch, warmup + steps) as batches:
        for step in range(warmup + steps):
            if step == warmup:
                start, waited = time.perf_counter(), batches.wait_seconds
            batches.next()
            time.sleep(busy)
        return (batches.wait_seconds - waited) / (time.perf_counter() - start)


def resident_mib(images: Path, batch: int, marks: Sequence[int]) -> dict[int, float]:
    """This process's resident memory after so many steps of reading."""
    page = os.sysconf("SC_PAGE_SIZE")
    resident = {}
    with prefetching(images, batch, max(marks)) as batches:
        for step in range(1, max(marks) + 1):
            batches.next()
            if step in marks:
                pages = int(Path("/proc/self/statm").read_text().split()[1])
                resident[step] = pages * page / MIB
    return resident


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As Markdown."""
    for row in [header, ["---"] * len(header), *rows]:
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def compare(args: argparse.Namespace) -> None:
    """Measures the rows asked for and prints their table."""
    rates = measure(
        *(args.only or list(ROWS), args.images, args.batch),
        *(args.rounds, args.seconds, args.peer_python),
    )
    print_table(COLUMNS, rate_table(rates))
    print(
        f"{cores()} cores, load {os.getloadavg()[0]:.1f}, batches of {args.batch}, {args.rounds} "
        f"rounds of {args.seconds:g} s. On a CPU the device half shares the cores with the host's."
    )
    if args.json:
        args.json.write_text(json.dumps(rates, indent=1))


def names(text: str) -> list[str]:
    """Rows of the table, as written on the command line."""
    unknown = set(text.split(",")) - set(ROWS)
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(sorted(unknown))}: not among {list(ROWS)}")
    return text.split(",")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=Path, help="folder of image files")
    parser.add_argument("--peer-python", default="", help="interpreter of the peers' environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6, help="of each pipeline in each round")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", type=names, help=f"rows, of {','.join(ROWS)}")
    parser.add_argument("--json", type=Path, help="writes the rates of all rounds to this file")
    parser.add_argument("--profile", action="store_true", help="of simclr, moco, swav, or --only")
    parser.add_argument("--device", action="store_true")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not args.peer_python and any(ROWS[name].of_peer for name in args.only or ()):
        parser.error("--peer-python is missing: give the interpreter of the peers' environment")
    if args.images is None and not (args.device or args.serve):
        parser.error("--images is missing: give a folder of image files")
    return args


def main() -> None:
    """Measures what was asked for; the table of rates where nothing else was."""
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
                header = (f"{method}, one thread", "CPU µs per image", "up to here", "share")
                print_table(header, profile_table(stages))
    if args.device:
        config = our_config("simclr", Path(), "batch_size=8", "dtype=float32")
        print_table(("SimCLR, ResNet-50, 224", ""), device_rows(config, 256, args.rounds))
    if args.wait:
        share = wait_share(args.images, 16, busy=0.1, warmup=5, steps=50)
        print(f"A consumer of 16 images every 100 ms waits {share:.1%} of its time.")
    if args.memory:
        resident = resident_mib(args.images, 8, (200, 500, 1000, 1500, 2000))
        rows = [[f"{step:,}", f"{mib:,.0f}"] for step, mib in resident.items()]
        print_table(("steps of 8 images", "resident, MiB"), rows)
    if not (args.profile or args.device or args.wait or args.memory):
        compare(args)


if __name__ == "__main__":
    main()
