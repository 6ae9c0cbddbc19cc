"""A worker whose others are gone ends, whatever it waits for."""

import socket
import sys
import threading

import pytest

from tfamp import tensorflow_internals
from tfamp.distribute import vigil
from tfamp.distribute.vigil import Vigil
from tfamp.distribute.workers import lost_by, told_of_lost


class Ended(BaseException):
    """Where the process would have ended."""


@pytest.fixture
def peer():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        yield listening


@pytest.fixture
def watch(monkeypatch, peer):
    """A vigil over the peer that is followed here: a round at a time."""
    clock = [0.0]
    rounds = []

    def sleep(seconds):
        clock[0] += seconds
        rounds.append(seconds)
        if len(rounds) > 60:
            raise TimeoutError

    def end(status):
        raise Ended(status)

    aborted = []
    frame = sys._getframe()
    monkeypatch.setattr(
        vigil.sys,
        "_current_frames",
        lambda: {threading.main_thread().ident: frame},
    )

    monkeypatch.setattr(vigil.time, "sleep", sleep)
    monkeypatch.setattr(vigil.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(vigil.os, "_exit", end)
    monkeypatch.setattr(
        tensorflow_internals,
        "abort_collectives",
        lambda code, message: aborted.append((code, message)),
    )
    watching = Vigil({("worker", 1): peer.getsockname()}, told_of_lost)
    watching.aborted, watching.clock = aborted, clock
    return watching


def test_one_that_answers_is_left_alone(watch):
    with pytest.raises(TimeoutError), watch.needs_all():
        watch._watch()
    assert not watch.aborted


def test_what_waits_for_one_that_is_gone_is_aborted_and_then_ends(
    watch, peer, capsys
):
    peer.close()
    with pytest.raises(Ended) as raised, watch.needs_all():
        watch._watch()
    assert raised.value.args == (75,)
    assert watch.clock[0] < 60
    ((code, message),) = watch.aborted
    line = "worker 1 stopped answering"
    error = vigil.tf.errors.UnavailableError(None, None, message)
    assert code == error.error_code
    assert str(lost_by(error)).startswith(line)
    assert capsys.readouterr().err.startswith(f"tfamp: {line}")


def test_one_whose_training_is_over_goes_on(watch, peer):
    peer.close()
    with pytest.raises(TimeoutError):
        watch._watch()
    assert watch.aborted


def test_one_that_writes_a_file_at_the_end_goes_on(watch, peer):
    peer.close()
    with pytest.raises(TimeoutError), watch.needs_all(), watch.alone():
        watch._watch()
    assert watch.aborted


def test_one_that_moves_is_coming_to_its_end(watch, peer, monkeypatch):
    peer.close()
    places = iter(range(100))
    monkeypatch.setattr(watch, "_place", lambda: (next(places), 0))
    with pytest.raises(TimeoutError), watch.needs_all():
        watch._watch()


def test_a_place_is_told_only_where_the_others_are_needed(watch):
    assert watch._place() is None
    with watch.needs_all():
        assert watch._place() == watch._place() is not None
        with watch.alone():
            assert watch._place() is None
    assert watch._place() is None
