"""What fastle is made of, what it needs and the commands it brings. Dependencies are declared here and nowhere else."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# a top-level package named `kernels` would collide with Hugging Face's, so kernels/ is imported as fastle.kernels,
# through the link fastle/kernels -> ../kernels. with no mapping but the root's, setuptools makes an editable install of
# a path, which type checkers follow, and not of an import hook, which they cannot. a checkout without symbolic links
# (Windows, some archives) has no such directory and needs the mapping.
PACKAGE_DIR = {"": "."}
if not (ROOT / "fastle" / "kernels").is_dir():
    PACKAGE_DIR["fastle.kernels"] = "kernels"

# triton and DALI publish wheels for these machines alone; elsewhere the torch paths do the work. torch for CUDA brings
# triton itself; the commands want it on a CPU too, where torch's wheels have none
LINUX = 'sys_platform == "linux" and (platform_machine == "x86_64" or platform_machine == "aarch64")'
# 2.4 is the first with custom_op: scripts/oldest_torch.sh tests the base there. the extras that compute start at 2.11
BASE_TORCH, TORCH = "torch>=2.4", "torch>=2.11"
PARQUET = ["pyarrow"]
HEIC = ["pillow-heif"]
# InceptionV3 as FID has it
PERCEPTUAL = [TORCH, "torch-fidelity"]
# the first release whose HTTP library is httpx
HUB = ["huggingface_hub>=1.0"]
EXPORT = [TORCH, "onnx", "onnxruntime", "onnxscript"]
COMPLETION = ["shtab"]
LOGGERS = {name: [name] for name in ("tensorboard", "trackio", "wandb")}
# what training needs with any build of torch: the one for ROCm has a triton of its own, which upstream's would replace
TRAIN_NO_CUDA = [
    TORCH,
    "torchvision>=0.26",
    "filelock",
    "matplotlib",
    "pillow",
    "rich",
    "tomli; python_version < '3.11'",
    "torchmetrics",
]
TRAIN = [*TRAIN_NO_CUDA, f"triton>=3.6; {LINUX}", f"nvidia-dali-cuda130>=2.4; {LINUX}"]
DEMO = [TORCH, "pillow", "rich", "starlette", "uvicorn"]
DOCS = ["mkdocs>=1.6,<2", "mkdocs-material>=9.7", "mkdocstrings[python]>=1"]
DEV = [
    *TRAIN,
    *HUB,
    *PARQUET,
    *HEIC,
    *DEMO,
    *DOCS,
    *EXPORT,
    *COMPLETION,
    *LOGGERS["tensorboard"],
    "build",
    "hypothesis",
    # of the examples
    "lightning",
    "mypy",
    "playwright",
    "pytest>=8",
    "pytest-xdist",
    # a minor release may change rules and layout: a new one is taken on purpose, not by whoever installs next
    "ruff>=0.17,<0.18",
    # tests compare the probes with its own
    "scikit-learn",
    # of the examples
    "timm",
]

setup(
    name="fastle",
    version="0.2.0",
    description="Self-teaching autoencoders in PyTorch: a trainer and the fused operators behind it",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="fastle contributors",
    keywords=["autoencoder", "self-supervised learning", "SIGReg", "LeJEPA", "PyTorch", "Triton"],
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    packages=[*find_packages(include=["fastle", "fastle.*"]), "fastle.kernels"],
    package_dir=PACKAGE_DIR,
    package_data={
        "fastle": ["py.typed", "weights/*/*"],
        "fastle.kernels": ["*.cpp"],
        "fastle.web": ["base.css", "brush/*", "report/*"],
    },
    install_requires=[BASE_TORCH, "numpy", "safetensors"],
    extras_require={
        "train": TRAIN,
        "train-no-cuda": TRAIN_NO_CUDA,
        "hub": HUB,
        "parquet": PARQUET,
        "heic": HEIC,
        "perceptual": PERCEPTUAL,
        "demo": DEMO,
        "docs": DOCS,
        "export": EXPORT,
        "completion": COMPLETION,
        **LOGGERS,
        "dev": DEV,
        "test": DEV,
    },
    entry_points={
        "console_scripts": [
            "fastle = fastle.commands.start:fastle",
            "fastle-train = fastle.commands.start:fastle_train",
        ]
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
