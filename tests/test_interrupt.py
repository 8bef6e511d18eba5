"""Ctrl-C never leaves half a step in a checkpoint."""

import os
import signal
import time

import pytest

from mini_ht.training.loop import interrupts_wait


def test_ctrl_c_waits_for_the_end_of_a_step():
    """A Ctrl-C in the middle of an update takes effect when the update is whole."""
    done = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background starts with it ignored
    try:
        with pytest.raises(KeyboardInterrupt):
            with interrupts_wait():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("update")
        assert done == ["update"]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)
