"""Weights: checkpoints, conversion between code bases, public files."""
