"""Reads and writes the reference implementation's checkpoints, and replaces its flows."""

from .accelerate import accelerate
from .build_model import build_msflow_model
from .official_checkpoint import load_official, save_official

__all__ = ["accelerate", "build_msflow_model", "load_official", "save_official"]
