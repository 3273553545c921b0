"""These tests compile much and compute little: compile quickly."""

import jax
import pytest


@pytest.fixture(autouse=True, scope="package")
def fast_compilation():
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
