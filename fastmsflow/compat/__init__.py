"""The reference implementation's checkpoints."""

from .official import load_official, save_official

__all__ = ["load_official", "save_official"]
