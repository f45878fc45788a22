"""Bridges to other software: exported graphs, scikit-learn's conventions, anomalib."""
