"""Compression of trained models, and the job that measures it."""
