"""Writes features for TensorBoard's embedding projector."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from tensorboardX import embedding

from ssl_jax.diagnostics import unit_rows
from ssl_jax.files import subfolder
from ssl_jax.report.images import contact_sheet

_FOLDER = "projector"


def write_projector(
    workdir: Path,
    features: Float[np.ndarray, "n d"],
    names: list[str],
    images: UInt8[np.ndarray, "n s s 3"],
    step: int,
) -> None:
    """Writes `projector_config.pbtxt` and the files it names, replacing earlier ones.

    Args:
      workdir: the run's folder, where TensorBoard also looks for events.
      features: written as unit vectors, to five decimals.
      names: of the images' classes; empty without labels.
      images: squares.
      step: of the features.
    """
    folder = subfolder(workdir, _FOLDER)
    files = (folder / name for name in ("tensors.tsv", "metadata.tsv", "sprite.png"))
    for file in (workdir / "projector_config.pbtxt", *files):
        file.unlink(missing_ok=True)  # tensorboardX and Pillow would follow a link
    embedding.make_mat(unit_rows(features).round(5), str(folder))
    if names:
        # A tab or a line break would start another column or row.
        embedding.make_tsv([" ".join(name.split()) or "?" for name in names], str(folder))
    Image.fromarray(contact_sheet(images)).save(folder / "sprite.png")
    # Last: the config names the other files. Of the images, it needs only the size.
    channels_first = images.transpose(0, 3, 1, 2)
    embedding.append_pbtxt(names or None, channels_first, str(workdir), _FOLDER, step, "features")
