"""Inputs for evaluation and export tests: a finished run, and random encoders."""

import json
import shutil

import jax
import numpy as np
from tiny import tiny_config, without_color

from ssl_jax.config import Schedule
from ssl_jax.models import make_encoder
from ssl_jax.step import assemble, init_state
from ssl_jax.train import pretrain


def pretrain_simclr(workdir):
    """Runs two steps of SimCLR v2 on digits, evaluated on the first layer of its projector."""
    config = without_color(tiny_config(steps=2, batch_size=64, seed=7))
    config.simclr.update(layers=3, hidden=24)
    config.views.view2.gray = 0.25
    config.eval.update(projector_layer=1, at_end=True)
    pretrain(config, workdir)
    return workdir


def copy_run(run, workdir):
    """Copies a run so that a test can change it, and evaluates the encoder in the copy."""
    shutil.copytree(run, workdir)
    record = json.loads((workdir / "config.json").read_text())
    record["config"]["eval"] |= {"projector_layer": 0, "at_end": False}
    (workdir / "config.json").write_text(json.dumps(record))
    return workdir


def random_encoder(config, seed=0):
    """Returns positive random parameters and running statistics, on the host."""
    module, rng = make_encoder(config), np.random.default_rng(seed)
    key = jax.eval_shape(lambda: jax.random.key(0))
    shapes = jax.eval_shape(lambda k: module.init(k, np.zeros((1, 8, 8, 3)), train=False), key)
    return jax.tree.map(lambda x: rng.uniform(0.5, 1, x.shape).astype(np.float32), shapes)


def blank_state(config):
    """Returns a train state of zeros, with the shapes of a run's initial state."""
    method, optimizer, _ = assemble(config, Schedule(1, 10))
    shapes = jax.eval_shape(lambda: init_state(method, optimizer, config))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


def same(a, b):
    """Returns whether the leaves of two trees are bit-identical."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)
