"""Analyses of a model that need no training."""
