import os
import subprocess
import sys

import pytest

from ssl_jax.cli import backend

FLAG = "xla_cpu_experimental_ynn_fusion_type"


@pytest.fixture
def environment(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x")
    return monkeypatch


def flags_after(monkeypatch):
    backend.tune_cpu()
    return backend.os.environ["XLA_FLAGS"]


def test_flag_is_added_once_to_existing_flags(environment):
    environment.setattr(backend.metadata, "version", lambda _: "0.10.2")
    flags = flags_after(environment).split()
    assert flags[0] == "--xla_dump_to=x" and FLAG in flags[1] and len(flags) == 2
    assert flags_after(environment).split() == flags


def test_flag_is_not_added_for_an_untested_jaxlib(environment):
    environment.setattr(backend.metadata, "version", lambda _: "99.0.0")
    assert FLAG not in flags_after(environment)


@pytest.mark.parametrize("platforms", ["cuda", "tpu", "cuda,cpu"])
def test_flag_is_not_added_for_accelerator_platforms(environment, platforms):
    environment.setenv("JAX_PLATFORMS", platforms)
    environment.setattr(backend.metadata, "version", lambda _: "0.10.2")
    assert FLAG not in flags_after(environment)


def test_flag_is_not_added_if_an_accelerator_package_is_installed(environment):
    environment.delenv("JAX_PLATFORMS")
    environment.setattr(backend.metadata, "version", lambda _: "0.10.2")
    environment.setattr(backend.importlib.util, "find_spec", lambda name: name == "libtpu" or None)
    assert FLAG not in flags_after(environment)
    environment.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert FLAG in flags_after(environment)


def test_installed_jaxlib_accepts_the_flag():
    code = (
        "import os\nos.environ['XLA_FLAGS'] = ''\n"
        "from ssl_jax.cli import backend\nbackend.tune_cpu()\n"
        "import jax\nprint(jax.jit(lambda x: x + 1)(1))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.fixture
def user_cache(monkeypatch, tmp_path):
    """No folder is set, so the user's is used; what the test sets is undone."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ssl_jax"


def test_compiled_programs_are_cached_in_the_users_cache_folder(user_cache, monkeypatch):
    assert backend.cache_compilations() == ""
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(user_cache) and user_cache.is_dir()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored
    monkeypatch.setenv("HOME", str(user_cache.parent))
    backend.cache_compilations()
    expected = user_cache.parent / ".cache" / "ssl_jax"
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(expected)


@pytest.mark.parametrize("folder", ["", "/elsewhere"])
def test_cache_folder_of_the_environment_is_kept(user_cache, monkeypatch, folder):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", folder)
    assert backend.cache_compilations() == ""
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == folder and not user_cache.exists()


def test_nothing_is_cached_through_a_link(user_cache):
    (user_cache.parent / "others").mkdir()
    user_cache.symlink_to(user_cache.parent / "others")
    message = backend.cache_compilations()
    assert message.startswith(f"warning: compiled programs are not cached in {user_cache} (a link")
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_least_recently_used_programs_are_removed_from_the_cache(user_cache, monkeypatch):
    monkeypatch.setattr(backend, "_CACHE_BYTES", 20)
    user_cache.mkdir()
    for number, name in enumerate("abc"):
        (user_cache / name).write_bytes(bytes(10))
        os.utime(user_cache / name, (number, 100 - number))
    backend.cache_compilations()
    assert {file.name for file in user_cache.iterdir()} == {"b", "c"}
