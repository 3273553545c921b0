"""Code of a model, run with limits."""

import socket
import sys
import time

import pytest

from opsa_jax.errors import UserError
from opsa_jax.evals import execution
from opsa_jax.evals.execution import extract_code, isolation, run_answer, run_answers, run_code

TASK = {"prompt": "import math\n\n\ndef half(x):\n    \"\"\"Half of x.\"\"\"\n", "entry_point": "half", "tests": "assert half(4) == 2\n"}


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("```python\ndef half(x):\n    return x / 2\n```", "right"),
        ("<think>```python\ndef half(x): return 0\n```</think>```\ndef half(x):\n    return x // 2\n```", "right"),
        ("    return x / 2\n", "right"),
        ("    return math.floor(x / 2)\n", "right"),
        ("def half(x):\n    return math.floor(x / 2)\n", "right"),
        ("def half(x):\n    return x\n", "wrong"),
        ("```python\ndef half(x):\n    return x / 2\n```\nFor example:\n```python\nprint(half(2))\n```", "right"),
        ("```python\ndef half(x):\n    return x / 2", "right"),
        ("I cannot help with that.", "wrong"),
        ("", "unparsed"),
        ("<think>def half(x): return x / 2", "truncated_thinking"),
        ("def half(x):\n    import os\n    os._exit(0)\n", "wrong"),
        ("import sys\nsys.exit(0)\ndef half(x): return 2", "wrong"),
        ("```python\ndef half(x):\n  return x / 2\n  syntax error here\n```", "wrong"),
    ],
)
def test_answers(response, expected):
    assert run_answer(response, TASK) == expected


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("x = 1", "right"),
        ("while True: pass", "timeout"),
        ("import time; time.sleep(60)", "timeout"),
        ("x = bytearray(1 << 31)", "wrong"),
        ("open('big', 'wb').write(b'0' * (20 << 20))", "wrong"),
        ("import os\nassert not set(os.environ) - {'LC_CTYPE'}, 'environment'", "right"),
        ("import os\nassert os.listdir('.') == []", "right"),
        ("import sys\nassert sys.stdin.read() == ''", "right"),
        ("print('x' * 10**6)", "right"),
        ("import os\nfor fd in range(4, 40):\n    try: os.fstat(fd)\n    except OSError: continue\n    raise SystemExit(1)", "right"),
        ("import numpy", "wrong"),
    ],
)
def test_limits(program, expected):
    assert run_code(program, seconds=1.5, megabytes=512) == expected


def test_children_die_with_it(tmp_path):
    child = f"import time; time.sleep(1); open({str(tmp_path / 'x')!r}, 'w')"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    assert run_code(program, seconds=5) in ("right", "wrong")
    time.sleep(1.5)
    assert not (tmp_path / "x").exists()


def test_no_network_where_the_kernel_lets_us():
    if not isolation().startswith("no network"):
        pytest.skip("no network namespaces here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert run_code(f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 1)", seconds=5) == "wrong"


def test_extract_code():
    assert extract_code("x = 1") == "x = 1" and extract_code("  ") is None
    assert extract_code("```\na\n```\n```py\nb\n```") == "b\n"
    assert extract_code("nothing", entry_point="f") is None


def test_many_in_order():
    items = [(f"    return x / {d}\n", TASK, False) for d in (2, 3, 2)]
    assert list(run_answers(items, workers=2)) == ["right", "wrong", "right"]


def test_unsupported_system(monkeypatch):
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(UserError, match="leave them out"):
        execution.check_supported()
