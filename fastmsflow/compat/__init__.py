"""The reference implementation's checkpoints, and its flows by call and state dict."""

from .build import build_msflow_model
from .live import accelerate
from .official import load_official, save_official

__all__ = ["accelerate", "build_msflow_model", "load_official", "save_official"]
