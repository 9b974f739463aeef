"""A source of your own: the images of an HDF5 file.

The file has "images", uint8 [N, H, W, 3], and may have "labels", integers [N], and "class_names".
On the command line: ssl-jax pretrain --import=examples/hdf5_source.py --config.data.name=hdf5
--config.data.dir=train.h5, with --config and --workdir as usual. In Python:
pretrain(config, workdir, train=Hdf5("train.h5")).
"""

import h5py

from ssl_jax import data


@data.register("hdf5")
class Hdf5:
    """Reads the images that a step needs when it needs them."""

    def __init__(self, path):
        file = h5py.File(path)
        self.images = file["images"]
        self.labels = file["labels"][:] if "labels" in file else None
        self.class_names = file["class_names"].asstr()[:] if "class_names" in file else ()

    def __len__(self):
        return len(self.images)

    def read(self, ids):
        """Returns uint8 [n, H, W, 3]; the ids are ascending, as h5py needs them."""
        return self.images[ids]
