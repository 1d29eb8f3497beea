import threading

import pytest

from recurrent_bart.inference.one_ahead import one_ahead


def test_results_come_in_order():
    assert list(one_ahead(str, range(5))) == [(number, str(number)) for number in range(5)]
    assert list(one_ahead(str, [])) == []


def test_a_thread_computes_the_next_result_while_the_caller_works():
    began = [threading.Event() for _ in range(3)]
    threads = []

    def function(number):
        threads.append(threading.current_thread())
        began[number].set()
        return -number

    found = one_ahead(function, range(3))
    assert next(found) == (0, 0)
    # the caller still works with item 0
    assert began[1].wait(timeout=10)
    assert not began[2].is_set()
    assert list(found) == [(1, -1), (2, -2)]
    assert threading.main_thread() not in threads


def test_items_are_taken_in_the_callers_thread():
    threads = []

    def items():
        threads.append(threading.current_thread())
        yield 1

    assert list(one_ahead(str, items())) == [(1, "1")]
    assert threads == [threading.current_thread()]


def test_an_error_of_the_items_is_raised_in_place_of_its_item():
    def items():
        yield 1
        raise ValueError("unreadable")

    found = one_ahead(str, items())
    assert next(found) == (1, "1")
    with pytest.raises(ValueError, match="unreadable"):
        next(found)


def test_an_error_of_the_function_is_raised_in_place_of_its_item():
    found = one_ahead([10, 20].__getitem__, range(4))
    assert [next(found), next(found)] == [(0, 10), (1, 20)]
    with pytest.raises(IndexError):
        next(found)


def test_a_caller_may_stop_early():
    found = one_ahead(str, range(5))
    assert next(found) == (0, "0")
    found.close()
