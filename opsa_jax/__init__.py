"""Safety alignment of language models by on-policy (self-)distillation, in JAX."""

__version__ = "0.1.0"
