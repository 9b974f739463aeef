"""`ssl_jax.load`: encoders of runs, hidden layers of the projector, input checks."""

import json

import jax
import numpy as np
import pytest
from encoders import random_encoder
from tiny import method_config, tiny_config

import ssl_jax
from ssl_jax.config import Schedule
from ssl_jax.errors import UserError
from ssl_jax.interop.load import newest_step, restore_state, weights_fingerprint
from ssl_jax.interop.weights import Weights, write_weights
from ssl_jax.methods import make_method
from ssl_jax.run.folder import write_config


def images(n=3):
    return np.random.default_rng(0).integers(0, 256, (n, 8, 8, 3), np.uint8)


def test_projector_layer_returns_that_hidden_layers_output(finished_run):
    encoder, layer = ssl_jax.load(finished_run, projector_layer=0), ssl_jax.load(finished_run)
    assert (encoder.projector_layer, layer.projector_layer) == (0, 1)
    h, z = np.asarray(encoder.apply(images())), np.asarray(layer.apply(images()))
    assert h.shape == (3, 8) and z.shape == (3, 24) and (z >= 0).all() and z.max() > 0
    # Dense, BatchNorm with running statistics and ReLU, computed in float64.
    state = restore_state(finished_run)
    params, stats = state.params["projector"], state.method_state["batch_stats"]["projector"]
    x = h.astype(np.float64) @ np.float64(params["dense1"]["kernel"])
    bn, running = (jax.tree.map(np.float64, tree["bn1"]) for tree in (params, stats))
    x = (x - running["mean"]) / np.sqrt(running["var"] + 1e-5)
    expected = np.maximum(x * bn["scale"] + bn["bias"], 0)
    np.testing.assert_allclose(z, expected, rtol=1e-3, atol=1e-5)


def test_missing_projector_layer_is_refused(finished_run):
    with pytest.raises(
        UserError, match="is 3, but the projector of 'simclr' has hidden layers 1 to 2"
    ):
        ssl_jax.load(finished_run, projector_layer=3)
    config = method_config("supervised")
    config.eval.projector_layer = 1
    with pytest.raises(UserError, match="'supervised' has no hidden layer"):
        make_method(config, Schedule(1, 1))


def test_run_with_nan_weights_is_refused(finished_run, monkeypatch):
    state = restore_state(finished_run)
    kernel = state.params["encoder"]["stem"]["conv1"]["kernel"]
    kernel[0, 0] = np.nan
    monkeypatch.setattr("ssl_jax.interop.load.restore_state", lambda path, step: state)
    with pytest.raises(UserError, match="NaN or infinite values in encoder/stem/conv1/kernel of"):
        ssl_jax.load(finished_run)


def test_repr_is_one_line_with_network_and_parameter_count(finished_run):
    # Three 3×3 convolutions, 3 to 8, 8 to 8 and 8 to 8 channels, each with a BatchNorm of two
    # parameters per channel.
    weights = 9 * (3 * 8 + 2 * 8 * 8) + 2 * 3 * 8
    encoder = ssl_jax.load(finished_run, projector_layer=0)
    assert repr(encoder) == (
        f"Encoder(simclr, ResNet-4 ×0.125, 8 features, {weights:,} parameters, "
        f"step 2 of {str(finished_run)!r})"
    )
    assert encoder.num_features == 8
    layer = ssl_jax.load(finished_run)
    assert "24 features of projector layer 1" in repr(layer) and layer.num_features == 24


def test_newest_weights_are_identified_without_orbax(tmp_path, monkeypatch):
    """By one process of a run; Orbax would wait for the others."""
    write_config(tmp_path, tiny_config(), "")
    with pytest.raises(UserError, match="has no checkpoint yet: wait"):
        newest_step(tmp_path)
    for step in (9, 12):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)
    monkeypatch.setattr("ssl_jax.interop.load.Checkpoints", None)
    assert weights_fingerprint(tmp_path)["step"] == newest_step(tmp_path) == 12


def with_reversed_header(file, out):
    """Writes a safetensors file with the entries of its header in reverse order."""
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(dict(reversed(json.loads(data[8:end]).items()))).encode()
    out.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    return out


def test_weights_of_a_file_are_identified_by_its_arrays(tmp_path):
    """safetensors writes the header in random order, so that exports differ in their bytes."""
    encoder = random_encoder(tiny_config())
    networks = [{"encoder": encoder[kind]} for kind in ("params", "batch_stats")]
    file = tmp_path / "a.safetensors"
    write_weights(Weights(tiny_config(), *networks), file)
    again = with_reversed_header(file, tmp_path / "b.safetensors")
    assert weights_fingerprint(file) == weights_fingerprint(again)
    networks[1] = jax.tree.map(lambda x: x + np.float32(1e-6), networks[1])
    write_weights(Weights(tiny_config(), *networks), again)
    assert weights_fingerprint(file) != weights_fingerprint(again)
