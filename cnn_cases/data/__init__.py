"""Turns TFDS data sets into batches."""
