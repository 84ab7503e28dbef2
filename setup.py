"""Package definition. Tool settings (ruff, pytest) live in pyproject.toml."""

from setuptools import find_packages, setup

DASHBOARD = ["swanlab[dashboard]>=0.10.3"]
QLORA = ["bitsandbytes>=0.46.1"]

setup(
    name="latexocr",
    version="0.1.0",
    description="Fine-tune vision-language models to read images of formulas as LaTeX",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["latexocr", "latexocr.*"]),
    package_data={"latexocr": ["html/*"]},
    install_requires=[
        "torch>=2.11",
        "torchvision>=0.26",
        "transformers>=5.17",
        "peft>=0.19",
        "accelerate>=1.13",
        "datasets>=4.8",
        "qwen-vl-utils>=0.0.14",
        "swanlab>=0.10.3",
        "pandas>=2.2",
        "pyarrow>=17",
        "modelscope>=1.30",
        "sacrebleu>=2.5",
        "rapidfuzz>=3.9",
        "pillow>=10.4",
        "pyyaml>=6",
        "safetensors>=0.5",
        "tqdm>=4.66",
        "scipy>=1.13",
        "matplotlib>=3.9",
    ],
    extras_require={
        "dashboard": DASHBOARD,
        "tensorboard": ["tensorboard>=2.18"],
        "qlora": QLORA,
        "dev": [
            *DASHBOARD,
            *QLORA,
            "tensorboard>=2.18",
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.6",
            "playwright>=1.50",
            "ruff>=0.9",
        ],
    },
    entry_points={"console_scripts": ["latexocr=latexocr.cli:main"]},
)
