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
