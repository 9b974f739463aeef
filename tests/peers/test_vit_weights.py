"""ViTs of timm are imported with equal features, and exports load in timm by the printed lines."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed here: make peers")
timm = pytest.importorskip("timm", reason="timm is not installed here: make peers")

from safetensors.torch import load_file, save_file  # noqa: E402

import ssl_jax  # noqa: E402
from ssl_jax.interop import export  # noqa: E402
from ssl_jax.interop.import_weights import read_weights  # noqa: E402
from ssl_jax.interop.weights import write_weights  # noqa: E402
from ssl_jax.models import make_encoder  # noqa: E402

SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 1}
MEAN = {"global_pool": "avg"}
# timm's arguments.
NETS = {
    "class": {},
    "without_class_position": {"no_embed_class": True},  # DeiT III
    "layer_scale": {"init_values": 0.1},
    "mean": {**MEAN, "class_token": False},
    "mean_with_class_token": MEAN,  # MAE's fine-tuned networks
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "registers_with_positions": {"reg_tokens": 3},
    "mean_registers": {**MEAN, "class_token": False, "reg_tokens": 2},
    "mean_registers_and_class_token": {**MEAN, "reg_tokens": 2, "no_embed_class": True},
}


def timm_net(**options):
    torch.manual_seed(0)
    torch.set_num_threads(1)
    net = timm.create_model("vit_base_patch16_224", **{**SIZES, **options}, num_classes=0)
    with torch.no_grad():
        for name, value in net.named_parameters():
            one = "norm" in name and name.endswith("weight")
            value.copy_(one + 0.2 * torch.randn(value.shape))
    return net.eval()


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_loaded_by_the_printed_lines_and_from_a_folder(tmp_path, channels):
    net = timm_net(in_chans=channels)
    save_file(net.state_dict(), tmp_path / "timm.safetensors")
    lines = export.export_torch(tmp_path / "timm.safetensors", tmp_path / "net.safetensors")
    names = {}
    exec("\n".join(lines).replace('"net.', f'"{tmp_path}/net.'), names)
    export.export_folder(tmp_path / "timm.safetensors", tmp_path / "hub")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=0)
    for found in (names["net"], loaded):
        for key, value in net.state_dict().items():
            assert torch.equal(found.state_dict()[key], value), key


def close(found, expected):
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NETS)
def test_features_equal_timms_after_import_and_after_export(tmp_path, name):
    net = timm_net(**NETS[name])
    save_file(net.state_dict(), tmp_path / "timm.safetensors")
    weights = read_weights(tmp_path / "timm.safetensors")
    assert weights.left_out == ()
    x = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    of_torch = torch.from_numpy(x.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        expected = net(of_torch).numpy()
    module = make_encoder(weights.config)
    apply = jax.jit(lambda p, x: module.apply({"params": p}, x, train=False))
    close(apply(weights.params["encoder"], x), expected)

    out = tmp_path / "out"
    out.mkdir()
    lines = export.export_torch(tmp_path / "timm.safetensors", out / "net.safetensors")
    names = {}
    exec("\n".join(lines).replace('"net.', f'"{out}/net.'), names)  # loads strictly
    with torch.no_grad():
        close(names["net"](of_torch).numpy(), expected)
    again = read_weights(out / "net.safetensors")
    jax.tree.map(np.testing.assert_array_equal, again.params, weights.params)
    if not NETS[name]:  # no token was changed
        same = load_file(out / "net.safetensors")
        assert all(torch.equal(value, same[key]) for key, value in net.state_dict().items())

    export.export_folder(tmp_path / "timm.safetensors", tmp_path / "hub")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=0)
    with torch.no_grad():
        close(loaded.eval()(of_torch).numpy(), expected)
    assert ssl_jax.load(tmp_path / "hub").config.model.vit == weights.config.model.vit


@pytest.mark.parametrize("size", [(32, 32), (24, 40), (16, 16)])
@pytest.mark.parametrize("positions", ["learned", "sincos"])
@pytest.mark.parametrize("name", ["class", "registers", "mean"])
def test_features_of_images_of_other_sizes_equal_ours_after_export(tmp_path, name, positions, size):
    """The positions are those of 32 pixels: learned ones are interpolated, fixed ones computed."""
    save_file(timm_net(**NETS[name]).state_dict(), tmp_path / "timm.safetensors")
    weights = read_weights(tmp_path / "timm.safetensors")
    for view in weights.config.views.values():
        with view.unlocked(), view.ignore_type():
            view.size = size
    weights.config.model.vit.positions = positions
    if positions == "sincos":
        del weights.params["encoder"]["pos_embed"]
    write_weights(weights, tmp_path / "ours.safetensors")
    x = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    module = make_encoder(weights.config)
    expected = module.apply({"params": weights.params["encoder"]}, x, train=False)

    lines = export.export_torch(tmp_path / "ours.safetensors", tmp_path / "net.safetensors")
    names = {}
    exec("\n".join(lines).replace('"net.', f'"{tmp_path}/net.'), names)
    export.export_folder(tmp_path / "ours.safetensors", tmp_path / "hub")
    loaded = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True, num_classes=0)
    for net in (names["net"], loaded.eval()):
        with torch.no_grad():
            found = net(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()
        close(found, np.asarray(expected))
