import functools

import jax
import pytest

from opsa_jax.parallel import mesh
from opsa_jax.training import setup


@pytest.fixture(autouse=True)
def one_device(monkeypatch, request):
    """Runs use one of the test machine's fake devices, unless a test is marked `devices(n)`."""
    marked = request.node.get_closest_marker("devices")
    devices = jax.devices()[: marked.args[0] if marked else 1]
    monkeypatch.setattr(setup, "make_mesh", functools.partial(mesh.make_mesh, devices=devices))
