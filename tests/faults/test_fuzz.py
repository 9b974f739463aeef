"""Thousands of configs and corrupt files: each is valid or a one-line error, never a crash."""

import contextlib
import copy
import functools
import io
import json
import math
import operator
import pickle
import re
import resource
import shutil
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch_files
from flax.traverse_util import flatten_dict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pickles import EXPENSIVE, HOSTILE, Crafted
from PIL import Image
from report_runs import images, map_and_failures, records, write_metrics, write_run
from tiny import METHODS, leaves, method_config, tiny_config, with_two_stages

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.config import apply_overrides, flatten, from_json, to_json
from ssl_jax.data.packed import packed_source
from ssl_jax.errors import UserError
from ssl_jax.interop.export import export_torch, export_tree
from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.infer_architecture import require_complete
from ssl_jax.interop.load import restore_state
from ssl_jax.interop.pickled import read_pickle
from ssl_jax.interop.weights import Weights, read_safetensors
from ssl_jax.report import write_report
from ssl_jax.report.reading import parse_images, read
from ssl_jax.run.checkpoint import damage
from ssl_jax.run.folder import read_config
from ssl_jax.run.log import read_metrics
from ssl_jax.train import pretrain
from ssl_jax.train.setup import Setup

pytestmark = pytest.mark.long
MANY = settings(
    max_examples=2000,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


def assert_clear(error):
    message = str(error)
    assert message and "\n" not in message and len(message) < 1000
    assert message.rstrip()[-1] in ".?)", message


# Configs

KEYS = [key for key in flatten(to_json(tiny_config())) if key not in ("data.dir", "data.test_dir")]
WORDS = [
    "",
    "x",
    "none",
    "cifar",
    "imagenet",
    "moco",
    "swav",
    "byol",
    "simsiam",
    "barlow",
    "supervised",
    "adam",
]
VALUES = st.one_of(
    st.sampled_from(["0", "1", "2", "-1", "0.5", "1e30", "1e-30", "nan", "inf", "True", "false"]),
    st.sampled_from(["()", "(1,)", "(0.1, 0.9)", "(1, 2, 3)", "None", "[]", "{}", "1+1", "'a'"]),
    st.sampled_from(WORDS),
    st.integers(-(2**70), 2**70).map(str),
    st.floats().map(repr),
    st.text(max_size=6),
)
OVERRIDES = st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3)


@MANY
@given(OVERRIDES)
def test_any_override_is_valid_or_a_one_line_error(pairs):
    try:
        config = apply_overrides(tiny_config(), [f"{key}={value}" for key, value in pairs])
    except UserError as error:
        assert_clear(error)
        return
    # Avoids networks that take minutes to trace.
    config.model.depth = min(config.model.depth, 18)
    if config.model.width > 4 or max(v.size * v.count for v in config.views.values()) > 300:
        return
    if (
        max(config.swav.prototypes, config.moco.queue, config.simclr.memory_bank, config.swav.queue)
        > 1e6
    ):
        return
    config.data.num_classes = min(config.data.num_classes, 1000)
    try:
        Setup(config)
    except UserError as error:
        assert_clear(error)


@MANY
@given(st.lists(st.text(max_size=12), min_size=1, max_size=3))
def test_any_argument_gives_exit_code_0_or_2(arguments):
    try:
        code = cli.main(["pretrain", *arguments])
    except SystemExit as left:  # argparse's usage
        code = left.code
    assert code in (0, 2)


# Images


def encoded(kind, seed):
    rng = np.random.default_rng(seed)
    image = Image.fromarray(rng.integers(0, 256, (24, 31, 3), np.uint8))
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


def mutated(data, rng):
    """Flips bits, and deletes, repeats or replaces parts."""
    data = bytearray(data)
    for _ in range(rng.integers(1, 6)):
        at, n = int(rng.integers(0, len(data))), int(rng.integers(1, 40))
        what = rng.integers(0, 5)
        if what == 0:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif what == 1 and len(data) > 2 * n:
            del data[at : at + n]
        elif what == 2:
            data[at:at] = data[at : at + n]
        elif what == 3:
            data[at : at + n] = rng.integers(0, 256, n, np.uint8).tobytes()
        elif len(data) > 20:
            del data[max(at, 10) :]
    return bytes(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "BMP", "GIF"])
def test_corrupt_images_never_crash_the_process(tmp_path, kind):
    pytest.importorskip("tensorflow")
    from ssl_jax.data.sources import make_sources

    rng, good = np.random.default_rng(0), encoded(kind, 0)
    folder = tmp_path / "a"
    folder.mkdir()
    suffix = kind.lower()
    for number in range(1000):
        (folder / f"{number:04}.{suffix}").write_bytes(mutated(encoded(kind, number), rng))
    for number in range(1000, 1100):
        (folder / f"{number:04}.{suffix}").write_bytes(good)
    config = tiny_config()
    config.data.update(name="folder", dir=str(folder), on_bad_image="skip")
    source, _ = make_sources(config)
    steps = iter([(0, np.arange(1100, dtype=np.int32))])
    (batch,) = source.batches(steps)
    assert all(view.shape[1:] == (8, 8, 3) for view in batch["views"])
    assert 100 < len(source.bad) < 1000  # some mutations leave an image
    config.data.on_bad_image = "fatal"
    source, _ = make_sources(config)
    with pytest.raises(UserError) as caught:
        list(source.batches(iter([(0, np.arange(1100, dtype=np.int32))])))
    assert_clear(caught.value)


# Weights and checkpoints


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = with_two_stages(tiny_config(steps=2, batch_size=64))
    workdir = tmp_path_factory.mktemp("run") / "run"
    pretrain(config, workdir)
    return workdir


def haiku(tree):
    """An encoder's parameters or statistics under the names of BYOL's code."""
    leaves = {"kernel": "w", "scale": "scale", "bias": "offset", "mean": "average"}
    found = {}
    for name, value in flatten_dict(tree, sep="/").items():
        block, layer, leaf = name.split("/")
        place = re.sub(r"stage(\d)_block(\d)", lambda m: f"{int(m[1]) - 1}/{int(m[2]) - 1}", block)
        place = re.sub(r"(\d)/(\d)", r"block_group_\1/~/block_\2/~/", place)
        part = layer.replace("bn", "batchnorm")
        part = re.sub(r"\d", lambda m: f"_{int(m[0]) - 1}", part).replace("proj", "shortcut")
        if block == "stem":
            place, part = "", f"initial_{part.removesuffix('_0')}"
        ema = f"/~/{leaf}_ema" if leaf in ("mean", "var") else ""
        module = found.setdefault(f"net/~/{place}{part}{ema}", {})
        module[leaves.get(leaf, "average")] = np.asarray(value)
    return found


def as_pytorch(run, file):
    """Writes an encoder's floats as `torch.save` does."""
    export_torch(run, file.with_suffix(".safetensors"))
    arrays, _ = read_safetensors(file.with_suffix(".safetensors"))
    floats = {k: v for k, v in arrays.items() if v.dtype == np.float32}
    keys = {name: str(number) for number, name in enumerate(floats)}
    state = {name: torch_files.tensor(floats[name], keys[name]) for name in floats}
    torch_files.torch_file(file, state, {keys[name]: floats[name] for name in floats})


@pytest.mark.parametrize("form", ["ssl_jax", "torch's names", "pickle", "pytorch"])
def test_corrupt_weights_are_read_or_a_one_line_error(run, tmp_path, form):
    file = tmp_path / {"pickle": "a.pkl", "pytorch": "a.pth"}.get(form, "a.safetensors")
    if form == "ssl_jax":
        export_tree(run, file)
    elif form == "torch's names":
        export_torch(run, file)
    elif form == "pytorch":
        as_pytorch(run, file)
    else:
        encoder = ssl_jax.load(run)
        trees = [haiku(encoder.params), haiku(encoder.batch_stats)]
        file.write_bytes(pickle.dumps({"experiment_state": trees}, protocol=2))
    read_weights(file)
    data, rng, refused = file.read_bytes(), np.random.default_rng(0), 0
    for _ in range(700):
        file.write_bytes(mutated(data, rng))
        try:
            read_weights(file)
        except UserError as error:
            assert_clear(error)
            refused += 1
    assert refused > 100


def test_corrupt_checkpoints_are_refused_or_restored_exactly(run, tmp_path):
    rng, refused, expected = np.random.default_rng(0), 0, leaves(restore_state(run))
    newest = max((run / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    files = sorted(f.relative_to(run) for f in newest.rglob("*") if f.is_file())
    for number in range(150):
        copy = tmp_path / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(run, copy)
        file = copy / files[number % len(files)]
        file.write_bytes(mutated(file.read_bytes() or b"some bytes", rng))
        try:
            restored = leaves(restore_state(copy))
        except UserError as error:
            assert_clear(error)
            refused += 1
            continue
        # Orbax's metadata may be corrupt, but not the state.
        assert restored.keys() == expected.keys()
        for name in expected:
            np.testing.assert_array_equal(restored[name], expected[name], err_msg=name)
    assert refused > 100


ODD = [None, True, -1, 0, 1.5, 1e308, math.inf, math.nan, 10**400, "", "x", "\ud800", "a" * 9999]
ODD += [[], {}, [1], {"a": 1}, [[[]]], "/dev/zero", "../../etc/passwd", "a\0b"]


def places(value, place=()):
    """The places of all values in a JSON value."""
    yield place
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*place, key))


def replaced(value, rng):
    """A JSON value in which one or two values are odd ones, or are gone."""
    value = {"": copy.deepcopy(value)}
    for _ in range(rng.integers(1, 3)):
        every = [place for place in places(value) if place]
        *path, last = every[rng.integers(len(every))]
        inside = value
        for key in path:
            inside = inside[key]
        if rng.integers(6) or last == "":
            inside[last] = copy.deepcopy(ODD[rng.integers(len(ODD))])
        else:
            del inside[last]
    return value[""]


def nested(rng):
    return "[" * int(rng.integers(1, 200_000))


def reported(workdir):
    """Whether a report is written; else there is a one-line error."""
    try:
        write_report(workdir)
    except UserError as error:
        assert_clear(error)
        return False
    return True


RESULT = {"what": "kNN", "k": 5, "metrics": {"top1": {"value": 0.5, "low": 0.4, "high": 0.6}}}


@pytest.mark.parametrize("name", ["config.json", "evaluation.json", "evals/knn.json"])
def test_reports_of_foreign_json_are_written_or_a_one_line_error(tmp_path, name):
    rng, file = np.random.default_rng(0), tmp_path / name
    derived = {"trivial_loss": 1.5, "patience": 3, "encoder": "ViT"}
    write_run(tmp_path, derived=derived, resumed=[{"step": 3, "derived": derived}])
    (tmp_path / "evals").mkdir()
    (tmp_path / "report_images.npz").unlink()  # the rest of a report takes most of the time
    write_metrics(tmp_path, records(20))
    if name == "evals/knn.json":
        RESULT["metrics"]["examples"] = 9
        file.write_text(json.dumps(RESULT))
    good, written = json.loads(file.read_text()), 0
    for number in range(300):
        file.write_text(nested(rng) if number % 50 == 0 else json.dumps(replaced(good, rng)))
        written += reported(tmp_path)
        if name == "config.json":
            with contextlib.suppress(UserError):
                read_config(tmp_path)
    assert written > 20


def test_reports_of_foreign_logs_are_written(tmp_path):
    rng = np.random.default_rng(0)
    write_run(tmp_path)
    (tmp_path / "report_images.npz").unlink()
    write_metrics(tmp_path, records(60))
    file = tmp_path / "metrics.jsonl"
    good = [json.loads(line) for line in file.read_text().splitlines()]
    seeds = ['{"step": 1e400}', '{"step": 1e400, "loss": 1e400}', '{"step": 1, "loss": 1e400}']
    for number in range(200):
        lines = [replaced(record, rng) if rng.integers(3) else record for record in good]
        data = "\n".join([*seeds, *map(json.dumps, lines), nested(rng)]).encode()
        file.write_bytes(mutated(data, rng) if number % 4 == 0 else data)
        assert reported(tmp_path)
        assert all(record["step"] >= 0 for record in read_metrics(file))


def odd_array(array, rng):
    """An array of another dtype, shape or range."""
    what = rng.integers(7)
    if what == 0:
        numbers = ["u1", "f4", "f8", "i8", "?", "c8"] if array.dtype.kind != "U" else ["S9"]
        return array.astype(["U3", *numbers][rng.integers(1 + len(numbers))])
    if what == 1:
        return array[..., None]
    if what == 2:
        return array[:0] if array.ndim else array
    if what == 3:
        return array[..., :1] if array.ndim else array
    if what == 4:
        return np.concatenate([array, array]) if array.ndim else array
    if what == 5 and array.dtype.kind in "fiu":
        return (array.astype(np.float64) * -1e9).astype(array.dtype)
    return np.full_like(array, np.nan if array.dtype.kind == "f" else 0)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of casts here
def test_reports_of_foreign_images_are_written(tmp_path):
    rng, drawn = np.random.default_rng(0), 0
    write_run(tmp_path)
    file, good = tmp_path / "report_images.npz", images() | map_and_failures()
    for number in range(200):
        arrays = dict(good)
        for name in rng.choice(list(arrays), rng.integers(1, 3), replace=False):
            arrays[name] = odd_array(arrays[name], rng)
            if not rng.integers(8):
                del arrays[name]
        np.savez_compressed(file, **arrays)
        if number % 7 == 0:
            file.write_bytes(mutated(file.read_bytes(), rng))
        assert reported(tmp_path)
        drawn += read(file, parse_images)[0] is not None
    assert 20 < drawn < 180


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of casts here
def test_packed_files_are_read_or_a_one_line_error(tmp_path):
    rng, file, refused = np.random.default_rng(0), tmp_path / "a.npz", 0
    labels, names = np.arange(12) % 3, np.array(["a", "b", "c"])
    pixels = rng.integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
    good = {"images": pixels, "labels": labels, "class_names": names}
    seeds = [np.full(12, -1), labels + 1, labels - 2, labels / 2, np.zeros(12, int), labels[:3]]
    config = tiny_config()
    config.data.update(name="packed", dir=str(file))
    for number in range(1500):
        arrays = dict(good)
        name = list(good)[rng.integers(3)]
        arrays[name] = odd_array(arrays[name], rng)
        if number < len(seeds):
            arrays = good | {"labels": seeds[number]}
        np.savez(file, **arrays)
        if number % 2:
            np.savez(file, **good)
            file.write_bytes(mutated(file.read_bytes(), rng))
        try:
            source = packed_source(config, "dir")
        except UserError as error:
            assert_clear(error)
            refused += 1
            continue
        assert source.images.dtype in (np.uint8, np.uint16)
        assert source.images.shape[-1] == source.channels <= 16
        assert source.labels is None or len(source.labels) == source.num_examples
    assert refused > 100


def test_foreign_checksums_never_lead_out_of_the_checkpoint(tmp_path):
    rng, folder = np.random.default_rng(0), tmp_path / "1"
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "a").write_bytes(b"some bytes")
    (folder / "b").write_bytes(b"")
    crc = zlib.crc32(b"some bytes")
    good = {"d/a": [10, crc], "b": [0, 0]}
    for number in range(1500):
        sums = replaced(good, rng)
        if isinstance(sums, dict) and rng.integers(2):
            odd = ["/dev/zero", "../x", "", "d", "a\0", "\ud800", "x" * 5000, "d/" * 3000]
            sums[odd[number % len(odd)]] = [0, 0]
        (folder / "checksums.json").write_text(json.dumps(sums))
        # A name may be gone.
        intact = isinstance(sums, dict) and sums and sums.items() <= good.items()
        assert (damage(folder) == "") == bool(intact)


def test_pickles_with_budget_are_read_or_a_one_line_error(tmp_path):
    rng, file = np.random.default_rng(0), tmp_path / "a.pkl"
    seeds = [Crafted(part).data for part in (*HOSTILE.values(), *EXPENSIVE.values())]
    seeds += [
        pickle.dumps({"x": np.ones((3, 4)), "y": [1.5, None, {1: "a"}]}, n) for n in (0, 2, 4)
    ]
    small = [seed for seed in seeds if len(seed) < 5000]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for number in range(1500):
        data = small[number % len(small)] if number >= len(seeds) else seeds[number]
        # Two pickles in one share what the first has made.
        other = small[rng.integers(len(small))]
        data = data[:-1] + other[2:] if rng.integers(3) == 0 else data
        file.write_bytes(mutated(data, rng) if number >= len(seeds) else data)
        for read_file in (read_pickle, read_weights):
            try:
                read_file(file)
            except UserError as error:
                assert_clear(error)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


@pytest.mark.parametrize("form", ["ssl_jax", "torch's names"])
def test_safetensors_with_odd_headers_are_read_or_a_one_line_error(run, tmp_path, form):
    rng, file = np.random.default_rng(0), tmp_path / "a.safetensors"
    (export_tree if form == "ssl_jax" else export_torch)(run, file)
    data, refused = file.read_bytes(), 0
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    key = "config" if form == "ssl_jax" else "ssl_jax_config"
    for number in range(400):
        odd = header
        if number % 2:
            config = replaced(json.loads(header["__metadata__"][key]), rng)
            odd = header | {"__metadata__": header["__metadata__"] | {key: json.dumps(config)}}
        else:
            odd = replaced(header, rng)
        text = json.dumps(odd).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        try:
            read_weights(file)
        except UserError as error:
            assert_clear(error)
            refused += 1
    assert refused > 50


@contextlib.contextmanager
def within(seconds):
    def late(*_):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("encoder", ["resnet", "vit"])
@pytest.mark.parametrize("method", [name for name in METHODS if name != "simclr_memory"])
def test_huge_integers_are_refused_before_they_cost_anything(method, encoder):
    config = method_config(method)
    config.model.name = encoder
    config.model.vit.update(width=12, depth=2, heads=2, patch=4)
    plain = to_json(config)
    keys = [key for key, value in flatten(plain).items() if type(value) is int]
    if method != "simclr":  # the others' keys are common
        keys = [key for key in keys if key.split(".")[0] == method]
    assert keys
    for key in keys:
        for number in (10**400, 2**31 - 1, 10**5):
            changed = copy.deepcopy(plain)
            *groups, last = key.split(".")
            functools.reduce(operator.getitem, groups, changed)[last] = number
            with pytest.raises(UserError) as caught, within(seconds=10):
                # Without an array, the file is refused in any case once the shapes are known.
                weights = Weights(from_json(changed), {"encoder": {}}, {})
                require_complete(weights, Path("a.safetensors"))
            assert_clear(caught.value)


def test_corrupt_config_is_read_or_a_one_line_error(run, tmp_path):
    rng = np.random.default_rng(0)
    data = (run / "config.json").read_bytes()
    for _ in range(500):
        copy = tmp_path / "config.json"
        copy.write_bytes(mutated(data, rng))
        try:
            read_config(tmp_path)
        except UserError as error:
            assert_clear(error)
