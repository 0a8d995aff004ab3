"""fastbert: the fastest exact BERT for people who train, fine-tune and serve encoders."""

from __future__ import annotations

__version__ = "0.1.0"
