"""How many steps go into one graph call, and how fast they are counted."""

import numpy as np
import pytest

import tfamp
from tfamp.training import pace


class FakeLoop:
    steps = 0
    examples = 0

    def do(self, steps, rows):
        self.steps += steps
        self.examples += steps * rows


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])

    def wait(seconds):
        now[0] += seconds

    return wait


def test_auto_grows_until_a_call_takes_half_a_second_and_no_further(clock):
    steps = pace.Pace("auto")
    seen = []
    for _ in range(12):
        seen.append(steps.steps)
        clock(steps.steps * 0.01)
        steps.measure(steps.steps)
    # The first call traces, whatever its time; 32 steps take 0.32 s.
    assert seen == [1, 1, 2, 4, 8, 16, 32, 32, 32, 32, 32, 32]


def test_auto_shrinks_when_steps_become_slow_and_never_below_one(clock):
    steps = pace.Pace("auto")
    steps.measure(1)
    for _ in range(20):
        clock(0.001)
        steps.measure(steps.steps)
    assert steps.steps == 1024
    for _ in range(20):
        clock(60.0)
        steps.measure(steps.steps)
    assert steps.steps == 1


def test_a_call_cut_short_by_the_end_of_an_epoch_tells_nothing(clock):
    steps = pace.Pace("auto")
    for _ in range(4):
        steps.measure(steps.steps)
        clock(0.1)
    before = steps.steps
    steps.measure(before - 1)
    assert steps.steps == before > 1


def test_a_fixed_number_stays_and_reports_every_half_second(clock):
    steps = pace.Pace(7)
    assert steps.is_due()
    steps.measure(7)
    clock(0.125)
    assert steps.is_due()
    steps.measure(7)
    # A call takes an eighth of a second, so every fourth one reports.
    for _ in range(3):
        assert [steps.is_due() for _ in range(4)] == [*[False] * 3, True]
        clock(0.5)
        steps.measure(7)
    assert steps.steps == 7


def test_workers_of_different_speed_decide_alike(clock):
    paces = [pace.Pace("auto", agree=lambda _: 0.2) for _ in range(2)]
    for seconds in (0.1, 3.0):
        clock(seconds)
        for each in paces:
            each.measure(each.steps)
    assert paces[0].steps == paces[1].steps > 1


@pytest.mark.parametrize("bad", [0, -1, 1.5, "fast", None])
def test_a_pace_that_is_no_positive_integer_is_refused(bad):
    with pytest.raises(tfamp.InputError, match="expected 'auto' or a positive"):
        pace.Pace(bad)


def test_speed_leaves_out_the_call_that_traces(clock):
    loop = FakeLoop()
    speed = pace.Clock(loop)
    clock(10.0)
    loop.do(1, rows=8)
    speed.end_warm_up()
    clock(2.0)
    loop.do(4, rows=8)
    assert speed.steps == 5
    logs = speed.logs()
    assert logs["step_milliseconds"] == pytest.approx(500)
    assert logs["examples_per_second"] == pytest.approx(16)


def test_an_epoch_of_one_call_counts_it_though_it_traced(clock):
    loop = FakeLoop()
    speed = pace.Clock(loop)
    clock(10.0)
    loop.do(4, rows=8)
    speed.end_warm_up()
    logs = speed.logs()
    assert logs["step_milliseconds"] == pytest.approx(2500)
    assert np.isfinite(list(logs.values())).all()


def test_each_epoch_has_a_speed_of_its_own(clock):
    loop = FakeLoop()
    speed = pace.Clock(loop)
    loop.do(1, rows=1)
    speed.end_warm_up()
    clock(5.0)
    loop.do(1, rows=1)
    speed.begin_epoch()
    assert speed.steps == 0
    clock(1.0)
    loop.do(10, rows=3)
    assert speed.logs()["step_milliseconds"] == pytest.approx(100)
    assert speed.examples_per_second == pytest.approx(30)
