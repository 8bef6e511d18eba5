"""Exercises of tutorial 01: fill in the functions, then `pytest -m exercise tutorials/exercises/exercise_01.py`."""

import numpy as np
import pytest

from mini_ht.attention import attention, softmax  # noqa: F401 (for your solutions)

pytestmark = pytest.mark.exercise


def mean_by_attention(value):
    """The mean over the tokens of value [T, width], as the output of `attention`: -> [width]."""
    raise NotImplementedError("exercise 1")


def counted_attention(query, key, value, counts):
    """Attention in which token t counts counts[t] times, as if it stood there so often.

    query [Tq, width], key [T, width], value [T, value width], counts [T] -> [Tq, value width].
    """
    raise NotImplementedError("exercise 2")


def causal_attention(query, key, value):
    """Attention in which token i sees tokens 0 .. i only: query, key [T, width], value [T, value width]."""
    raise NotImplementedError("exercise 3")


def drawn(tokens, width, seed=0):
    """Query, key and value [tokens, width] each."""
    return np.random.default_rng(seed).standard_normal((3, tokens, width))


def test_mean_by_attention(monkeypatch):
    value, calls, original = drawn(6, 4)[2], [], attention

    def counting(*arguments):
        calls.append(arguments)
        return original(*arguments)

    monkeypatch.setitem(globals(), "attention", counting)
    np.testing.assert_allclose(mean_by_attention(value), value.mean(0))
    assert calls, "use attention"


def test_counted_attention():
    query, key, value = drawn(5, 4)
    counts = np.array([1, 2, 3, 1, 4])
    wanted = attention(query, key.repeat(counts, 0), value.repeat(counts, 0))
    np.testing.assert_allclose(counted_attention(query, key, value, counts), wanted)


def test_causal_attention():
    query, key, value = drawn(5, 4)
    found = causal_attention(query, key, value)
    for last in range(1, 6):
        np.testing.assert_allclose(found[last - 1], attention(query[last - 1 : last], key[:last], value[:last])[0])
