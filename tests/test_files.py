"""Atomic file writing and its error messages."""

import os
from pathlib import Path

import pytest

from ssl_jax.errors import UserError
from ssl_jax.files import (
    appending,
    local_path,
    private_folder,
    read_regular,
    reading,
    reason,
    replacing,
    subfolder,
    writing,
    writing_output,
)


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
        with writing_output(file) as temporary:
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


def test_replacing_a_link_leaves_its_target_unchanged(tmp_path):
    target, link = tmp_path / "target", tmp_path / "a.txt"
    target.write_text("mine")
    link.symlink_to(target)
    with replacing(link) as temporary:
        assert not temporary.is_symlink()
        temporary.write_text("new")
    assert target.read_text() == "mine"
    assert link.read_text() == "new" and not link.is_symlink()


def test_temporary_names_are_unpredictable_and_final_permissions_follow_the_umask(tmp_path):
    names = set()
    for _ in range(2):
        with replacing(tmp_path / "a.txt") as temporary:
            names.add(temporary.name)
    assert len(names) == 2
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize("kind", ["link", "hard link", "pipe", "folder"])
def test_only_regular_files_are_appended_to(tmp_path, kind):
    target, file = tmp_path / "target", tmp_path / "log"
    target.write_text("mine")
    {
        "link": lambda: file.symlink_to(target),
        "hard link": lambda: file.hardlink_to(target),
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
    }[kind]()
    with pytest.raises(UserError, match=r"\)\. Move it away, then rerun the same"), writing(file):
        appending(file)
    assert target.read_text() == "mine"


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("device", "not a regular file"),
        ("pipe", "not a regular file"),
        ("folder", "Is a directory"),
        ("huge", "larger than 67,108,864 bytes"),
        ("missing", "No such file"),
    ],
)
def test_only_regular_files_up_to_a_limit_are_read(tmp_path, kind, why):
    """A device has no end, and opening a pipe waits for a writer."""
    file = tmp_path / "config.json"
    {
        "device": lambda: file.symlink_to("/dev/zero"),
        "pipe": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "huge": lambda: (file.touch(), os.truncate(file, 2**40)),
        "missing": lambda: None,
    }[kind]()
    with pytest.raises(OSError, match=why) as error:
        read_regular(file)
    assert error.value.filename == str(file)


def test_links_to_regular_files_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"one")
    (tmp_path / "b").symlink_to("a")
    assert read_regular(tmp_path / "b", 3) == b"one"


def test_appending_creates_the_file_and_keeps_its_lines(tmp_path):
    for line in ("one\n", "two\n"):
        with appending(tmp_path / "log") as file:
            file.write(line)
    assert (tmp_path / "log").read_text() == "one\ntwo\n"


def test_link_in_place_of_a_subfolder_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "evals").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="a link or a file in place of a folder"):
        subfolder(tmp_path, "evals")
    assert subfolder(tmp_path, "new") == subfolder(tmp_path, "new") == tmp_path / "new"


def test_replaced_file_and_its_folder_are_flushed_to_the_disk(tmp_path, monkeypatch):
    """After a power cut, a renamed file that was never flushed may be empty."""
    events, sync, rename = [], os.fsync, os.replace

    def record_sync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        events.append("folder" if path == str(tmp_path) else "file")
        sync(descriptor)

    def record_rename(old, new):
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "replace", record_rename)
    with replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("x")
    assert events == ["file", "rename", "folder"]


def test_private_folder_is_only_for_its_user(tmp_path):
    folder = private_folder(tmp_path / "cache" / "ours")
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o755)
    assert private_folder(folder).stat().st_mode & 0o777 == 0o700
    folder.chmod(0o770)
    with pytest.raises(OSError, match="others own it or can write to it"):
        private_folder(folder)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(OSError, match="a link or a file in place of a folder"):
        private_folder(tmp_path / "link")


def test_read_errors_name_the_file_the_cause_and_a_fix(tmp_path):
    message = r"^Cannot read .*absent \(No such file or directory\)\. Check the path and its perm"
    with pytest.raises(UserError, match=message):
        with reading(tmp_path):
            (tmp_path / "absent").read_bytes()  # named, though the path is its folder
    with pytest.raises(UserError, match=r"^Cannot read a \(disk gone\)\. Mount it\.$"):
        with reading("a", "Mount it", ValueError):
            raise ValueError("disk gone.\nmore")
    with pytest.raises(KeyError), reading("a"):
        raise KeyError("x")


def test_paths_are_expanded_and_refused_where_they_enter(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert local_path("~/a") == tmp_path / "a"
    (tmp_path / "file").touch()
    assert local_path(tmp_path / "file" / "a") == tmp_path / "file" / "a"
    (tmp_path / "loop").symlink_to("loop")
    for path, cause in (
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
        ("~no.such.user/a", "Could not determine home directory"),
        ("a\0b", "embedded null byte"),
    ):
        with pytest.raises(UserError, match=rf"^Cannot use the path .* \({cause}\)\. Check"):
            local_path(path)
    for url in ("gs://bucket/run", "s3:/bucket/run", Path("hdfs://host/run"), "abc://x"):
        with pytest.raises(UserError, match=f"^{url} is a URL"):
            local_path(url)
    with pytest.raises(UserError, match="^config.data.dir is gs://b, a URL, not a path. Mount"):
        local_path("gs://b", "config.data.dir")
    assert local_path("run1:/x") == Path("run1:/x")
