"""Coverage of confidence intervals, and pairing by document and seed.

A simulation distinguishes a nominal 95 % interval from one that is 10 % narrower or wider: over 60 documents, the
latter
cover about 0.925 and 0.970. The standard error of the coverage over 4,000 data sets is 0.0034.
"""

import numpy as np
import pytest

from recurrent_bart.evaluation.bootstrap import Interval, Resamples, by_document, intervals, resample, student_t

N_SIMULATIONS = 4_000
N_DOCUMENTS = 60
# Accepted coverage of a nominal 95 % interval.
ACCEPTED = 0.941, 0.959


def coverage(intervals, factor=1.0):
    """Return the share of intervals that contain 0 if each end's distance from the mean is multiplied by `factor`."""
    means, lows, highs = np.array([(found.mean, found.low, found.high) for found in intervals]).T
    return np.mean((means - factor * (means - lows) <= 0) & (means + factor * (highs - means) >= 0))


def assert_covers_95_percent(intervals, accepted=ACCEPTED):
    """Check that the coverage is accepted, and that an interval 10 % narrower or wider would not be."""
    assert accepted[0] < coverage(intervals) < accepted[1]
    assert coverage(intervals, 0.9) < accepted[0]
    assert coverage(intervals, 1.1) > accepted[1]


def each_simulation(values_ND):
    """Return the resamples of each data set; the axis of seeds holds the data sets, so all are drawn at once."""
    together = resample(values_ND, np.ones_like(values_ND))
    return [together.of_seed(number) for number in range(len(values_ND))]


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(1)


@pytest.fixture(scope="module")
def normal_resamples(random):
    return each_simulation(random.normal(size=(N_SIMULATIONS, N_DOCUMENTS)))


@pytest.mark.slow
def test_an_interval_over_documents_covers_95_percent(normal_resamples):
    assert_covers_95_percent([found.over_documents() for found in normal_resamples])


@pytest.mark.slow
def test_an_interval_over_ten_documents_covers_95_percent(random):
    """A plain percentile bootstrap of ten documents covers 0.90."""
    resamples = each_simulation(random.normal(size=(N_SIMULATIONS, 10)))
    assert_covers_95_percent([found.over_documents() for found in resamples])


@pytest.mark.slow
def test_a_document_is_drawn_with_all_its_items(random):
    """Documents have 1 to 9 items, which are equal within a document."""
    counts_D = random.integers(1, 10, size=N_DOCUMENTS).astype(float)
    totals_ND = random.normal(size=(N_SIMULATIONS, N_DOCUMENTS)) * counts_D
    together = resample(totals_ND, np.broadcast_to(counts_D, totals_ND.shape))
    intervals = [together.of_seed(number).over_documents() for number in range(len(totals_ND))]
    assert_covers_95_percent(intervals)


@pytest.mark.parametrize("n_seeds", [3, 10])
def test_an_interval_over_seeds_covers_95_percent(random, n_seeds):
    """A bootstrap of three seeds covers 0.75. Student's t has long tails, so the accepted range is narrow."""
    means = random.normal(size=(5 * N_SIMULATIONS, 1, n_seeds))
    intervals = [Resamples(own, N_DOCUMENTS).over_seeds() for own in means]
    assert_covers_95_percent(intervals, accepted=(0.946, 0.954))


@pytest.mark.slow
@pytest.mark.parametrize("n_seeds", [2, 3, 5])
@pytest.mark.parametrize("seed_deviation", [0.05, 0.2, 1.0])
def test_an_interval_over_documents_and_seeds_covers_at_least_95_percent(
    random, normal_resamples, n_seeds, seed_deviation
):
    """The mean over documents has a standard deviation of 0.13."""
    seeds = seed_deviation * random.normal(size=(1000, 1, n_seeds))
    both = zip(normal_resamples[:1000], seeds, strict=True)
    intervals = [Resamples(own.means + seed, N_DOCUMENTS).interval() for own, seed in both]
    assert 0.94 < coverage(intervals) <= 0.996


@pytest.mark.parametrize("n_seeds", [2, 3, 5])
def test_variation_of_documents_or_seeds_alone_gives_the_whole_interval(normal_resamples, n_seeds):
    """The interval is exact if only documents or only seeds vary."""
    documents = normal_resamples[0]
    all_alike = Resamples(np.repeat(documents.means, n_seeds, axis=1), N_DOCUMENTS)
    assert ends(all_alike.interval()) == pytest.approx(ends(documents.over_documents()))
    ones = np.ones((n_seeds, N_DOCUMENTS))
    of_seeds = resample(ones * np.arange(n_seeds)[:, None], ones)
    assert ends(of_seeds.interval()) == pytest.approx(ends(of_seeds.over_seeds()))


def ends(found: Interval):
    return found.low, found.mean, found.high


def test_squares_of_both_parts_are_added():
    means = np.vstack([[0.0, 2.0], np.linspace([-3.0, -1.0], [3.0, 5.0], 2001)])
    resamples = Resamples(means, 10_000)
    documents, seeds, both = resamples.over_documents(), resamples.over_seeds(), resamples.interval()
    assert both.high - 1 == pytest.approx(np.hypot(documents.high - 1, seeds.high - 1))
    assert 1 - both.low == pytest.approx(np.hypot(1 - documents.low, 1 - seeds.low))


def test_published_seeds_give_the_paired_t_interval():
    """The expected value is computed by hand: ROUGE-1 differs by 1.5, 2.3 and 3.1; 4.303 * 0.8 / sqrt(3) is 1.987."""
    found = Resamples(np.array([[25.2, 26.8, 25.8]]) - np.array([[23.7, 24.5, 22.7]]), 1).over_seeds()
    assert ends(found) == pytest.approx((0.313, 2.3, 4.287), abs=1e-3)


@pytest.mark.parametrize(
    ("degrees", "quantile"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (9, 2.2622), (30, 2.0423), (10_000, 1.9602)]
)
def test_quantiles_equal_students_t_table(degrees, quantile):
    assert student_t(degrees) == pytest.approx(quantile, abs=1e-4)


def test_the_mean_weights_documents_by_count_and_seeds_equally():
    totals = np.array([[2.0, 30.0, 0.0], [4.0, 60.0, 0.0]])
    counts = np.array([[1.0, 9.0, 0.0], [1.0, 9.0, 0.0]])
    assert resample(totals, counts).interval().mean == pytest.approx((3.2 + 6.4) / 2)


def test_documents_without_items_are_not_drawn():
    """A draw that contains only these documents would have no mean."""
    found = resample(np.array([[3.0, 3.0, 0.0]]), np.array([[2.0, 2.0, 0.0]])).interval()
    assert ends(found) == (1.5, 1.5, 1.5)


def test_one_document_has_no_interval():
    assert ends(resample(np.array([[3.0, 0.0]]), np.array([[2.0, 0.0]])).interval()) == (None, 1.5, None)


def test_one_seed_has_the_interval_over_documents(normal_resamples):
    assert normal_resamples[0].over_seeds().low is None
    assert normal_resamples[0].interval() == normal_resamples[0].over_documents()


def test_the_interval_of_a_paired_difference_is_narrower():
    hard = np.random.default_rng(2).normal(5.0, 2.0, size=(1, 40))
    ones = np.ones_like(hard)
    one, other = resample(hard, ones), resample(hard + 0.1, ones)
    assert one.interval().high - one.interval().low > 0.5
    assert ends((other - one).interval()) == pytest.approx((0.1, 0.1, 0.1))


def test_seeds_that_differ_widen_the_interval():
    """All documents are equal, so only the seeds vary."""
    ones = np.ones((3, 50))
    found = resample(ones * [[1.0], [2.0], [3.0]], ones).interval()
    assert found.mean == pytest.approx(2.0)
    assert found.low < 1.5 < 2.5 < found.high


def test_an_interval_is_written_with_its_mean():
    assert f"{Interval(1.0, -0.5, 2.25):+.2f}" == "+1.00 [-0.50, +2.25]"
    assert f"{Interval(1.0, None, None):.1f}" == "1.0"


def test_values_are_summed_by_document_and_nan_is_not_counted():
    values = np.array([[1.0, 2.0, np.nan, 4.0], [np.nan, np.nan, 3.0, 5.0]])
    totals, counts = by_document(values, ["b", "a", "a", "b"])
    assert totals.tolist() == [[5.0, 2.0], [5.0, 3.0]]
    assert counts.tolist() == [[2.0, 1.0], [1.0, 1.0]]


def test_a_score_that_some_documents_lack_is_the_mean_of_the_remaining_documents():
    """A score has the same interval alone and among more scores."""
    scores = {"whole": [1.0, 3.0, 8.0], "part": [None, 2.0, 4.0], "none": [None, None, None], "other": [4.0, 0.0, 2.0]}
    found = intervals(scores, "abc")
    assert list(found) == ["whole", "part", "other"]
    assert ends(found["part"]) == pytest.approx((2.0, 3.0, 4.0))
    for name in found:
        assert found[name] == intervals({name: scores[name]}, "abc")[name]
