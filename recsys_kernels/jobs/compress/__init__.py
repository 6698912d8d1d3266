"""Trains a ranking model, compresses it every way, measures each form."""
