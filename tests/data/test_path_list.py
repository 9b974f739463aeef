import os

import numpy as np
import pytest
from images import by_id, config_of, fill, read
from tiny import tiny_config

from ssl_jax.data.folder import FolderSource
from ssl_jax.data.listing import require_data
from ssl_jax.data.path_list import PathsSource
from ssl_jax.data.sources import make_sources
from ssl_jax.errors import UserError

pytest.importorskip("tensorflow")


def source_of(file, text, encoding="utf-8", **data):
    file.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
    return PathsSource(config_of(file, **{"name": "paths", **data}))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return fill(tmp_path_factory.mktemp("images"), per_class=2)


def listed(root):
    return sorted(str(file.relative_to(root)) for file in root.rglob("*.png"))


def test_list_reads_the_same_views_as_the_folder(images, tmp_path):
    names = listed(images)
    relative = source_of(images / "list.txt", "\n".join(names))
    absolute = source_of(tmp_path / "a.lst", "\r\n\r\n".join(f"{images}/{n}" for n in names) + "\n")
    folder, steps = FolderSource(config_of(images)), [(0, [5, 0]), (3, [2, 2])]
    expected = by_id(read(folder, steps), steps)
    for source in (relative, absolute):
        assert source.labels is None and source.num_examples == 6
        assert by_id(read(source, steps), steps) == expected
    assert relative.names([0, 5]) == names[::5]
    assert absolute.names([0]) == [f"{images}/{names[0]}"]


def test_table_has_labels_by_name_or_number(images):
    names = listed(images)
    rows = ["path,kind,n", *(f'"{name}",{name[:3]},{i}' for i, name in enumerate(names))]
    rows[3] = rows[3].replace("dog,2", ",")
    source = source_of(images / "a.csv", "\n".join(rows), image_key="path", label_key="kind")
    assert source.class_names == ("cat", "dog", "emu")
    assert source.labels.tolist() == [0, 0, -1, 1, 2, 2]
    assert source.labels_from == f"column 'kind' of {images / 'a.csv'}"
    source = source_of(images / "a.csv", "\n".join(rows), image_key="path", label_key="n")
    assert source.labels.tolist() == [0, 1, -1, 3, 4, 5] and source.class_names == tuple("012345")
    text = "\ufeffimage\tlabel\r\n" + "".join(f"{name}\t-1\r\n" for name in names)
    source = source_of(images / "b.TSV", text)
    assert source.labels is None and source.num_classes == 0
    assert source_of(images / "b.tsv", text, label_key="").names([1]) == names[1:2]


def test_names_of_any_bytes_are_read(images, tmp_path):
    odd = os.fsencode(images / listed(images)[0])
    os.symlink(odd, os.fsencode(tmp_path) + b"/a, \xff.png")
    source = source_of(tmp_path / "list.txt", b"a, \xff.png\n")
    assert source.eval_transform([0]).shape == (1, 16, 16, 3)
    assert source.names([0]) == ["a, \\udcff.png"]


def test_fingerprint_depends_on_lines_and_labels(images):
    names = listed(images)

    def fingerprint(names, labels="012345"):
        rows = [f"{name},{label}" for name, label in zip(names, labels, strict=False)]
        return source_of(images / "f.csv", "\n".join(["image,label", *rows])).fingerprint

    found = {fingerprint(names), fingerprint(names[::-1]), fingerprint(names, "102345")}
    assert len(found) == 3 and fingerprint(names) in found


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("a.txt", "\n \n", "which names no images. Write a path per line"),
        ("a.txt", "\x89PNG\0", "is not text. Set config.data.dir to a list or a folder"),
        ("a.csv", "", "which names no images"),
        ("a.txt", "cat/9.png\n", "whose first image, cat/9.png, is not in "),
        ("a.csv", "images,label\ncat/0.png,1\n", "image_key is 'image', which is not a column"),
        ("a.csv", "image,kind\ncat/0.png,1\n", "label_key is 'label', .* For no labels, set it to"),
        ("a.csv", "image,label\ncat/0.png\n", "has 1 cells in row 2 of 2 columns, or no path"),
        ("a.csv", "image,label\n,1\n", "has 2 cells in row 2 of 2 columns, or no path"),
        ("a.csv", 'image,label\n"cat/0.png,1\n', "is not a valid table .unexpected end of data"),
        ("a.csv", "image,label\ncat/0.png,-2\n", r"has the label -2 \(image 0\)"),
    ],
)
def test_wrong_lists_are_refused_in_a_sentence(images, file, text, words):
    with pytest.raises(UserError, match=words):
        source_of(images / file, text)


def test_missing_lists_and_files_are_named(images):
    config = tiny_config()
    config.data.name = "paths"
    for path, words in (
        ("", "config.data.dir is empty. Set it to a list of images"),
        (str(images), "config.data.dir is .*, which is not a file"),
    ):
        config.data.dir = path
        for check in (require_data, make_sources):
            with pytest.raises(UserError, match=words):
                check(config)
    source = source_of(images / "list.txt", "cat/0.png\ncat/absent.png\n")
    with pytest.raises(UserError, match="Cannot read .*cat/absent.png .No such file"):
        source.eval_transform(np.array([1]))


def test_table_has_several_classes_per_image(images):
    names, data = listed(images), {"image_key": "path", "label_separator": ";"}
    cells = ["cat;dog", "", "?cat; emu", "dog", "dog", "emu"]
    rows = ["path,label", *(f"{name},{cell}" for name, cell in zip(names, cells, strict=True))]
    source = source_of(images / "several.csv", "\n".join(rows), **data)
    assert source.labels is None and source.targets.names == ("cat", "dog", "emu")
    assert source.targets.values[:3].tolist() == [[1, 1, 0], [0, 0, 0], [-1, 0, 1]]
    assert source.labels_from.startswith("column 'label'")
    one = source_of(images / "several.csv", "\n".join(rows), image_key="path")
    assert one.targets is None and "cat;dog" in one.class_names
    with pytest.raises(UserError, match="label_separator is ';', but .* has no labels"):
        source_of(images / "plain.txt", "\n".join(names), label_separator=";")
