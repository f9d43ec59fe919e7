"""The demo: a tiny Qwen3.5 and two data sets made on this machine, taken through the whole journey."""

from __future__ import annotations

from sparktune.setup.demo_corpus import write_smoke, write_stdlib
from sparktune.setup.demo_model import MARKER_FILE, make_model

__all__ = ["MARKER_FILE", "make_model", "write_smoke", "write_stdlib"]
