"""Files are replaced as a whole."""

import pytest

from ssl_jax.errors import UserError
from ssl_jax.files import asked_for, replacing


def test_the_old_one_stays_until_the_new_one_is_whole(tmp_path):
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


def test_what_a_user_has_named_and_cannot_be_written_is_one_sentence(tmp_path):
    file = tmp_path / "absent" / "a.txt"
    with pytest.raises(UserError, match=r"a.txt can't be written \(No such file.*: choose another"):
        with asked_for(file) as temporary:
            temporary.write_text("x")
