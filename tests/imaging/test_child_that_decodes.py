"""Child processes that decode: what they do when whoever asked is gone."""

from __future__ import annotations

import io
import signal
import subprocess
import sys

import pytest

from espmedsam_edge.imaging.child import receive, send

_CHILD = """
import sys
from espmedsam_edge.imaging.child import receive, send
question, _ = receive(sys.stdin.buffer)
if question["answer"]:
    send(sys.stdout.buffer, {"done": True})
sum(range(10**7 if question["answer"] else 10**18))  # one call, as a decoder's
"""


@pytest.mark.skipif(not hasattr(signal, "alarm"), reason="needs POSIX")
@pytest.mark.parametrize("answer", [False, True])
def test_a_child_ends_itself_if_nobody_does(answer: bool) -> None:
    question = io.BytesIO()
    send(question, {"answer": answer}, b"picture", 1)
    done = subprocess.run([sys.executable, "-c", _CHILD], input=question.getvalue(), capture_output=True, timeout=60)
    assert done.returncode == (0 if answer else -signal.SIGALRM)
    assert bool(done.stdout) == answer


def test_a_message_comes_as_it_went() -> None:
    stream = io.BytesIO()
    send(stream, {"path": "a\udcff.tif"}, b"\0\1")
    stream.seek(0)
    assert receive(stream) == ({"path": "a\udcff.tif"}, b"\0\1")
    with pytest.raises(EOFError):
        receive(stream)
