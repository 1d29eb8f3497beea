"""Tests of communication between ranks, and that no rank waits for a failed one."""

import pytest

from processes import run_in_processes
from recurrent_bart import distributed
from recurrent_bart.distributed import SharedError, first_then_all, only_first


def test_alone_everything_is_ones_own():
    assert (distributed.rank(), distributed.world_size(), distributed.is_first()) == (0, 1, True)
    assert distributed.sum_over_ranks(1.5, 2) == [1.5, 2]
    assert distributed.max_over_ranks(3) == 3
    assert distributed.gather_rows([1.5, 2]) == [[1.5, 2]]
    assert distributed.gather_objects("a") == ["a"]
    assert distributed.from_first("a") == "a"
    distributed.barrier()
    assert first_then_all(lambda: 5) == 5


def test_alone_an_error_is_ones_own():
    def fail():
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong") as caught:
        first_then_all(fail)
    assert type(caught.value) is ValueError


def outcome(action):
    """Return the result of an action, or the type and text of its error."""
    try:
        return action()
    except Exception as error:
        return type(error).__name__, str(error)


def exchange(rank):
    return {
        "sum": distributed.sum_over_ranks(rank + 0.25, 2**53),
        # the sum of these values is not the largest of them
        "max": distributed.max_over_ranks(7 - 2 * rank),
        "rows": distributed.gather_rows([rank, 2**53]),
        "gathered": distributed.gather_objects({"rank": rank}),
        "from first": distributed.from_first(f"told by {rank}"),
    }


def make_in_order(rank):
    calls = []

    def make():
        calls.append(rank)
        return f"made by {rank}"

    first_only = []
    only_first(lambda: first_only.append(rank))
    return first_then_all(make), calls, first_only


def fail_on(failing, kind=ValueError):
    def work(rank):
        def make():
            if rank == failing:
                raise kind(f"{rank} failed")

        return outcome(lambda: first_then_all(make))

    return work


def ask(rank):
    return [
        exchange(rank),
        make_in_order(rank),
        fail_on(0)(rank),
        fail_on(0, KeyError)(rank),
        fail_on(1)(rank),
        # communication still works afterwards
        distributed.gather_objects(rank),
    ]


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    return run_in_processes(ask, 2, tmp_path_factory.mktemp("group"))


@pytest.mark.distributed
def test_values_are_exchanged(answers):
    for rank in range(2):
        assert answers[rank][0] == {
            "sum": [1.5, 2.0**54],
            "max": 7,
            "rows": [[0.0, 2.0**53], [1.0, 2.0**53]],
            "gathered": [{"rank": 0}, {"rank": 1}],
            "from first": "told by 0",
        }


@pytest.mark.distributed
def test_the_first_process_goes_first_and_does_alone_what_only_it_shall(answers):
    assert answers[0][1] == ("made by 0", [0], [0])
    assert answers[1][1] == ("made by 1", [1], [])


@pytest.mark.distributed
def test_an_error_of_the_first_process_stops_all(answers):
    assert answers[0][2] == ("ValueError", "0 failed")
    assert answers[1][2] == (SharedError.__name__, "0 failed")
    assert answers[0][3][0] == "KeyError"
    assert answers[1][3][0] == SharedError.__name__


@pytest.mark.distributed
def test_an_error_of_another_process_stops_all_and_the_first_says_whose_it_was(answers):
    """Simulate a host that does not have rank 0's files."""
    assert answers[0][4] == ("ValueError", "process 1: 1 failed")
    assert answers[1][4] == (SharedError.__name__, "process 1: 1 failed")


@pytest.mark.distributed
def test_after_an_error_processes_still_understand_each_other(answers):
    assert [answer[5] for answer in answers] == [[0, 1], [0, 1]]
