"""What stands in the way of a method, and that it leaves no trace."""

import threading

import pytest

from tfamp.taps.gates import gate


class Doubler:
    def call(self, x):
        return 2 * x


def add(number):
    return lambda call, x: call(x) + number


def test_the_last_gate_is_the_outermost():
    owner = Doubler()
    with gate(owner, "call", add(1)):
        with gate(owner, "call", lambda call, x: 10 * call(x)):
            assert owner.call(3) == 70
        assert owner.call(3) == 7
    assert owner.call(3) == 6
    assert vars(owner) == {}


def test_equal_functions_are_two_gates():
    owner, one = Doubler(), add(1)
    with gate(owner, "call", one):
        with gate(owner, "call", one):
            assert owner.call(3) == 8
        assert owner.call(3) == 7


def test_gates_may_leave_in_the_order_they_came():
    owner = Doubler()
    first, second = gate(owner, "call", add(1)), gate(owner, "call", add(10))
    first.__enter__()
    second.__enter__()
    assert owner.call(3) == 17
    first.__exit__(None, None, None)
    assert owner.call(3) == 16
    second.__exit__(None, None, None)
    assert vars(owner) == {}
    assert owner.call(3) == 6


def test_an_attribute_of_the_object_itself_comes_back():
    owner = Doubler()
    owner.call = own = lambda x: -x
    with gate(owner, "call", add(1)):
        assert owner.call(3) == -2
    assert owner.call is own


def test_what_was_put_over_a_gate_stays():
    owner = Doubler()
    with gate(owner, "call", add(1)):
        within = owner.call
        owner.call = later = lambda x: within(x) * 100
    assert owner.call is later
    assert owner.call(3) == 600


def test_an_error_inside_leaves_nothing_behind():
    owner = Doubler()
    with pytest.raises(KeyError), gate(owner, "call", add(1)):
        raise KeyError
    assert vars(owner) == {}


def test_gates_of_many_threads_leave_nothing_behind():
    owner = Doubler()
    wrong = []

    def pass_by():
        for _ in range(200):
            with gate(owner, "call", lambda call, x: call(x)):
                if owner.call(3) != 6:
                    wrong.append(True)

    threads = [threading.Thread(target=pass_by) for _ in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong
    assert vars(owner) == {}


def test_a_function_of_a_module_can_be_stood_before():
    import math

    root = math.sqrt
    with gate(math, "sqrt", lambda call, x: -call(x)):
        assert math.sqrt(4.0) == -2.0
    assert math.sqrt is root
