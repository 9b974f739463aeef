"""Which network of a run is evaluated, loaded and exported: DINO's teacher, unless configured."""

import json

import jax
import numpy as np
import pytest
from encoders import same
from tiny import method_config, with_whole_images

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.config import Schedule
from ssl_jax.downstream.features import run_features
from ssl_jax.downstream.finetuning import finetune_config
from ssl_jax.downstream.linear_recipes import linear_config
from ssl_jax.downstream.transfer_learning import transfer_config
from ssl_jax.errors import UserError
from ssl_jax.evals.results import read_evaluation
from ssl_jax.interop.initial_weights import load_initial_weights
from ssl_jax.interop.load import restore_state, weights_at
from ssl_jax.run.log import read_metrics
from ssl_jax.step import assemble, init_state
from ssl_jax.train import pretrain

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps of DINO on digits, after which student and teacher differ clearly."""
    config = with_whole_images(method_config("dino", steps=2))
    config.data.num_classes = 10
    config.dino.update(ema_decay=0.5, block_size=0)
    config.optim.update(lr=0.1, lr_scaling="none")
    config.eval.update(knn_every_epochs=1.0, at_end=True, labels_per_class=(1,))
    workdir = tmp_path_factory.mktemp("dino") / "run"
    pretrain(config, workdir, verbosity="quiet")
    return workdir


@pytest.fixture(scope="module")
def networks(run):
    """Encoders and their statistics in the checkpoint."""
    state = restore_state(run)
    stats, target = state.method_state["batch_stats"], state.method_state["target"]
    found = {"online": (state.params["encoder"], stats["encoder"])}
    found["target"] = (target["encoder"], stats["target"]["encoder"])
    assert not same(found["online"][0], found["target"][0])
    assert not same(found["online"][1], found["target"][1])
    return found


def is_network(encoder, expected):
    return same((encoder.params, encoder.batch_stats), expected)


def test_load_takes_the_target_unless_told(run, networks):
    default, online = ssl_jax.load(run), ssl_jax.load(run, network="online")
    assert is_network(default, networks["target"]) and is_network(online, networks["online"])
    assert is_network(ssl_jax.load(run, network="target"), networks["target"])
    assert repr(default).startswith("Encoder(dino (target network), ")
    assert repr(online).startswith("Encoder(dino (online network), ")
    with pytest.raises(UserError, match="The network to evaluate is 'student'"):
        ssl_jax.load(run, network="student")


def test_both_networks_are_measured_at_the_end_and_in_training(run):
    evaluation = read_evaluation(run / "evaluation.json")
    names = [row.name for row in evaluation.rows]
    assert names == ["raw pixels", "random init", "online network", "dino"]
    assert evaluation.trained.name == "dino"
    assert "DINO is evaluated by its target network." in evaluation.notes
    last = {k: v for record in read_metrics(run / "metrics.jsonl") for k, v in record.items()}
    online, target = (evaluation.find(name).single["knn"] for name in names[2:])
    assert (last["knn_online"], last["knn"]) == (online, target) and online != target
    assert 0 <= last["probe_accuracy"] <= 1
    report = (run / "report.html").read_text()
    assert "online network" in report and "kNN accuracy, online network" in report


def test_features_of_either_network(run):
    by_default = run_features(run, overrides=["data.subset=0.05"])
    for network in ("target", "online"):
        overrides = ["data.subset=0.05", f"eval.network={network}"]
        features = run_features(run, overrides=overrides)
        equal = np.array_equal(features.train, by_default.train)
        assert equal == (network == "target")


def test_exports_and_their_cards_say_which_network_they_have(run, networks, tmp_path, capsys):
    for network, options in (("target", ()), ("online", ("--network=online",))):
        file, folder = tmp_path / f"{network}.safetensors", tmp_path / network
        for kind, out in (("jax", file), ("folder", folder)):
            arguments = [f"--from={run}", f"--format={kind}", f"--out={out}", *options]
            assert cli.main(["export", *arguments]) == 0, capsys.readouterr().err
        encoder = ssl_jax.load(file)
        assert is_network(encoder, networks[network]) and encoder.network == network
        assert is_network(ssl_jax.load(folder / "ssl_jax.safetensors"), networks[network])
        said = {"target": "the target, an average of", "online": "the online one, which was"}
        assert f"Network: {said[network]}" in (folder / "README.md").read_text()
        other = {"target": "online", "online": "target"}[network]
        with pytest.raises(UserError, match=f"has the {network} network only, not the {other}"):
            ssl_jax.load(file, network=other)


@pytest.mark.parametrize(
    "make", [finetune_config, linear_config, transfer_config], ids=lambda make: make.__name__
)
def test_classifiers_start_from_the_network_of_the_config(run, make, networks):
    for network in ("target", "online"):
        config = make(run, overrides=[f"eval.network={network}", "data.num_classes=10"])
        assert (config.init_from.network, config.eval.network) == (network, "default")
    config = make(run, overrides=["data.num_classes=10"])
    assert config.init_from.network == "default"
    if make is finetune_config:
        for network, expected in (("default", "target"), ("online", "online")):
            config.init_from.network = network
            assert same(started(config).params["encoder"], networks[expected][0])


def started(config):
    """The initial state with loaded weights, of which those that aren't loaded are 0."""
    method, optimizer, _ = assemble(config, Schedule(1, 1))
    shapes = jax.eval_shape(lambda: init_state(method, optimizer, config))
    return load_initial_weights(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes), config)


def test_heads_are_loaded_from_the_online_network(run, networks):
    config = with_whole_images(method_config("dino"))
    config.data.num_classes = 10
    config.init_from.update(path=str(run), heads=True)
    state, source = started(config), restore_state(run)
    assert same(state.params, source.params)
    assert same(state.method_state["target"], source.params)


def test_weights_of_a_method_without_target_have_no_network(finished_run):
    assert weights_at(finished_run).network == ""
    with pytest.raises(UserError, match="'simclr' has no target network"):
        weights_at(finished_run, network="target")


def test_config_of_a_run_may_choose_the_online_network(run, networks, tmp_path):
    record = json.loads((run / "config.json").read_text())
    record["config"]["eval"]["network"] = "online"
    copied = tmp_path / "run"
    copied.mkdir()
    (copied / "config.json").write_text(json.dumps(record))
    (copied / "checkpoints").symlink_to(run / "checkpoints")
    assert is_network(ssl_jax.load(copied), networks["online"])
