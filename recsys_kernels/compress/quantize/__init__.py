"""Quantization: the ranges of activations, and equalization of channels."""
