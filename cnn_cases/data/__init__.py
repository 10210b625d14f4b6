"""TFDS sets in, batches out."""
