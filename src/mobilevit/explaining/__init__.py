"""Attention and class activation of a model for one image, as arrays and figures."""
