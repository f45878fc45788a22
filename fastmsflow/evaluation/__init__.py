"""Evaluates models on test sets: scores, ground truth, metrics, checkpoints side by side, a report."""
