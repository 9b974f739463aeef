"""Every config file loads, is valid, builds its method and says what it costs."""

import ast
from pathlib import Path

import jax
import pytest

from ssl_jax.config import Schedule, flat_views, load_config
from ssl_jax.step import assemble, example_batch

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
VARIANTS = {
    "simclr_imagenet": ["8192"],
    "simclrv2_imagenet": ["r50sk", "r152w3sk"],
    "moco_imagenet": ["v1"],
    "swav_imagenet": ["256"],
    "byol_imagenet": ["40", "100", "300"],
}
ALL = [(file, v) for file in FILES for v in ["", *VARIANTS.get(file.stem, [])]]


@pytest.mark.parametrize(("file", "variant"), ALL, ids=lambda x: getattr(x, "stem", x))
def test_it_builds(file, variant):
    config = load_config(f"{file}:{variant}" if variant else str(file))
    config.data.num_classes = 10
    method, optimizer, rate = assemble(config, Schedule(5004, 5004 * 10))
    params, extra = jax.eval_shape(method.init, jax.random.key(0), example_batch(config))
    jax.eval_shape(optimizer.init, params)
    outputs, _ = jax.eval_shape(
        method.forward, params, extra, example_batch(config), jax.random.key(0)
    )
    assert outputs["embedding"].shape == (2, method.encoder.num_features)
    assert float(rate(5004 * 11)) <= config.optim.lr * config.batch_size


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_its_docstring_tells_what_it_is(file):
    docstring = ast.get_docstring(ast.parse(file.read_text()))
    assert len(docstring.splitlines()) >= 3
    if file.stem.endswith("_imagenet"):
        for word in ("Paper", "Published", "Cost", "folders"):
            assert word in docstring


def test_multi_crop_is_the_papers():
    config = load_config(str(ROOT / "configs/swav_imagenet.py"))
    assert [view.size for view in flat_views(config)] == [224] * 2 + [96] * 6


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("simclr_imagenet", 4.8),
        ("simclrv2_imagenet", 6.4),
        ("moco_imagenet", 0.03),
        ("swav_imagenet", 4.8),
        ("byol_imagenet", 3.2),
        ("simsiam_imagenet", 0.1),
    ],
)
def test_the_peak_learning_rate_is_the_published_one(name, peak):
    config = load_config(str(ROOT / f"configs/{name}.py"))
    _, _, rate = assemble(config, Schedule(312, 312 * 1000))
    warmup = round(config.optim.warmup_epochs * 312)
    assert float(rate(warmup)) == pytest.approx(peak, rel=1e-5)
