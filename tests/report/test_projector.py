import numpy as np
from PIL import Image

from ssl_jax.report.projector import write_projector


def write(folder, names, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(5, 3)).astype(np.float32)
    images = rng.integers(0, 256, (5, 8, 8, 3)).astype(np.uint8)
    write_projector(folder, features, names, images, step=70)
    return features, images


def config(folder):
    """The lines of the config, which names files relative to itself."""
    return [line.strip() for line in (folder / "projector_config.pbtxt").read_text().splitlines()]


def test_projector_files_are_named_by_its_config(tmp_path):
    features, images = write(tmp_path, ["a", "b\tc", "", "d\ne", "f"])
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    folder = tmp_path / "projector"
    np.testing.assert_allclose(np.loadtxt(folder / "tensors.tsv"), unit, atol=1e-5)
    assert (folder / "metadata.tsv").read_text().splitlines() == ["a", "b c", "?", "d e", "f"]
    sheet = np.asarray(Image.open(folder / "sprite.png"))
    assert sheet.shape == (24, 24, 3)
    np.testing.assert_array_equal(sheet[8:16, 8:16], images[4])
    assert config(tmp_path) == [
        "embeddings {",
        'tensor_name: "features:00070"',
        'tensor_path: "projector/tensors.tsv"',
        'metadata_path: "projector/metadata.tsv"',
        "sprite {",
        'image_path: "projector/sprite.png"',
        *["single_image_dim: 8"] * 2,
        "}",
        "}",
    ]


def test_projector_written_twice_has_one_set_of_embeddings(tmp_path):
    write(tmp_path, list("abcde"))
    write(tmp_path, [], seed=1)
    lines = config(tmp_path)
    assert lines.count("embeddings {") == 1 and not any("metadata" in line for line in lines)
