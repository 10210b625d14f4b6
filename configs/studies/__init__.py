"""Sweeps: a base config, a grid of its keys and the seeds."""
