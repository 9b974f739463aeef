"""Prepares small TFDS datasets from image files."""

import tensorflow_datasets as tfds
from images import COLORS


def build(
    folder,
    images,
    file_format,
    name="pictures",
    version="5.1.0",
    splits=("train", "test"),
    classes=3,
):
    """Prepares a dataset from the PNG files under `images`, in several shards.

    A split called "unlabeled" has the label -1, like ImageNet's test split. The feature "labels"
    lists an image's own class and the first; images of the second have none.
    """
    files = sorted(images.glob("*/*.png"))
    names = [*COLORS, *(f"class {i}" for i in range(3, classes))]

    def examples(self, split):
        for file in files:
            label = -1 if split == "unlabeled" else file.parent.name
            several = [] if label in (-1, names[1]) else sorted({names[0], label})
            example = {"image": str(file), "label": label, "file": file.name, "labels": several}
            yield f"{file.parent.name}/{file.name}", example

    def info(self):
        features = {
            "file": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="png"),
            "label": tfds.features.ClassLabel(names=names),
            "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=names)),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    members = {
        "VERSION": tfds.core.Version(version),
        "name": name,
        "_info": info,
        "_split_generators": lambda self, _: {s: self._generate_examples(s) for s in splits},
        "_generate_examples": examples,
    }
    kind = type(name, (tfds.core.GeneratorBasedBuilder,), members, skip_registration=True)
    builder = kind(data_dir=str(folder), file_format=file_format)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3, try_download_gcs=False)
    )
    return builder
