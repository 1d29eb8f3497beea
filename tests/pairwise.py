"""Selection of few cases of a parametrized test that together contain every value or every pair of values.

`make test` runs the selected cases of tests marked `each_value` or `pairwise`, and `make test-all` runs all cases.
"""

import itertools

import pytest

# number of values that each selected case has to combine, by mark
COMBINED = {"each_value": 1, "pairwise": 2}


def mark_other_cases_slow(items):
    """Mark cases of tests with a mark of `COMBINED` as slow, except cases that cover every value or pair of values."""
    for mark, n_combined in COMBINED.items():
        marked = [item for item in items if item.get_closest_marker(mark) and hasattr(item, "callspec")]
        for _, cases in itertools.groupby(marked, key=lambda item: (item.path, item.originalname)):
            cases = list(cases)
            chosen = covering([values_of(case.callspec.params) for case in cases], n_combined)
            for number, case in enumerate(cases):
                if number not in chosen:
                    case.add_marker(pytest.mark.slow)


def values_of(parameters):
    """Return a case's values by name; a dictionary counts as one parameter for each of its keys."""
    found = set()
    for name, value in parameters.items():
        fields = value.items() if isinstance(value, dict) else [("", value)]
        found.update((name, field, repr(setting)) for field, setting in fields)
    return found


def covering(cases, n_combined=2):
    """Return the numbers of cases that contain all combinations of `n_combined` values, chosen greedily."""
    pairs = [set(itertools.combinations(sorted(case), n_combined)) or {(value,) for value in case} for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen
