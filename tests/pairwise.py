"""Selection of few cases of a parametrized test that together contain every value, pair or triple of values.

The marks `each_value` and `pairwise` select cases of a test with many parameters:

| mark | cases of `make test` hold every | cases of `make test-all` hold every |
|---|---|---|
| `each_value` | value | pair of values |
| `pairwise` | pair of values | triple of values |

`make test-every-case` runs the cases that `make test-all` leaves out.
"""

import itertools

import pytest

# number of values of which `make test` runs each combination, by mark; `make test-all` combines one value more
COMBINED = {"each_value": 1, "pairwise": 2}


def mark_other_cases(items):
    """Mark cases outside the selection of `make test` as slow, and cases outside that of `make test-all` as rare."""
    for mark, n_combined in COMBINED.items():
        marked = [item for item in items if item.get_closest_marker(mark) and hasattr(item, "callspec")]
        for _, cases in itertools.groupby(marked, key=lambda item: (item.path, item.originalname)):
            cases = list(cases)
            values = [values_of(case.callspec.params) for case in cases]
            first = covering(values, n_combined)
            # a case of `make test` belongs to `make test-all` too
            further = covering(values, n_combined + 1, first)
            for number, case in enumerate(cases):
                if number not in first:
                    case.add_marker(pytest.mark.slow)
                if number not in further:
                    case.add_marker(pytest.mark.rare)


def values_of(parameters):
    """Return a case's values by name; a dictionary counts as one parameter for each of its keys."""
    found = set()
    for name, value in parameters.items():
        fields = value.items() if isinstance(value, dict) else [("", value)]
        found.update((name, field, repr(setting)) for field, setting in fields)
    return found


def covering(cases, n_combined=2, chosen=()):
    """Return the numbers of cases that contain all combinations of `n_combined` values, chosen greedily.

    Args:
        cases: Values of each case.
        n_combined: Number of values in a combination. A case with fewer values is itself a combination.
        chosen: Numbers of cases that are chosen already.
    """
    held = [set(itertools.combinations(sorted(case), min(n_combined, len(case)))) for case in cases]
    chosen = list(chosen)
    missing = set().union(*held) - set().union(*(held[number] for number in chosen))
    while missing:
        best = max(range(len(cases)), key=lambda number: len(held[number] & missing))
        chosen.append(best)
        missing -= held[best]
    return chosen
