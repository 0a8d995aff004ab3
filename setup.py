"""Package map: kernels/ and bench/ sit at the top of the checkout and install inside fastbert.

Neither folder may hold an __init__.py: a top-level package named `kernels` would hide
Hugging Face's `kernels` from transformers in every process that runs from the checkout.
"""

from setuptools import setup

setup(
    packages=[
        "fastbert",
        "fastbert.data",
        "fastbert.training",
        "fastbert.commands",
        "fastbert.metrics",
        "fastbert.tasks",
        "fastbert.kernels",
        "fastbert.bench",
    ],
    package_dir={
        "fastbert": "fastbert",
        "fastbert.kernels": "kernels",
        "fastbert.bench": "bench",
    },
    package_data={"fastbert": ["py.typed"]},
)
