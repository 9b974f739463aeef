"""Which network of a run is evaluated, loaded and exported: DINO's teacher, unless configured."""

import json

import jax
import numpy as np
import pytest
from encoders import same
from tiny import method_config, random_source, with_whole_images

import ssl_jax
from ssl_jax.cli import main as cli
from ssl_jax.config import Schedule, apply_overrides
from ssl_jax.data.sources import make_sources
from ssl_jax.downstream import transfer_learning
from ssl_jax.downstream.features import run_features
from ssl_jax.downstream.finetuning import finetune_config
from ssl_jax.downstream.linear_recipes import linear_config
from ssl_jax.downstream.transfer_learning import transfer_config
from ssl_jax.errors import UserError
from ssl_jax.evals.results import read_evaluation
from ssl_jax.interop.initial_weights import load_initial_weights, resolve_initial_weights
from ssl_jax.interop.load import restore_state, weights_at
from ssl_jax.run.folder import started_config, write_config
from ssl_jax.run.log import read_metrics
from ssl_jax.step import assemble, init_state
from ssl_jax.train import pretrain
from ssl_jax.train.setup import resolve

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


def choosing(run, network, folder):
    """A copy of the run whose config names the network to evaluate."""
    record = json.loads((run / "config.json").read_text())
    record["config"]["eval"]["network"] = network
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "checkpoints").symlink_to(run / "checkpoints")
    return folder


def test_exports_and_their_cards_say_which_network_they_have(run, networks, tmp_path, capsys):
    run = choosing(run, "target", tmp_path / "run")
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
        with pytest.raises(UserError, match=f"is '{other}', but .* has the {network} network only"):
            ssl_jax.load(file, network=other)
    # The last file has another network than the one that its run evaluates.
    assert cli.main(["knn", f"--from={file}", "--config.data.subset=0.05"]) == 0, (
        capsys.readouterr()
    )


@pytest.mark.parametrize(
    "make", [finetune_config, linear_config, transfer_config], ids=lambda make: make.__name__
)
def test_classifiers_start_from_the_network_of_the_config(run, make, networks):
    for network in ("target", "online"):
        config = make(run, overrides=[f"eval.network={network}", "data.num_classes=10"])
        assert (config.init_from.network, config.eval.network) == (network, "default")
    with pytest.raises(UserError, match="is 'online', but config.eval.network is 'target': set"):
        make(run, overrides=["init_from.network=online", "eval.network=target"])
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
    stats, loaded = state.method_state["batch_stats"], source.method_state["batch_stats"]
    assert same(stats["target"], {name: loaded[name] for name in stats["target"]})


def test_weights_of_a_method_without_target_have_no_network(finished_run):
    assert weights_at(finished_run).network == ""
    with pytest.raises(UserError, match="'simclr' has no target network"):
        weights_at(finished_run, network="target")


def test_config_of_a_run_may_choose_the_online_network(run, networks, tmp_path):
    copied = choosing(run, "online", tmp_path / "run")
    assert is_network(ssl_jax.load(copied), networks["online"])


def plain_config(run, overrides=()):
    config = apply_overrides(with_whole_images(method_config("simclr")), overrides)
    config.init_from.path = str(run)
    config.init_from.network, config.eval.network = config.eval.network, "default"
    return config


def begin(config, workdir):
    """Writes the config of a run that has a checkpoint, or compares it with that of the run."""
    config = resolve(config, random_source(n=16, classes=10), started_config(workdir))
    workdir.mkdir(exist_ok=True)
    write_config(workdir, config, "")
    (workdir / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
    return config.init_from.network


@pytest.mark.parametrize(
    "make", [plain_config, finetune_config, transfer_config], ids=lambda make: make.__name__
)
def test_resuming_from_the_other_network_is_refused(run, make, tmp_path):
    def chosen(network, source=run):
        return make(source, overrides=["data.num_classes=10", f"eval.network={network}"])

    assert begin(chosen("default"), tmp_path / "default") == "target"
    for network in ("online", "target"):
        assert begin(chosen(network), tmp_path / network) == network
    for workdir, network in (("default", "online"), ("target", "online"), ("online", "target")):
        other = {"online": "target", "target": "online"}[network]
        with pytest.raises(UserError, match=rf"\(init_from.network: {other} -> {network}\)"):
            begin(chosen(network), tmp_path / workdir)
    with pytest.raises(UserError, match=r"\(init_from.network: online -> target\)"):
        begin(chosen("default"), tmp_path / "online")
    assert begin(chosen("target"), tmp_path / "default") == "target"
    assert begin(chosen("default"), tmp_path / "target") == "target"
    # The evaluated network of the source may change, and the source may be removed.
    source = choosing(run, "online", tmp_path / "run")
    with pytest.raises(UserError, match=r"\(init_from.network: target -> online\)"):
        begin(chosen("default", source), tmp_path / "default")
    moved = chosen("default", source)
    (source / "config.json").unlink()
    assert begin(moved, tmp_path / "target") == "target"
    moved.init_from.network = "online"
    with pytest.raises(UserError, match=r"\(init_from.network: target -> online\)"):
        begin(moved, tmp_path / "target")


def test_fine_tuning_command_refuses_the_folder_of_the_other_network(run, tmp_path, capsys):
    flags = [f"--from={run}", f"--workdir={tmp_path / 'tuned'}", "--config.batch_size=64"]
    config = finetune_config(run, overrides=["batch_size=64", "eval.network=target"])
    train, test = make_sources(config)
    config = resolve(config, train)
    (tmp_path / "tuned").mkdir()
    write_config(tmp_path / "tuned", config, "", train.fingerprint, test.fingerprint)
    (tmp_path / "tuned" / "checkpoints" / "1").mkdir(parents=True)
    assert cli.main(["finetune", *flags, "--config.eval.network=online"]) == 2
    assert "different config (init_from.network: target -> online)" in capsys.readouterr().err


def test_kept_linear_result_of_transfer_is_reused_for_the_same_network_only(
    run, tmp_path, monkeypatch
):
    sets = tmp_path / "sets.json"
    sets.write_text(json.dumps({"digits": {"data": {}}}))
    measured = []
    monkeypatch.setattr(transfer_learning, "run_features", lambda *_, **__: measured.append(1))
    top1 = {"value": 0.5, "low": 0.0, "high": 1.0}
    result = {"top1": top1, "examples": 9}, 1.0
    monkeypatch.setattr(transfer_learning, "linear_metrics", lambda *_, **__: result)
    copied = choosing(run, "target", tmp_path / "run")
    for network, count in (("target", 1), ("default", 1), ("online", 2), ("online", 2)):
        record = json.loads((copied / "config.json").read_text())
        record["config"]["eval"]["network"] = network
        (copied / "config.json").write_text(json.dumps(record))
        listed = transfer_learning.read_sets(sets)
        transfer_learning.transfer(copied, listed, results=tmp_path / "results", rates=())
        assert len(measured) == count


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"heads": True}, "'online', but config.init_from.heads is true, which loads the online"),
        ({"state": "all"}, "'online', but config.init_from.state is 'all', which loads all"),
    ],
)
def test_initial_network_that_would_be_ignored_is_refused(run, changes, words):
    config = with_whole_images(method_config("dino"))
    config.data.num_classes = 10
    config.init_from.update(path=str(run), network="online", **changes)
    with pytest.raises(UserError, match=f"config.init_from.network is {words}"):
        resolve_initial_weights(config)
    config.init_from.network = "default"
    resolve_initial_weights(config)
    assert config.init_from.network == "default"


def test_initial_network_that_the_source_lacks_is_refused_by_its_key(finished_run):
    config = plain_config(finished_run)
    config.init_from.network = "target"
    message = "config.init_from.network is 'target', but a run of 'simclr' has no target network"
    with pytest.raises(UserError, match=message):
        resolve_initial_weights(config)
    message = message.replace("init_from", "eval")
    with pytest.raises(UserError, match=message):
        finetune_config(finished_run, overrides=["eval.network=target"])


@pytest.mark.parametrize("method", ["dino", "byol"])
def test_new_target_starts_with_the_weights_and_statistics_of_the_source(run, networks, method):
    config = with_whole_images(method_config(method))
    config.data.num_classes = 10
    for network in ("online", "target"):
        config.init_from.update(path=str(run), network=network)
        state = started(config)
        stats = state.method_state["batch_stats"]
        assert same((state.params["encoder"], stats["encoder"]), networks[network])
        target = (state.method_state["target"]["encoder"], stats["target"]["encoder"])
        assert same(target, networks[network])
