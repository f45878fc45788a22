"""Names the checkpoints that a run writes, and how the epoch of each was chosen."""

LAST, BEST, BEST_ON_TEST = "last.safetensors", "best.safetensors", "best_on_test.safetensors"
LAST_EPOCH, ON_TEST, ON_HELD_OUT = "last", "best on test", "chosen on held-out"
CHECKPOINT_FILES = {ON_HELD_OUT: BEST, LAST_EPOCH: LAST, ON_TEST: BEST_ON_TEST}
"""The ways in which an epoch is chosen, and their files; the first file that exists is the one to use."""
