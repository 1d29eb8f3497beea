import threading

import pytest

from recurrent_bart.inference.one_ahead import one_ahead


def test_items_come_in_order():
    assert list(one_ahead(iter(range(5)))) == list(range(5))
    assert list(one_ahead([])) == []


def test_a_thread_computes_the_next_item_while_the_caller_works():
    began = [threading.Event() for _ in range(3)]

    def items():
        for number, event in enumerate(began):
            event.set()
            yield number

    found = one_ahead(items())
    assert next(found) == 0
    # the caller still works with item 0
    assert began[1].wait(timeout=10)
    assert not began[2].is_set()
    assert list(found) == [1, 2]


def test_an_error_is_raised_in_place_of_its_item():
    def items():
        yield 1
        yield 2
        raise ValueError("unreadable")

    found = one_ahead(items())
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(ValueError, match="unreadable"):
        next(found)


def test_a_caller_may_stop_early():
    found = one_ahead(iter(range(5)))
    assert next(found) == 0
    found.close()
