"""Names the checkpoints that a run writes, and how the epoch of each was chosen."""

LAST, BEST, BEST_ON_TEST = "last.safetensors", "best.safetensors", "best_on_test.safetensors"
LAST_EPOCH, ON_TEST, ON_HELD_OUT = "last", "best on test", "chosen on held-out"
CHECKPOINT_FILES = {ON_HELD_OUT: BEST, LAST_EPOCH: LAST, ON_TEST: BEST_ON_TEST}
"""How the epoch was chosen -> file. The first one that is there is the one to use."""
