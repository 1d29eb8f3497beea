"""Selection of few cases of a parametrized test that together contain every pair of values: pairwise testing.

`make test` runs these cases of tests marked `pairwise`, and `make test-all` runs all cases.
"""

import itertools

import pytest


def mark_other_cases_slow(items):
    """Mark the cases of pairwise tests as slow, except cases that cover every pair of values."""
    marked = [item for item in items if item.get_closest_marker("pairwise") and hasattr(item, "callspec")]
    for _, cases in itertools.groupby(marked, key=lambda item: (item.path, item.originalname)):
        cases = list(cases)
        chosen = covering([values_of(case.callspec.params) for case in cases])
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


def covering(cases):
    """Return the numbers of cases whose pairs of values are all pairs of all cases, chosen greedily."""
    pairs = [set(itertools.combinations(sorted(case), 2)) or {(value,) for value in case} for case in cases]
    missing, chosen = set().union(*pairs), []
    while missing:
        best = max(range(len(cases)), key=lambda number: len(pairs[number] & missing))
        chosen.append(best)
        missing -= pairs[best]
    return chosen
