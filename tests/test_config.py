"""Config files, overrides, validation and the JSON form of configs."""

import json
import re

import pytest

from ssl_jax.cli import main as cli
from ssl_jax.config import (
    apply_overrides,
    default_config,
    differences,
    flat_views,
    from_json,
    is_due,
    load_config,
    register_options,
    run_schedule,
    schema_keys,
    to_json,
    validate,
    view,
)
from ssl_jax.errors import UserError
from ssl_jax.schema import SCHEMA, Bounds, Key


@pytest.fixture
def config_file(tmp_path):
    def write(body, header="from ssl_jax.config import default_config, view"):
        path = tmp_path / "experiment.py"
        lines = "\n".join(f"    {line}" for line in body.splitlines())
        path.write_text(
            f"{header}\ndef get_config(variant=''):\n    config = default_config()\n"
            f"{lines}\n    return config\n"
        )
        return str(path)

    return write


def test_defaults_are_valid_and_survive_a_json_round_trip():
    config = default_config()
    validate(config)
    again = from_json(json.loads(json.dumps(to_json(config))))
    assert to_json(again) == to_json(config)
    assert again.optim.step_epochs == ()


def test_named_views_survive_a_json_round_trip():
    config = default_config()
    config.views = {"a": view(size=96, count=2, crop={"area": (0.05, 0.14)}), "b": view()}
    again = from_json(to_json(config))
    assert [v.size for v in flat_views(again)] == [96, 96, 224]
    assert again.views.a.crop.area == (0.05, 0.14)


def test_overrides_take_the_type_of_their_key(config_file):
    path = config_file("config.epochs = 3.0")
    overrides = ["optim.lr=1", "views.view1.size=96", "eval.labels_per_class=(1, 2)"]
    config = load_config(path, [*overrides, "model.sk=true", "data.dir=1/2"])
    assert (config.epochs, config.optim.lr, config.views.view1.size) == (3.0, 1.0, 96)
    assert config.eval.labels_per_class == (1, 2)
    assert config.model.sk is True
    assert config.data.dir == "1/2"


def test_variant_is_passed_to_get_config(tmp_path):
    path = tmp_path / "experiment.py"
    path.write_text(
        "from ssl_jax.config import default_config\n"
        "def get_config(variant='512'):\n"
        "    config = default_config()\n    config.batch_size = int(variant)\n    return config\n"
    )
    assert load_config(str(path)).batch_size == 512
    assert load_config(f"{path}:64").batch_size == 64


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("batchsize=3", ["batchsize", "Did you mean 'batch_size'"]),
        ("optim.lrr=3", ["config.optim", "lrr", "'lr'"]),
        ("optim=3", ["config.optim", "group"]),
        ("optim.lr.x=3", ["config.optim.lr", "no key 'x'"]),
        ("batch_size=2.5", ["config.batch_size", "an integer", "2.5"]),
        ("batch_size=many", ["config.batch_size", "many"]),
        ("batch_size=0", ["config.batch_size", "positive"]),
        ("batch_size", ["--config.batch_size=VALUE"]),
        ("spmd=pmapp", ["config.spmd", "Did you mean 'pmap'"]),
        ("views.view1.crop.area=(0.5, 0.1)", ["config.views.view1.crop.area"]),
        ("views.view1.flip=1.5", ["config.views.view1.flip", "from 0 to 1"]),
        ("views.view1.mean=(0.5,)", ["config.views.view1", "three"]),
        ("simclr.temperature=0.0", ["config.simclr.temperature", "positive"]),
        ("epochs=-1.0", ["config.epochs"]),
        ("checkpoint.keep=0", ["config.checkpoint.keep"]),
        ("checkpoint.every_epochs=-1.0", ["config.checkpoint.every_epochs", "from 0 to"]),
        ("seed=-1", ["config.seed", "0 to 4294967295"]),
        ("seed=4294967296", ["config.seed"]),
        ("optim.momentum=7.0", ["config.optim.momentum", "0 to 1"]),
        ("optim.lr=1e999", ["config.optim.lr"]),
        ("eval.labels_per_class=(0,)", ["config.eval.labels_per_class", "positive"]),
        ("eval.labels_per_class=('a',)", ["config.eval.labels_per_class"]),
        ("views.view1.crop.area=(0.1, 0.5, 1.0)", ["config.views.view1.crop.area"]),
        ("views.view1.blur.sigma=(0.0, 1.0)", ["config.views.view1.blur.sigma"]),
        ("views.view1.crop.aspect=('x', 1.0)", ["config.views.view1.crop.aspect"]),
        ("data.test_fraction=1.0", ["config.data.test_fraction", "above 0 and below 1"]),
        ("data.subset=0.0", ["config.data.subset", "above 0 and at most 1"]),
        ("data.name=folders", ["config.data.name is 'folders'", "Did you mean 'folder'"]),
        ("optim.name=lasr", ["config.optim.name is 'lasr'", "Did you mean 'lars'"]),
        ("optim.schedule=x", ["config.optim.schedule", "Use one of: cosine, step, constant"]),
        ("views.view1.crop.sampler=random", ["config.views.view1.crop.sampler", "torchvision"]),
        ("views.view1.count=0", ["config.views.view1.count", "from 1 to 1024"]),
        ("simclr.layers=1000000", ["config.simclr.layers", "from 0 to 64"]),
        ("moco.layers=1000000", ["config.moco.layers", "from 1 to 64"]),
        ("supervised.projector_layer=1000000", ["projector_layer", "from 0 to 64"]),
        ("model.vit.depth=1000000", ["config.model.vit.depth", "from 1 to 256"]),
        ("distill.projector_layer=1000000", ["config.distill.projector_layer", "from 0 to 64"]),
        ("views.view1.size=5000", ["config.views.view1.size is 5000", "16777216 pixels"]),
        ("views.view1.blur.sigma=(1.0, 1e999)", ["config.views.view1.blur.sigma", "too large"]),
        ("data.threads=100000", ["config.data.threads", "from 0 to 1024"]),
        ("swav.iterations=0", ["config.swav.iterations is 0", "from 1 to 100"]),
        ("swav.iterations=1000000", ["config.swav.iterations", "from 1 to 100"]),
        ("views.view1.blur.kernel_size=1000000", ["blur.kernel_size", "from 0 to 1023"]),
        ("eval.trials=1000000", ["config.eval.trials", "from 1 to 10000"]),
        ("eval.batch_size=2000000", ["config.eval.batch_size", "from 1 to 1048576"]),
        ("moco.hidden=2147483648", ["config.moco.hidden", "at most 2147483647"]),
        ("moco.hidden=-2147483648", ["config.moco.hidden", "at least 0"]),
        ("eval.labels_per_class=(2147483648,)", ["config.eval.labels_per_class", "at most"]),
    ],
)
def test_invalid_override_error_is_one_line_and_names_the_key(config_file, override, words):
    with pytest.raises(UserError) as caught:
        load_config(config_file("pass"), [override])
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("config.batchsize = 3", ["batchsize", "batch_size"]),
        ("config.batch_size = 'x'", ["batch_size"]),
        ("view(sise=3)", ["'sise'", "'size'"]),
        ("config.nothing.more = 3", ["nothing"]),
        ("return None", ["get_config", "ConfigDict"]),
        ("config.epochs = = 3", ["not valid Python", "line 4"]),
        ("import nowhere", ["nowhere"]),
        ("config.epochs = unknown", ["unknown"]),
    ],
)
def test_invalid_config_file_error_is_one_line_and_names_the_cause(config_file, body, words):
    with pytest.raises(UserError) as caught:
        load_config(config_file(body))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400
    for word in words:
        assert word in message


def test_missing_config_file_is_refused_by_name():
    with pytest.raises(UserError, match="no config file nowhere.py"):
        load_config("nowhere.py")


def test_config_file_without_get_config_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("")
    with pytest.raises(UserError, match="does not define get_config"):
        load_config(str(path))


def test_total_steps_follow_from_epochs_images_or_steps():
    config = default_config()
    config.batch_size, config.epochs = 256, 10.0
    assert run_schedule(config, 1000).steps_per_epoch == 3
    assert run_schedule(config, 1000).total_steps == 30
    config.count_steps = "images"  # BYOL: N * epochs // B
    assert run_schedule(config, 1000).total_steps == 1000 * 10 // 256
    config.count_steps = "images_plus_1"  # SimCLR: one more
    assert run_schedule(config, 1000).total_steps == 1000 * 10 // 256 + 1
    config.steps = 7
    assert run_schedule(config, 1000).total_steps == 7


@pytest.mark.parametrize("count_steps", ["epochs", "images", "images_plus_1"])
def test_steps_fit_into_31_bits(count_steps):
    config = default_config()
    config.update(batch_size=256, epochs=1e9, count_steps=count_steps)
    with pytest.raises(UserError, match=r"config.epochs is 1000000000.0, .* 2147483647 steps"):
        run_schedule(config, 1000)
    config.steps = 7
    assert run_schedule(config, 1000).steps(1e9) == 2**31 - 1  # such as a warmup


def test_batch_larger_than_the_training_set_is_refused():
    config = default_config()
    with pytest.raises(UserError, match="config.batch_size is 256 .* only 100 images"):
        run_schedule(config, 100)


@pytest.mark.parametrize(
    ("step", "every", "due"), [(0, 5, False), (5, 5, True), (6, 5, False), (5, 0, False)]
)
def test_is_due_at_positive_multiples(step, every, due):
    assert is_due(step, every) is due


def test_defaults_are_within_their_bounds_and_choices():
    for name, key in schema_keys().items():
        key.require(name, key.default)
        assert key.doc, name


@pytest.mark.parametrize(
    ("key", "allowed"),
    [
        ("views.*.crop.area", False),  # (low, high)
        ("views.*.blur.sigma", False),
        ("views.*.size", False),
        ("data.range", True),  # the default: all values
        ("eval.labels_per_class", True),  # none is measured
    ],
)
def test_empty_tuple_is_refused_unless_it_has_a_meaning(key, allowed):
    if allowed:
        schema_keys()[key].require(key, ())
        return
    with pytest.raises(UserError, match=re.escape(f"{key} is (): write")):
        schema_keys()[key].require(key, ())


@pytest.mark.parametrize("name", ["folder", "packed", "records", "tfds", "hf", "digits"])
def test_separator_of_labels_is_refused_where_nothing_is_separated(name):
    flags = [f"data.name={name}", "data.label_separator=;"]
    words = f"config.data.label_separator is ';', but .* config.data.name is '{name}'. Set"
    with pytest.raises(UserError, match=words):
        apply_overrides(default_config(), flags)
    apply_overrides(default_config(), ["data.name=paths", flags[1]])


def test_values_that_would_fail_late_are_refused():
    for key, value in (
        ("eval.interpolation", "foo"),
        ("optim.final_lr", -1.0),
        ("views.*.jitter.hue", float("nan")),
        ("views.*.blur.kernel_size", -3),
        ("simclr.out", 0),
        ("byol.loss_scale", 0.0),
    ):
        with pytest.raises(UserError, match=f"^{re.escape(key)} is {value!r}"):
            schema_keys()[key].require(key, value)


@pytest.mark.parametrize(
    ("bounds", "text", "inside", "outside"),
    [
        (Bounds(0, open_low=True), "positive", [1e-9, 1e99], [0, -1, float("nan"), True]),
        (Bounds(1), "at least 1", [1, 7], [0, 0.5]),
        (Bounds(0, 1), "from 0 to 1", [0, 1], [-0.1, 1.1, float("inf")]),
        (Bounds(0, 1, open_low=True), "above 0 and at most 1", [0.1, 1.0], [0.0, 2]),
        (Bounds(0, 1, open_low=True, open_high=True), "above 0 and below 1", [0.5], [0, 1]),
    ],
)
def test_bounds_contain_numbers_and_name_themselves(bounds, text, inside, outside):
    assert str(bounds) == text
    assert all(value in bounds for value in inside)
    assert not any(value in bounds for value in outside)


def test_register_options_accepts_defaults_and_keys(monkeypatch):
    monkeypatch.setattr("ssl_jax.config._REGISTERED", {})
    before = default_config()
    register_options("mine", {"width": 3, "rate": Key(0.5, "Its rate", Bounds(0, 1))})
    validate(before)  # made before the registration
    config = default_config()
    assert (config.mine.width, config.mine.rate) == (3, 0.5)
    assert schema_keys()["mine.rate"].meaning == "Its rate; from 0 to 1"
    with pytest.raises(UserError, match="config.mine.rate is 2.0: it must be from 0 to 1"):
        config.method = "mine"
        apply_overrides(config, ["mine.rate=2.0"])


@pytest.mark.parametrize("key", ["optim", "optim.lr", "config.optim.lr"])
def test_config_command_explains_a_key_or_group(config_file, capsys, key):
    assert cli.main(["config", f"--config={config_file('config.optim.lr = 0.7')}", key]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "--config.optim.lr=0.7  # default: 0.3" in lines
    assert lines[lines.index("--config.optim.lr=0.7  # default: 0.3") - 1].startswith("# Peak")
    assert len(lines) == 2 * (len(SCHEMA["optim"]) if key == "optim" else 1)


def test_config_command_refuses_an_unknown_key(config_file, capsys):
    assert cli.main(["config", f"--config={config_file('pass')}", "optim.lrr"]) == 2
    assert "Did you mean 'optim.lr'" in capsys.readouterr().err


def test_differences_name_both_values_and_skip_keys_by_what_they_affect():
    old, new = to_json(default_config()), default_config()
    new.optim.lr = 0.5
    new.data.threads = 3
    new.eval.knn_k = 9
    new = to_json(new)
    assert differences(old, new, ignore=("results", "nothing")) == ["optim.lr: 0.3 -> 0.5"]
    assert differences(old, new, ignore=("nothing",)) == [
        "eval.knn_k: 200 -> 9",
        "optim.lr: 0.3 -> 0.5",
    ]
    assert len(differences(old, new)) == 3


@pytest.mark.parametrize("text", ["False", "none"])
def test_switch_in_place_of_a_name_is_refused(text):
    with pytest.raises(
        UserError, match=f"config.wandb is '{text}'. Set a name, or --config.wandb="
    ):
        apply_overrides(default_config(), [f"wandb={text}"])
    assert apply_overrides(default_config(), ["optim.lr_scaling=none"]).optim.lr_scaling == "none"
    assert apply_overrides(default_config(), ["wandb="]).wandb == ""


def test_saved_config_with_unknown_or_missing_keys_is_refused():
    saved = to_json(default_config())
    saved["optim"]["gone"] = 1
    with pytest.raises(UserError, match="another version of ssl_jax .*optim.gone"):
        from_json(saved)
    del saved["optim"]["gone"], saved["optim"]["lr"]
    with pytest.raises(UserError, match="another version of ssl_jax .*optim.lr"):
        from_json(saved)


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("lr=0.5", "Did you mean 'config.optim.lr'"),
        ("optim.learning_rate=0.5", "Did you mean 'config.optim.lr'"),
        ("optim.wd=0.5", "Did you mean 'config.optim.weight_decay'"),
        ("temperature=0.2", "Did you mean 'config.simclr.temperature'"),
        ("loss.temperature=0.2", "Did you mean 'config.simclr.temperature'"),
        ("optim.batch_sise=3", "config.optim has no key 'batch_sise'"),
        ("batchsize=3", "Did you mean 'batch_size'"),
    ],
)
def test_unknown_key_suggests_the_same_name_in_another_group(typed, meant):
    with pytest.raises(UserError, match=meant):
        apply_overrides(default_config(), [typed])


def test_missing_keys_of_views_are_refused_by_name():
    config = default_config()
    config.views = {"a": view(flip=0.3), "b": view(flip=0.7)}
    saved = to_json(config)
    for one in saved["views"].values():
        del one["flip"]
    with pytest.raises(UserError, match="another version .*views.a.flip, views.b.flip"):
        from_json(saved)


def test_view_used_under_two_names_becomes_two_views(config_file):
    path = config_file("one = view(size=32)\nconfig.views = {'a': one, 'b': one}")
    config = load_config(path, ["views.a.flip=0.0"])
    assert (config.views.a.flip, config.views.b.flip) == (0.0, 0.5)


@pytest.mark.parametrize(
    "override",
    ["moco.queue=0", "swav.queue=-256", "simclr.memory_bank=-512", "swav.prototypes=0"]
    + ["simclr.block_size=-3", "microbatch=-1", "eval.projector_layer=-1"],
)
def test_out_of_range_sizes_are_refused(override, tmp_path):
    file = tmp_path / "config.py"
    file.write_text("from ssl_jax.config import default_config as get_config")
    with pytest.raises(UserError, match=f"config.{override.split('=')[0]} is .*at least"):
        load_config(str(file), [override])
