__version__ = "0.1.0"
"""This library's version, stated nowhere else."""
