import os

import pytest

from ssl_jax.data.listing import list_images
from ssl_jax.errors import UserError

UP = {"cat/0.png": None, "cat/loop": ".."}
APART = {"cat/0.png": None, "elsewhere": "../elsewhere", "../elsewhere/back": "../images"}
LINKED = {
    "cat/0.png": None,
    "cat/1.png": "../../stored/1.png",
    "dog": "../stored",
    "../stored/1.png": None,
}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param(
            {"cat/0.PNG": None, "dog/1.Jpg": None, "dog/a.JPEG": None},
            {"cat": ["cat/0.PNG"], "dog": ["dog/1.Jpg", "dog/a.JPEG"]},
            id="suffixes in upper case",
        ),
        pytest.param(
            {"a cat/b c.png": None, "çà/日本.png": None, "b\nc/é\t.png": None},
            {"a cat": ["a cat/b c.png"], "b\nc": ["b\nc/é\t.png"], "çà": ["çà/日本.png"]},
            id="unicode, spaces and line breaks",
        ),
        pytest.param(
            {
                "cat/b/0.png": None,
                "cat/a/deep/1.png": None,
                "cat/z.png": None,
                "dog/cat/0.png": None,
            },
            {"cat": ["cat/a/deep/1.png", "cat/b/0.png", "cat/z.png"], "dog": ["dog/cat/0.png"]},
            id="nested folders are of the first level's class",
        ),
        pytest.param(
            {"cat/0.png": None, "cat/._0.png": None, ".dog/0.png": None, "cat/.x": "nowhere"},
            {"cat": ["cat/0.png"]},
            id="hidden files and folders are skipped",
        ),
        pytest.param(
            LINKED, {"cat": ["cat/0.png", "cat/1.png"], "dog": ["dog/1.png"]}, id="links to both"
        ),
        pytest.param(UP, "cat/loop is a symbolic link back to {}, which contains it", id="cycle"),
        pytest.param(APART, "elsewhere/back is a symbolic link back to {}", id="cycle outside"),
        pytest.param(
            {"cat/0.png": None, "dog": "gone"},
            "dog is a symbolic link to gone, which can't be reached (No such file",
            id="link without a target",
        ),
        pytest.param(
            {"cat/0.png": None, "cat/a.png": "a.png"},
            "cat/a.png is a symbolic link to a.png, which can't be reached (Too many levels",
            id="link to itself",
        ),
        pytest.param(
            {"cat/0.png": None, "dog/": None}, "where dog contains no", id="empty class folder"
        ),
    ],
)
def test_names_and_links_have_these_outcomes(tmp_path, given, expected):
    """`given` maps names to the targets of links; None: a file, or a folder if it ends in /."""
    root = tmp_path / "images"
    root.mkdir()
    for name, target in given.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if target:
            path.symlink_to(target)
        elif name.endswith("/"):
            path.mkdir()
        else:
            path.write_bytes(b"")
    if isinstance(expected, str):
        with pytest.raises(UserError) as caught:
            list_images(str(root), "config.data.dir")
        assert expected.format(root) in str(caught.value)
        return
    files, labels, names = list_images(str(root), "config.data.dir")
    found = {name: [] for name in names}
    for file, label in zip(files, labels, strict=True):
        found[names[label]].append(os.path.relpath(file, root))
    assert found == expected and list(found) == sorted(expected)
