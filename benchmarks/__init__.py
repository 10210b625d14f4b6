"""Measures speed, compared with a peer in the same run, and what a training run survives.

Nothing in cnn_cases needs this package.
"""
