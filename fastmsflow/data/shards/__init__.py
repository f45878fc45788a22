"""Shards: large image sets as tar files with a manifest, written, and read as a stream."""
