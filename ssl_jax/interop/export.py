"""Exports a run's encoder: for PyTorch and its detectors, for JAX, as a Hugging Face folder."""

import contextlib
import dataclasses
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export
from ml_collections import ConfigDict

from ssl_jax.config import Schedule, flat_views, from_json, to_json, view_shape
from ssl_jax.data.values import largest_value
from ssl_jax.errors import UserError, first_line
from ssl_jax.files import ANOTHER, local_path, read_regular, reading, writing, writing_output
from ssl_jax.interop.card import model_card
from ssl_jax.interop.detectron2 import detectron2_config, require_detectron2s, to_detectron2
from ssl_jax.interop.import_weights import read_weights
from ssl_jax.interop.load import Encoder, load, weights_at
from ssl_jax.interop.metadata import (
    has_torch_loader,
    in_timm,
    pixel_statistics,
    preprocessing,
    unlike_torchvisions,
)
from ssl_jax.interop.torch_names import to_torch
from ssl_jax.interop.vit_names import timm_arguments, vit_to_torch
from ssl_jax.interop.weights import Weights, portable_config, write_safetensors, write_weights
from ssl_jax.methods import make_method
from ssl_jax.models import make_encoder
from ssl_jax.models.registry import architecture, encoder_name

PLATFORMS = ("cpu", "cuda", "tpu")
_LOADER, _CARD = "torch_encoder.py", "README.md"
_WEIGHTS, _ALL_WEIGHTS = "model.safetensors", "ssl_jax.safetensors"
_FOLDER_FILES = (
    *(_CARD, "config.json", "preprocessor_config.json"),
    *(_ALL_WEIGHTS, _WEIGHTS, _LOADER),
)
# Limit of a serialized program's constants; its format ends at 2 GiB.
_MAX_BYTES = 2**31 - 2**24


def export_torch(
    path: str | Path, file: str | Path, *, step: int | None = None, network: str = "default"
) -> list[str]:
    """Writes the encoder as safetensors with the names of torchvision and timm.

    A ResNet that neither has gets a loader next to it.

    Args:
      path: a run's workdir, or a file of weights.
      file: the output, `*.safetensors`; its header has the architecture and the preprocessing.
      step: of the run's checkpoint, the newest by default.
      network: see `ssl_jax.load`.

    Returns:
      Lines of Python that load it.

    Raises:
      UserError: there is nothing to export, the encoder has selective kernels or is neither a
        ResNet nor a ViT, or the file can't be written.
    """
    weights, file = weights_at(path, step, network), local_path(file)
    if weights.config.model.name == "vit":
        _require_configured(weights.config)
        _write_torch(weights, file)
        return _timm_lines(weights.config, file)
    _require_resnet(weights.config)
    unlike = ", ".join(unlike_torchvisions(weights.config))
    loader = _loader(file.parent) if unlike else None
    _write_torch(weights, file)
    if loader is None:
        depth = weights.config.model.depth
        return [
            "import safetensors.torch, torch, torchvision",
            f"net = torchvision.models.resnet{depth}()",
            "net.fc = torch.nn.Identity()",
            f'net.load_state_dict(safetensors.torch.load_file("{file.name}"))',
            "net = net.eval()",
        ]
    _write(loader, _source())
    return [
        f"# torch_encoder.py, because torchvision has no ResNet with {unlike}",
        "from torch_encoder import load",
        f'net = load("{file.name}")',
    ]


def _timm_lines(config: ConfigDict, file: Path) -> list[str]:
    """Lines of Python that load a ViT in timm."""
    name, arguments = timm_arguments(config)
    listed = [f"{key}={value!r}" for key, value in {**arguments, "num_classes": 0}.items()]
    return [
        "import safetensors.torch, timm",
        f'net = timm.create_model("{name}", {", ".join(listed)})',
        f'net.load_state_dict(safetensors.torch.load_file("{file.name}"))',
        "net = net.eval()",
    ]


def _require_configured(config: ConfigDict) -> None:
    """Refuses an encoder that a registered method has set in place of `config.model`."""
    custom = make_method(config, Schedule(1, 1)).custom_encoder
    if custom:
        raise UserError(
            f"The encoder of method '{config.method}' is {custom}, set by the method, not that of "
            "config.model: export it with --format=jax or --format=program."
        )


def _require_resnet(config: ConfigDict) -> None:
    """Refuses an encoder that PyTorch's libraries lack."""
    _require_configured(config)
    if config.model.name != "resnet":
        own = ["--format=torch, for timm"] if config.model.name == "vit" else ["--format=program"]
        formats = ", ".join(["--format=jax", "--format=folder"]) + f" or {own[0]}"
        raise UserError(
            f"The encoder is {encoder_name(config.model)}, but this format is for ResNets "
            f"only: export it with {formats}."
        )


def _write_torch(weights: Weights, file: Path) -> None:
    config, state = weights.config, _torch_state(weights)
    model = architecture(config.model)
    model.pop("sk", None)  # the loader's `Encoder` has none
    if config.model.name == "resnet":
        del model["name"]
    if config.data.channels != 3:
        model["channels"] = config.data.channels
    header = {
        "format": "pt",
        "model": json.dumps(model),
        "preprocessing": json.dumps(preprocessing(config)),
        "ssl_jax_config": json.dumps(portable_config(config)),
    }
    write_safetensors(state, file, header)


def _torch_state(weights: Weights) -> dict[str, np.ndarray]:
    if weights.config.model.name == "vit":
        return vit_to_torch(_on_host(weights.params["encoder"])[0], weights.config)
    if weights.config.model.sk:
        raise UserError(
            "The encoder has selective kernels, which neither torchvision nor timm implements in "
            "SimCLR's form: export it with --format=jax or --format=program."
        )
    return to_torch(*_on_host(weights.params["encoder"], weights.batch_stats["encoder"]))


def _on_host(*trees: Any) -> Any:
    return jax.tree.map(lambda x: np.asarray(jax.device_get(x), np.float32), trees)


def _source() -> bytes:
    """The source of the loader, which is not a module of this package as it needs torch."""
    return Path(__file__).with_name(_LOADER).with_suffix(".txt").read_bytes()


def _loader(folder: Path) -> Path:
    """The loader's path; refuses to overwrite the user's own file of that name."""
    file = folder / _LOADER
    first = _source().partition(b"\n")[0]
    with reading(file):
        if file.is_file() and not read_regular(file).startswith(first):
            raise UserError(
                f"{file} was not written by ssl_jax: move it, or choose another output folder."
            )
    return file


def export_detectron2(
    path: str | Path, file: str | Path, *, step: int | None = None, network: str = "default"
) -> list[str]:
    """Writes the encoder as a file for detectron2's `MODEL.WEIGHTS`.

    Args:
      path: a run's workdir, or a file of weights.
      file: the output, `*.pkl`: a pickle of NumPy arrays.
      step: of the run's checkpoint, the newest by default.
      network: see `ssl_jax.load`.

    Returns:
      Lines of the YAML config that belong to the file.

    Raises:
      UserError: there is nothing to export, detectron2 doesn't have the network, or the file has
        another suffix or can't be written.
    """
    file = _with_suffix(file, ".pkl")
    weights = weights_at(path, step, network)
    _require_resnet(weights.config)
    require_detectron2s(weights.config)
    _write(file, to_detectron2(_torch_state(weights)))
    return detectron2_config(weights.config, file)


def export_pth(
    path: str | Path, file: str | Path, *, step: int | None = None, network: str = "default"
) -> list[str]:
    """Writes the encoder by `torch.save` with torchvision's names, as MMDetection reads it.

    Args:
      path: a run's workdir, or a file of weights.
      file: the output, `*.pth`.
      step: of the run's checkpoint, the newest by default.
      network: see `ssl_jax.load`.

    Returns:
      Lines of MMDetection's config that belong to the file.

    Raises:
      UserError: PyTorch is not installed, there is nothing to export, torchvision doesn't have the
        network, or the file has another suffix or can't be written.
    """
    file = _with_suffix(file, ".pth")
    weights = weights_at(path, step, network)
    config = weights.config
    _require_resnet(config)
    arrays = _torch_state(weights)
    unlike = ", ".join(unlike_torchvisions(config))
    if unlike:
        raise UserError(
            f"The encoder has {unlike}, which no ResNet of torchvision and MMDetection has: export "
            "it with --format=torch, which adds a loader."
        )
    try:
        import torch
    except ImportError as error:
        raise UserError(
            f"Cannot write {file} without PyTorch ({first_line(error)}): run pip install torch, or "
            "use --format=torch, which doesn't need it."
        ) from error
    state = {name: torch.from_numpy(np.array(x, order="C")) for name, x in arrays.items()}
    # Not to the file itself, whose name torch would store.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    _write(file, buffer.getvalue())
    mean, std = pixel_statistics(config)
    return [
        "model = dict(",
        f"    data_preprocessor=dict(mean={mean}, std={std}, bgr_to_rgb=True),",
        "    backbone=dict(",
        f'        depth={config.model.depth}, style="pytorch",',
        f'        init_cfg=dict(type="Pretrained", checkpoint={json.dumps(str(file))}),',
        "    ),",
        ")",
    ]


def _with_suffix(file: str | Path, suffix: str) -> Path:
    file = local_path(file)
    if file.suffix != suffix:
        raise UserError(f"Cannot write {file}: use a name that ends in {suffix}.")
    return file


def export_tree(
    path: str | Path, file: str | Path, *, step: int | None = None, network: str = "default"
) -> None:
    """Writes all networks of a run to a file for `ssl_jax.load` and `config.init_from.path`.

    Args:
      path: a run's workdir, or a file of weights.
      file: the output, `*.safetensors`.
      step: of the run's checkpoint, the newest by default.
      network: see `ssl_jax.load`.

    Raises:
      UserError: there is nothing to export, or the file can't be written.
    """
    write_weights(weights_at(path, step, network), file)


def export_program(
    path: str | Path,
    file: str | Path,
    *,
    step: int | None = None,
    projector_layer: int = 0,
    network: str = "default",
) -> dict[str, Any]:
    """Writes the encoder with its weights as a program that needs only JAX.

    The program maps images [n, height, width, C], uint8 or of a run on 16-bit images uint16, for
    any n, to float32 features [n, d], computed in float32 throughout. On CPUs, GPUs and TPUs, run
    it by

        jax.export.deserialize(bytearray(Path(file).read_bytes())).call(images)

    Args:
      path: a run's workdir, or a file of weights.
      file: the output, `*.bin`.
      step: of the run's checkpoint, the newest by default.
      projector_layer: return the output of this hidden layer of the projector.
      network: see `ssl_jax.load`.

    Returns:
      "shape" [height, width, C] and "dtype" of the images, and "features", the number per image.

    Raises:
      UserError: there is nothing to export, the network is too big for one program, or the file
        has another suffix or can't be written.
    """
    file = _with_suffix(file, ".bin")
    encoder = load(path, step, projector_layer=projector_layer, network=network)
    config = from_json(to_json(encoder.config))
    config.dtype = "float32"
    shape = view_shape(config, flat_views(config)[0])
    dtype = jnp.uint16 if config.data.bits > 8 else jnp.uint8
    count = sum(leaf.nbytes for leaf in jax.tree.leaves(encoder.variables))
    if count > _MAX_BYTES:
        raise UserError(
            f"The network has {count / 2**30:.1f} GiB of weights, but a program can contain 2: "
            "export it with --format=jax."
        )
    function = _program(dataclasses.replace(encoder, config=config))
    (n,) = jax_export.symbolic_shape("n")
    images = jax.ShapeDtypeStruct((n, *shape), dtype)
    # By default, convolutions on GPUs and TPUs round their inputs.
    with _without_source_paths(), jax.default_matmul_precision("highest"):
        exported = jax_export.export(jax.jit(function), platforms=PLATFORMS)(images)
    _write(file, bytes(exported.serialize()))
    features = int(exported.out_avals[0].shape[1])
    return {"shape": list(shape), "dtype": jnp.dtype(dtype).name, "features": features}


@contextlib.contextmanager
def _without_source_paths() -> Iterator[None]:
    """Compiles without the paths of this computer's source files, which programs contain."""
    name = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    try:
        yield
    finally:
        jax.config.update(name, before)


def _program(encoder: Encoder) -> Callable[[jax.Array], jax.Array]:
    variables = jax.device_get(encoder.variables)

    def features(images: jax.Array) -> jax.Array:
        result: jax.Array = encoder._apply(variables, images)
        return result

    return features


def _write(file: Path, data: bytes) -> None:
    with writing_output(file) as temporary:
        temporary.write_bytes(data)


def export_folder(
    path: str | Path, folder: str | Path, *, step: int | None = None, network: str = "default"
) -> bool:
    """Writes a Hugging Face folder: config, weights, preprocessing and a model card.

    `timm.create_model("local-dir:FOLDER")` loads a ViT or a network that torchvision has,
    `torch_encoder.py` in the folder any ResNet without selective kernels, and `ssl_jax.load` all.

    Args:
      path: a run's workdir, or a file of weights.
      folder: the output; created if it doesn't exist.
      step: of the run's checkpoint, the newest by default.
      network: see `ssl_jax.load`.

    Returns:
      Whether the folder's README.md was kept: the user has edited the card of an earlier export.

    Raises:
      UserError: there is nothing to export, the folder has files of these names that are not from
        an earlier export, or an edited card of other weights, or it can't be written.
    """
    folder = local_path(folder)
    _require_no_other_files(folder)
    weights = weights_at(path, step, network)
    config = weights.config
    _require_configured(config)
    loads, torch = has_torch_loader(config), has_torch_loader(config) or in_timm(config)
    card, kept = model_card(path, weights).encode(), _keeps_card(folder, weights)
    with writing(folder, ANOTHER):
        folder.mkdir(parents=True, exist_ok=True)
        loader = _loader(folder)
        if not kept:
            (folder / _CARD).unlink(missing_ok=True)
        if not loads:  # existing files belong to another network
            loader.unlink(missing_ok=True)
        if not torch:
            (folder / _WEIGHTS).unlink(missing_ok=True)
    # First: the file marks the folder as an export, so that an interrupted one can be repeated.
    found = _hub_config(config)
    found["ssl_jax"]["card"] = _checksum(card)
    _write_json(folder / "config.json", found)
    write_weights(weights, folder / _ALL_WEIGHTS)
    if torch:
        _write_torch(weights, folder / _WEIGHTS)
    if loads:
        _write(loader, _source())
    _write_json(folder / "preprocessor_config.json", _hub_preprocessing(config))
    if not kept:
        _write(folder / _CARD, card)
    return kept


def _keeps_card(folder: Path, weights: Weights) -> bool:
    """Whether a folder's README.md is kept, as it is an edited card of these weights.

    Raises:
      UserError: it is an edited card of other weights.
    """
    file = folder / _CARD
    if not os.path.lexists(file):
        return False
    with reading(file):
        unedited = _checksum(read_regular(file)) == _recorded_card(folder / "config.json")
    if unedited:
        return False
    if _is_of(folder / _ALL_WEIGHTS, weights):
        return True
    raise UserError(
        f"{file} has been edited and describes other weights. Move it away, or choose another "
        "--out folder."
    )


def _is_of(file: Path, weights: Weights) -> bool:
    """Whether an exported file has the encoder of these weights."""
    try:
        before = read_weights(file)
    except UserError:
        return False
    trees = [_encoder(each) for each in (before, weights)]
    return trees[0].keys() == trees[1].keys() and all(
        np.array_equal(array, trees[1][name]) for name, array in trees[0].items()
    )


def _encoder(weights: Weights) -> dict[str, np.ndarray]:
    """An encoder's arrays, by name."""
    tree = _on_host(weights.params["encoder"], weights.batch_stats.get("encoder", {}))
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _recorded_card(file: Path) -> str:
    """The checksum in an export's `config.json` of the card as it was generated; "" without one."""
    try:
        found = json.loads(read_regular(file))
        return str(found["ssl_jax"]["card"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        return ""


def _checksum(card: bytes) -> str:
    return f"{zlib.crc32(card):08x}"


def _require_no_other_files(folder: Path) -> None:
    """Refuses a folder, such as a run or a project, whose files an export would replace."""
    others = [name for name in _FOLDER_FILES if os.path.lexists(folder / name)]
    begun = others == ["config.json"]
    whole = any((folder / name).is_file() for name in (_WEIGHTS, _ALL_WEIGHTS))
    if others and not (_is_export(folder / "config.json") and (begun or whole)):
        raise UserError(
            f"{folder} contains a {others[0]} that is not from an earlier export: choose another "
            "--out folder, which may be a new one."
        )


def _is_export(file: Path) -> bool:
    """Whether a file is the `config.json` of an exported folder."""
    try:
        found = json.loads(read_regular(file)) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and {"ssl_jax", "pretrained_cfg"} <= found.keys()


def _write_json(file: Path, content: dict[str, Any]) -> None:
    _write(file, (json.dumps(content, indent=2) + "\n").encode())


def _hub_config(config: ConfigDict) -> dict[str, Any]:
    """`config.json` as timm reads it."""
    how = preprocessing(config)
    height, width, channels = view_shape(config, flat_views(config)[0])
    is_resnet = config.model.name == "resnet"
    first = "conv1" if is_resnet else "patch_embed.proj"
    mean, std = how["mean"] or [0.0] * channels, how["std"] or [1.0] * channels
    if config.data.range:  # timm divides by the largest value of the type
        (low, high), largest = config.data.range, largest_value(config.data.bits)
        mean = [(low + (high - low) * x) / largest for x in mean]
        std = [(high - low) * x / largest for x in std]
    found: dict[str, Any] = {
        "num_classes": 0,
        "num_features": make_encoder(config).num_features,
        "pretrained_cfg": {
            "tag": f"ssl_jax_{config.method}",
            "input_size": [channels, height, width],
            "fixed_input_size": False,
            "pool_size": None,
            "interpolation": how["interpolation"],
            "crop_pct": how["crop_fraction"],
            "mean": mean,
            "std": std,
            "num_classes": 0,
            # timm adapts it to other channels; some versions would do so from 3 to the same ones.
            "first_conv": first if channels == 3 else None,
            "classifier": "fc" if is_resnet else "head",
        },
        "ssl_jax": {
            **architecture(config.model),
            "method": config.method,
            "antialias": how["antialias"],  # timm and Hugging Face always antialias
        },
    }
    if not in_timm(config):
        return found
    if config.model.name == "vit":
        name, arguments = timm_arguments(config)
    else:
        name = f"resnet{config.model.depth}"
        arguments = {"in_chans": channels} if channels != 3 else {}
    if arguments:
        found["model_args"] = arguments  # of timm.create_model
    return {"architecture": name, **found}


def _hub_preprocessing(config: ConfigDict) -> dict[str, Any]:
    """`preprocessor_config.json` as Hugging Face's image processors read it."""
    how = preprocessing(config)
    height, width, channels = view_shape(config, flat_views(config)[0])
    low, high = how["values"]
    # The lowest value becomes 0 by the normalization, as it isn't subtracted before.
    offset = low / (high - low)
    return {
        "image_processor_type": "BitImageProcessor",
        "do_convert_rgb": channels == 3,
        "do_resize": True,
        # Of a size that is not square, at least the whole crop.
        "size": {"shortest_edge": round(max(height, width) / how["crop_fraction"])},
        "resample": {"bilinear": 2, "bicubic": 3}[how["interpolation"]],
        "do_center_crop": True,
        "crop_size": {"height": height, "width": width},
        "do_rescale": True,
        "rescale_factor": 1 / (high - low),
        "do_normalize": bool(how["mean"] or offset),
        "image_mean": [mean + offset for mean in how["mean"] or [0.0] * channels],
        "image_std": how["std"] or [1.0] * channels,
    }
