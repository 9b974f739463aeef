"""Exports of a tiny run: a JAX program, our tree, a Hugging Face folder; the commands."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from encoders import blank_state, copy_run, random_encoder, same
from tiny import tiny_config

import ssl_jax
from ssl_jax import methods
from ssl_jax.cli import main as cli
from ssl_jax.config import from_json, to_json, view
from ssl_jax.interop.card import _images, _training, _use, _views
from ssl_jax.interop.export import _hub_config, _hub_preprocessing, export_program
from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.initial_weights import load_initial_weights, resolve_initial_weights
from ssl_jax.interop.load import restore_state
from ssl_jax.interop.metadata import pixel_statistics, preprocessing
from ssl_jax.interop.weights import Weights, read_header, write_weights
from ssl_jax.methods import SimCLR


@pytest.fixture(scope="module")
def run(finished_run, tmp_path_factory):
    return copy_run(finished_run, tmp_path_factory.mktemp("export") / "run")


@pytest.fixture(scope="module")
def selective(tmp_path_factory):
    """Random weights of a network with selective kernels, which PyTorch's libraries lack."""
    config = tiny_config()
    config.model.update(depth=50, width=1 / 32, sk=True)
    drawn = random_encoder(config)
    file = tmp_path_factory.mktemp("sk") / "sk.safetensors"
    networks = ({"encoder": drawn[kind]} for kind in ("params", "batch_stats"))
    write_weights(Weights(config, *networks), file)
    return file


def write_loader(folder):
    source = Path(ssl_jax.__file__).parent / "interop" / "torch_encoder.txt"
    (folder / "torch_encoder.py").write_bytes(source.read_bytes())


def images(n=3, size=8):
    return np.random.default_rng(0).integers(0, 256, (n, size, size, 3), np.uint8)


def command(capsys, *arguments):
    code = cli.main(list(map(str, arguments)))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_program_runs_without_ssl_jax_for_any_batch_size(run, tmp_path, capsys):
    file = tmp_path / "encoder.bin"
    out = command(capsys, "export", f"--from={run}", "--format=program", f"--out={file}")
    assert "uint8 images [n, 8, 8, 3] to features [n, 8]" in out
    assert str(Path(ssl_jax.__file__).parent).encode() not in file.read_bytes()
    # In a process that can import neither this package nor Flax.
    script = f"""
import sys
for name in ("ssl_jax", "flax", "optax", "orbax"):
    sys.modules[name] = None
import jax, numpy as np
from jax import export
program = export.deserialize(bytearray(open({str(file)!r}, "rb").read()))
assert set(program.platforms) == {{"cpu", "cuda", "tpu"}}, program.platforms
images = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)
np.savez({str(tmp_path / "out.npz")!r}, *[program.call(images[:n]) for n in (1, 3)])
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    expected = np.asarray(ssl_jax.load(run).apply(images()))
    with np.load(tmp_path / "out.npz") as found:
        np.testing.assert_allclose(found["arr_1"], expected, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found["arr_0"], expected[:1], rtol=1e-4, atol=1e-5)


def test_program_can_return_a_projector_layer(run, tmp_path):
    told = export_program(run, tmp_path / "a.bin", projector_layer=1)
    data = bytearray((tmp_path / "a.bin").read_bytes())
    found = jax.export.deserialize(data).call(images())
    expected = ssl_jax.load(run, projector_layer=1).apply(images())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    assert told == {"shape": [8, 8, 3], "dtype": "uint8", "features": expected.shape[1]}


def test_exported_tree_loads_and_initializes_a_run(run, tmp_path, capsys):
    file = tmp_path / "ours.safetensors"
    command(capsys, "export", f"--from={run}", "--format=jax", f"--out={file}")
    np.testing.assert_array_equal(
        ssl_jax.load(file).apply(images()), ssl_jax.load(run).apply(images())
    )
    layer = ssl_jax.load(file, projector_layer=2).apply(images())
    np.testing.assert_array_equal(layer, ssl_jax.load(run, projector_layer=2).apply(images()))
    # As initial weights of another run, with and without heads.
    source = restore_state(run)
    config = tiny_config()
    config.simclr.update(layers=3, hidden=24)
    config.data.num_classes = 10
    config.init_from.path = str(file)
    initial = blank_state(config)
    for heads in (False, True):
        config.init_from.heads = heads
        resolve_initial_weights(config)
        params = load_initial_weights(initial, config).params
        assert same(params["encoder"], source.params["encoder"])
        assert same(params["projector"], source.params["projector"]) == heads


def test_exported_file_evaluates_like_its_run(run, tmp_path, capsys):
    file = tmp_path / "ours.safetensors"
    command(capsys, "export", f"--from={run}", "--format=jax", f"--out={file}")
    of_file = json.loads(command(capsys, "knn", f"--from={file}", "--k=5", "--json"))
    of_run = json.loads(command(capsys, "knn", f"--from={run}", "--k=5", "--json"))
    assert of_file["metrics"] == of_run["metrics"]
    assert list((tmp_path / "ours.safetensors_evals" / "evals").glob("knn_*.json"))
    brief = ["--config.epochs=1", "--config.batch_size=64", "--config.eval.at_end=false"]
    brief.append("--config.views.view.crop.sampler=none")  # compiles faster than crops
    out = command(capsys, "linear", f"--from={file}", "--recipe=moco", *brief)
    assert "linear classifier, recipe moco, batch_size=64, " in out
    out = command(capsys, "finetune", f"--from={file}", "--labels=0.5", *brief)
    assert "fine-tuned on 50 % of the images, " in out


def test_folder_export_has_a_card_with_the_runs_recipe_and_results(run, tmp_path, capsys):
    command(capsys, "knn", f"--from={run}", "--k=5")
    out = command(capsys, "export", f"--from={run}", "--format=folder", f"--out={tmp_path / 'hub'}")
    assert "choose a license" in out
    names = {file.name for file in (tmp_path / "hub").iterdir()}
    assert names == {
        *("README.md", "config.json", "model.safetensors", "preprocessor_config.json"),
        *("ssl_jax.safetensors", "torch_encoder.py"),
    }
    card = (tmp_path / "hub" / "README.md").read_text()
    count = sum(leaf.size for leaf in jax.tree.leaves(ssl_jax.load(run).params))
    for what in (
        "# license: choose",
        "SimCLR",
        "1347 images",
        "raw pixels",
        "random init",
        "5 nearest",
        f"8 features per image, {count:,} parameters",
        "- view1: a crop of 50 to 100 % of the area (torchvision's sampler) at 8 pixels "
        "(bilinear).",
        "(bilinear), gray 0.25.",
        "- Temperature 0.2, seed 7.",
    ):
        assert what in card, what
    assert str(run) not in card
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    assert config["num_features"] == 8 and "architecture" not in config  # no network of timm's
    how = json.loads((tmp_path / "hub" / "preprocessor_config.json").read_text())
    assert how["crop_size"] == {"height": 8, "width": 8} and how["do_normalize"] is False
    assert (tmp_path / "hub" / "model.safetensors").stat().st_mode & 0o044 == 0o044
    for path in (tmp_path / "hub", tmp_path / "hub" / "ssl_jax.safetensors"):
        np.testing.assert_array_equal(
            ssl_jax.load(path).apply(images()), ssl_jax.load(run).apply(images())
        )
    told = json.loads(command(capsys, "knn", f"--from={tmp_path / 'hub'}", "--k=5", "--json"))
    assert told["k"] == 5


def test_preprocessing_is_that_of_the_run():
    config = tiny_config()
    config.eval.crop_fraction = 0.8  # a small stem's, too
    assert preprocessing(config) == {
        **{"size": 8, "crop_fraction": 0.8, "interpolation": "bicubic", "antialias": True},
        **{"channels": 3, "range": [0, 1], "values": [0, 255], "mean": [], "std": []},
    }
    assert "(bicubic, antialiased)" in _images(config)
    assert "not cropped. The preprocessing of timm and the hub crops these." in _images(config)
    for sampler in ("tf", "byol"):
        config.views.view1.crop.sampler = sampler
        assert not preprocessing(config)["antialias"]
        assert not _hub_config(config)["ssl_jax"]["antialias"]
        assert "(bicubic, not antialiased)" in _images(config)
        assert _images(config).endswith(" timm and the hub crops these and is smoother.")


@pytest.mark.parametrize(
    ("limits", "bits", "largest", "of_8_bits"),
    [
        ((), 8, 255, (0, 255)),
        ((10, 210), 8, 255, (10, 210)),
        ((), 16, 65535, (0, 255)),  # of 16 bits, detectors read the upper 8
        ((100, 4095), 16, 65535, (0, 255)),
    ],
)
def test_statistics_of_exports_are_those_of_the_values_range(limits, bits, largest, of_8_bits):
    config = tiny_config()
    config.data.update(range=limits, bits=bits)
    for each in config.views.values():
        each.update(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.3))
    low, high = limits or (0, largest)
    values, unit = np.array([low, high]), np.array([0.0, 1.0])[:, None]
    expected = (unit - [0.4, 0.5, 0.6]) / [0.2, 0.2, 0.3]
    hub = _hub_config(config)["pretrained_cfg"]  # timm divides by the largest value
    found = (values[:, None] / largest - hub["mean"]) / hub["std"]
    np.testing.assert_allclose(found, expected, atol=1e-9)
    mean, std = pixel_statistics(config)
    found = (np.array(of_8_bits)[:, None] - mean) / std
    np.testing.assert_allclose(found, expected, atol=1e-5)
    how = _hub_preprocessing(config)
    scaled = values[:, None] * how["rescale_factor"]
    np.testing.assert_allclose((scaled - how["image_mean"]) / how["image_std"], expected, atol=1e-9)


def test_card_describes_each_views_augmentation():
    config = tiny_config()
    jitter = {"prob": 0.8, "brightness": 0.4, "contrast": 0.3, "saturation": 0.2, "hue": 0.1}
    one = view(size=96, count=6, jitter=jitter, blur={"prob": 0.5}, solarize={"prob": 0.2})
    plain = view(size=8, crop={"sampler": "none"}, flip=0.0, jitter={"prob": 0.0}, gray=0.0)
    plain.blur.prob, plain.affine.degrees, plain.noise = 0.0, 15.0, 0.05
    config.views = {"a": one, "b": plain, "c": plain}
    assert list(_views(config)) == [
        "- a (6 times): a crop of 8 to 100 % of the area (tf's sampler) at 96 pixels (bicubic), "
        "flip 0.5, jitter 0.8 (brightness 0.4, contrast 0.3, saturation 0.2, hue 0.1), gray 0.2, "
        "blur 0.5 (sigma 0.1 to 2), solarize 0.2 (from 0.5).",
        "- b, c: the whole image at 8 pixels (bicubic), affine (degrees 15), noise 0.05.",
    ]


@pytest.mark.parametrize(
    ("value", "words"), [("cosine", "- Seed 7."), (0.5, "- Temperature 0.5, seed 7.")]
)
def test_card_of_a_registered_method_has_its_temperature_if_numeric(
    tmp_path, value, words, monkeypatch
):
    monkeypatch.setattr(methods, "_REGISTERED", {"own": SimCLR})
    config = tiny_config()
    config.method, config.seed = "own", 7
    with config.unlocked():
        config.own = {"temperature": value}
    assert words in list(_training(tmp_path, Weights(config, {}, {}, 3)))


def test_card_names_the_learning_rate_of_biases_if_it_is_another(tmp_path):
    config = tiny_config(method="barlow")
    config.optim.update(lr=0.2, warmup_epochs=10.0)
    named = {0.0: "0.2 (linear", 0.0048: "0.2, of biases and normalization 0.0048 (linear"}
    for rate, words in named.items():
        config.optim.norm_bias_lr = rate
        (line,) = (x for x in _training(tmp_path, Weights(config, {}, {}, 3)) if "warmup" in x)
        assert line.startswith(f"- lars, learning rate {words}")


@pytest.mark.parametrize(("method", "words"), [("supcon", "used"), ("simclr", "not used")])
def test_card_says_whether_labels_were_used(tmp_path, method, words):
    lines = list(_training(tmp_path, Weights(tiny_config(method=method), {}, {}, 3)))
    assert f"- Data: digits; labels were {words}." in lines


def test_card_of_a_part_of_the_data_and_of_one_epoch(tmp_path):
    config = tiny_config(epochs=1.0)
    config.data.validation, config.optim.lr_scaling = 0.25, "none"
    card = "\n".join(_training(tmp_path, Weights(config, {}, {}, 3)))
    assert (
        "- Data: digits, without 25 % that are held out; labels were not used.\n- 1 epoch," in card
    )
    assert "(not scaled)" in card


def test_card_names_the_encoder_that_must_be_registered_first():
    config = tiny_config()
    assert not any("registers" in line for line in _use(config, plain=False))
    config.model.name = "mini"
    assert "# First import the file that registers the encoder 'mini'." in _use(config, plain=False)


def test_card_has_the_weight_decays_end_and_the_clipping(tmp_path):
    config = tiny_config()
    config.optim.update(weight_decay=0.04, weight_decay_end=0.4, clip_norm_per_tensor=3.0)
    (line,) = (x for x in _training(tmp_path, Weights(config, {}, {}, 3)) if "warmup" in x)
    words = "weight decay 0.04 to 0.4 by a cosine, gradients clipped to a norm of 3 per tensor"
    assert words in line


def test_selective_kernels_are_not_exported_for_torch(selective, tmp_path, capsys):
    line = [
        "export",
        f"--from={selective}",
        "--format=torch",
        f"--out={tmp_path / 'a.safetensors'}",
    ]
    assert cli.main(line) == 2
    assert "selective kernels, which neither torchvision nor timm" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    # An earlier export of another network to the same folder is removed.
    (tmp_path / "hub").mkdir()
    write_loader(tmp_path / "hub")
    (tmp_path / "hub" / "model.safetensors").write_bytes(b"of another")
    (tmp_path / "hub" / "config.json").write_text('{"ssl_jax": {}, "pretrained_cfg": {}}')
    command(capsys, "export", f"--from={selective}", "--format=folder", f"--out={tmp_path / 'hub'}")
    assert not (tmp_path / "hub" / "model.safetensors").exists()
    assert not (tmp_path / "hub" / "torch_encoder.py").exists()
    assert "torch_encoder" not in (tmp_path / "hub" / "README.md").read_text()
    mine, theirs = read_weights(tmp_path / "hub" / "ssl_jax.safetensors"), read_weights(selective)
    jax.tree.map(np.testing.assert_array_equal, mine.params, theirs.params)
    assert mine.config.model.sk


@pytest.mark.parametrize("name", ["README.md", "config.json", "torch_encoder.py"])
def test_folder_export_replaces_no_files_but_an_earlier_exports(run, tmp_path, capsys, name):
    (tmp_path / name).write_text("{}")
    line = ["export", f"--from={run}", "--format=folder"]
    for out in (tmp_path, run):
        before = {file: file.read_bytes() for file in out.iterdir() if file.is_file()}
        assert cli.main([*line, f"--out={out}"]) == 2
        assert "that is not from an earlier export" in capsys.readouterr().err
        assert before == {file: file.read_bytes() for file in out.iterdir() if file.is_file()}


def test_repeated_folder_export_keeps_an_edited_card(run, tmp_path, capsys):
    line = ["export", f"--from={run}", "--format=folder", f"--out={tmp_path / 'hub'}"]
    for _ in range(2):
        assert "kept" not in command(capsys, *line)
    (tmp_path / "hub" / "README.md").write_text("license: mit")
    assert "README.md was kept; for a new card, remove it" in command(capsys, *line)
    assert (tmp_path / "hub" / "README.md").read_text() == "license: mit"
    for name in ("model.safetensors", "ssl_jax.safetensors"):
        (tmp_path / "hub" / name).unlink()
    assert cli.main(line) == 2
    assert "that is not from an earlier export" in capsys.readouterr().err


def test_folder_export_never_keeps_the_card_of_other_weights(selective, tmp_path, capsys):
    """A card has the results of its weights."""
    weights, other, hub = read_weights(selective), tmp_path / "other.safetensors", tmp_path / "hub"
    params = jax.tree.map(lambda x: np.asarray(x) + 1, weights.params)
    write_weights(dataclasses.replace(weights, params=params), other)

    def export(path):
        return cli.main(["export", f"--from={path}", "--format=folder", f"--out={hub}"])

    assert export(selective) == export(other) == 0
    assert "was kept" not in capsys.readouterr().out  # nobody has edited it
    (hub / "README.md").write_text("license: mit")
    assert export(other) == 0 and "was kept" in capsys.readouterr().out
    before = (hub / "ssl_jax.safetensors").read_bytes()
    assert export(selective) == 2
    assert "has been edited and describes other weights. Move it away" in capsys.readouterr().err
    assert (hub / "ssl_jax.safetensors").read_bytes() == before
    (hub / "README.md").rename(tmp_path / "README.md")  # the advice
    assert export(selective) == 0 and "An image encoder" in (hub / "README.md").read_text()


def test_exported_headers_contain_no_local_paths(selective, tmp_path):
    weights = read_weights(selective)
    config = from_json(to_json(weights.config))
    config.data.update(name="folder", dir="/home/me/faces/train", test_dir="gs://mine/test")
    config.init_from.path = "/home/me/runs/a"
    config.distill.teacher = "~/runs/b"
    write_weights(dataclasses.replace(weights, config=config), tmp_path / "a.safetensors")
    header = json.dumps(read_header(tmp_path / "a.safetensors"))
    assert "home" not in header and "mine" not in header and "runs" not in header
    assert read_weights(tmp_path / "a.safetensors").config.data.dir == "train"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--format=torch", "--out=a.bin"), "use a name that ends in .safetensors"),
        (("--format=program", "--out=config.json"), "use a name that ends in .bin"),
        (("--format=jax", "--out=/nowhere/a.safetensors"), "no folder /nowhere (--out)"),
        (("--format=jax", "--out=a.safetensors", "--step=9"), "no checkpoint of step 9"),
        (("--format=jax", "--out=a.safetensors", "--projector-layer=1"), "is for --format=program"),
        (("--format=program", "--out=a.bin", "--projector-layer=7"), "hidden layers 1 to 2"),
    ],
)
def test_bad_export_options_are_one_line_errors(
    run, tmp_path, monkeypatch, capsys, flags, sentence
):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["export", f"--from={run}", *flags]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_torch_export_imports_back_unchanged(run, tmp_path, capsys):
    file = tmp_path / "torch.safetensors"
    out = command(capsys, "export", f"--from={run}", "--format=torch", f"--out={file}")
    assert "from torch_encoder import load" in out and (tmp_path / "torch_encoder.py").exists()
    out = command(capsys, "import", file, f"--out={tmp_path / 'ours.safetensors'}")
    assert "ResNet-4 ×0.125, cifar stem, symmetric padding; networks: encoder" in out
    assert read_weights(tmp_path / "ours.safetensors").config.views.view1.size == 8
    np.testing.assert_array_equal(
        ssl_jax.load(tmp_path / "ours.safetensors").apply(images()),
        ssl_jax.load(run).apply(images()),
    )
    told = json.loads(
        command(capsys, "import", file, f"--out={tmp_path / 'b.safetensors'}", "--json")
    )
    assert told["left_out"] == [] and told["model"]["depth"] == 4
