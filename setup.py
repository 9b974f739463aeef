"""Packaging. Versions are pinned in constraints.txt; here are the oldest that will do."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (HERE / "ssl_jax/version.py").read_text(), re.M)[1]

# Apart from the rest because TensorFlow is big, and training from arrays does not need it.
DATA = [
    "tensorflow-cpu>=2.20; sys_platform == 'linux' and platform_machine == 'x86_64'",
    "tensorflow>=2.20; sys_platform != 'linux' or platform_machine != 'x86_64'",
    "tensorflow-datasets>=4.9.8",
    "array_record>=0.8.6; sys_platform != 'win32'",
]

# Draws the picture of a config's views.
PICTURES = ["matplotlib>=3.9"]

# Writes features as Parquet.
PARQUET = ["pyarrow>=20"]

# Reads TIFFs of other channels and depths than Pillow, in all of their compressions.
TIFF = ["imagecodecs>=2024.6", "tifffile>=2024.6"]

# Reads datasets in Hugging Face's formats. Needs TensorFlow, too, to crop images.
HF = ["datasets>=4.0"]

# What tests run on, apart from DATA.
TEST = ["beartype>=0.23", "hypothesis>=6.100", "pytest>=8.3", "pytest-xdist>=3.6"]

DOCS = ["furo>=2025.1", "myst-parser>=5.0", "sphinx>=9.0", "sphinx-copybutton>=0.5"]

setup(
    name="ssl_jax",
    version=VERSION,
    description="Self-supervised image pretraining on JAX, from a laptop CPU to a TPU pod",
    long_description=(HERE / "README.md").read_text(),
    long_description_content_type="text/markdown",
    author="ssl_jax authors",
    license="Apache-2.0",
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    packages=find_packages(include=["ssl_jax", "ssl_jax.*"]),
    package_data={"ssl_jax": ["report/templates/*", "interop/*.txt"]},
    python_requires=">=3.11",
    install_requires=[
        "flatbuffers>=24.3",  # of jax.export
        "flax>=0.12",
        "humanize>=4.12",
        "jax>=0.10",
        "jinja2>=3.1.4",
        "jaxtyping>=0.3",
        "lazy_loader>=0.4",
        "ml_collections>=1.1",
        "numpy>=2.0",
        "optax>=0.2.6",
        "orbax-checkpoint>=0.12",
        "pillow>=11.0",
        "safetensors>=0.5",
        "scikit-learn>=1.6",
        "scipy>=1.14",
        "tensorboardX>=2.6.2",
        "threadpoolctl>=3.1",
    ],
    extras_require={
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "plan": ["libtpu"],
        "data": DATA,
        "pictures": PICTURES,
        "parquet": PARQUET,
        "hf": [*DATA, *HF],
        "tiff": TIFF,
        # Other packages, to compare with: tests/peers.
        "peers": [
            *TEST,
            *PICTURES,
            "dm-haiku>=0.0.14",
            "timm>=1.0",
            "torch>=2.13",
            "torchvision>=0.28",
        ],
        "docs": DOCS,
        "wandb": ["wandb>=0.20"],
        "test": [*DATA, *HF, *PARQUET, *PICTURES, *TEST, *TIFF],
        "dev": [
            *DATA,
            *DOCS,
            *HF,
            *PARQUET,
            *PICTURES,
            *TEST,
            *TIFF,
            "build>=1.2",
            "import-linter>=2.5",
            "mypy>=1.15",
            "pip-audit>=2.9",
            "playwright>=1.50",  # drives a Chromium that is on the machine; installs none
            "pre-commit>=4.0",
            "pytest-randomly>=4.0",
            "ruff>=0.12",
            "setuptools>=77",
            "wandb>=0.20",
        ],
    },
    # By a path and no finder: else a script that lies beside the clone, a folder of the same name,
    # imports that folder.
    options={"editable_wheel": {"mode": "compat"}},
    entry_points={"console_scripts": ["ssl-jax = ssl_jax.cli.main:main"]},
)
