"""Spark's daemon with everything imported that a Python worker needs: workers are forked off it, and each of them would
import for seconds."""

from pyspark.daemon import manager

if __name__ == "__main__":
    import pandas  # noqa: F401
    import pyarrow  # noqa: F401
    import timm  # noqa: F401

    import fastmsflow.integrations.spark  # noqa: F401

    manager()
