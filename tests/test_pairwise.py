"""Selected cases hold every value, pair or triple of values, and few of them are needed."""

import itertools

import pytest

from pairwise import covering, mark_other_cases, values_of

DEPTHS, CONTEXTS, GRAINS = (0, 1, 2, -1), ("last", "memory", "all"), ("none", "layer", "segment")


def pairs_of(cases):
    return {pair for case in cases for pair in itertools.combinations(sorted(case), 2)}


def test_every_pair_of_values_is_in_a_chosen_case():
    axes = itertools.product(DEPTHS, CONTEXTS, GRAINS)
    cases = [values_of(dict(zip(("depth", "context", "grain"), values, strict=True))) for values in axes]
    chosen = covering(cases)
    assert pairs_of(cases[number] for number in chosen) == pairs_of(cases)
    # at least the product of the two longest axes, and far less than all 36
    assert 12 <= len(chosen) <= 15
    assert len(set(chosen)) == len(chosen)


def test_each_key_of_a_dictionary_is_a_parameter():
    fields = {"recurrence": "top", "bptt_depth": 1}
    assert values_of({"fields": fields, "n": 2}) == {
        ("fields", "recurrence", "'top'"),
        ("fields", "bptt_depth", "1"),
        ("n", "", "2"),
    }


def test_each_value_needs_as_many_cases_as_the_longest_parameter_has_values():
    axes = itertools.product(DEPTHS, CONTEXTS, GRAINS)
    cases = [values_of(dict(zip(("depth", "context", "grain"), values, strict=True))) for values in axes]
    chosen = covering(cases, n_combined=1)
    assert len(chosen) == len(DEPTHS)
    assert set().union(*(cases[number] for number in chosen)) == set().union(*cases)


def test_values_of_one_parameter_are_all_chosen():
    assert covering([values_of({"n": n}) for n in range(5)]) == list(range(5))


def test_every_triple_of_values_is_in_a_chosen_case():
    axes = itertools.product(DEPTHS, CONTEXTS, GRAINS, (True, False))
    cases = [values_of(dict(zip(("depth", "context", "grain", "gate"), values, strict=True))) for values in axes]
    pairs = covering(cases)
    chosen = covering(cases, 3, pairs)
    triples = [set(itertools.combinations(sorted(case), 3)) for case in cases]
    assert set().union(*(triples[number] for number in chosen)) == set().union(*triples)
    # at least the product of the three longest axes, and fewer than all 72
    assert 36 <= len(chosen) <= 50
    # cases that are chosen already stay chosen
    assert set(pairs) <= set(chosen)


def test_a_case_with_few_values_is_a_combination():
    cases = [values_of({"n": n, "m": m}) for n in range(2) for m in range(2)]
    assert sorted(covering(cases, 3)) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("marks", "n_slow", "n_rare"), [(["pairwise"], 4, 0), (["each_value"], 6, 3), ([], 0, 0)], ids=str
)
def test_cases_that_are_not_chosen_are_slow_or_rare(pytester_items, marks, n_slow, n_rare):
    items = pytester_items(marks)
    mark_other_cases(items)
    for name, n_expected in (("slow", n_slow), ("rare", n_rare)):
        assert sum(item.get_closest_marker(name) is not None for item in items) == n_expected


@pytest.fixture
def pytester_items(request, tmp_path):
    """Return a function that collects the eight cases of a test of three switches, with marks."""

    class Case:
        path, originalname = tmp_path, "test_switches"

        def __init__(self, values, marks):
            self.callspec = type("CallSpec", (), {"params": dict(zip("abc", values, strict=True))})
            self.marks = marks

        def get_closest_marker(self, name):
            return next((mark for mark in self.marks if mark == name or getattr(mark, "name", "") == name), None)

        def add_marker(self, mark):
            self.marks.append(mark)

    def collect(marks):
        return [Case(values, [*marks]) for values in itertools.product((0, 1), repeat=3)]

    return collect
