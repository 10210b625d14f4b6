"""The classic convolutional networks as runnable case studies in JAX and Flax."""

__version__ = "0.1.0"
