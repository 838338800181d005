import os
import signal

import pytest

from placesearch.interrupts import interrupts_held


def interrupted(done):
    with interrupts_held():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("all of it")


def test_an_interrupt_comes_when_the_block_has_ended():
    done = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(done)
    assert done == ["all of it"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_the_block_comes_out_as_it_is():
    with pytest.raises(ZeroDivisionError), interrupts_held():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
