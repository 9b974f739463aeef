"""Atomic file writing and its error messages."""

import pytest

from ssl_jax.errors import UserError
from ssl_jax.files import asked_for, reason, replacing, writing


def test_old_file_stays_until_the_new_one_is_complete(tmp_path):
    file = tmp_path / "a.txt"
    for text in ("one", "two"):
        with replacing(file) as temporary:
            temporary.write_text(text)
            assert temporary.suffix == ".txt" and temporary.parent == tmp_path
            assert not file.exists() or file.read_text() == "one"
        assert file.read_text() == text
    with pytest.raises(KeyboardInterrupt), replacing(file) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert file.read_text() == "two"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]


def test_unwritable_file_named_by_the_user_is_a_user_error(tmp_path):
    file = tmp_path / "absent" / "a.txt"
    message = r"Cannot write .*a.txt \(No such file or directory\)\. .* or choose another path\.$"
    with pytest.raises(UserError, match=message):
        with asked_for(file) as temporary:
            temporary.write_text("x")


def test_write_errors_have_a_short_reason_and_a_fix(tmp_path):
    message = (
        r"Cannot write a \(disk gone\)\. Check free disk space and permissions, then rerun the "
    )
    with pytest.raises(UserError, match=message):
        with writing("a", "then rerun the same command", ValueError):
            raise ValueError("disk gone\nmore")
    with pytest.raises(KeyError), writing("a"):
        raise KeyError("x")
    assert reason(ValueError("/a/long/path: No space left on device, errno 28")) == (
        "No space left on device"
    )
