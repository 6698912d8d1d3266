"""Pruning: masks, schedules, whole neurons, sensitivity."""
