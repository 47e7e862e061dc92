"""FID, KID, Inception Score, precision and recall: closed forms, hand-made cases, errors where there is no number."""

import numpy as np
import pytest

from vqvae2_jax.evaluation.features import FeatureStats
from vqvae2_jax.evaluation.generative import choose_samples, rejection_sweep
from vqvae2_jax.metrics.frechet import Moments, frechet_distance
from vqvae2_jax.metrics.inception_score import inception_score
from vqvae2_jax.metrics.kernel import kernel_distance
from vqvae2_jax.metrics.manifold import precision_recall
from vqvae2_jax.metrics.neighbors import nearest


def gaussian(count, mean, scale, seed=0, size=6):
    return mean + scale * np.random.default_rng(seed).normal(size=(count, size))


class TestFrechet:
    def test_closed_form_of_gaussians_that_commute(self):
        scales, others = np.array([1.0, 2.0, 0.5]), np.array([3.0, 1.0, 0.5])
        means = np.array([0.0, 1.0, -2.0]), np.array([1.0, 1.0, 0.0])
        first = Moments(101, means[0], np.diag(scales**2) * 100)
        second = Moments(51, means[1], np.diag(others**2) * 50)
        expected = np.square(means[0] - means[1]).sum() + np.square(scales - others).sum()
        assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-12)

    def test_closed_form_of_rotated_gaussians(self):
        """In two dimensions tr(M^(1/2)) is (tr M + 2 det M^(1/2))^(1/2), M = C1 C2."""
        rng = np.random.default_rng(0)
        roots = rng.normal(size=(2, 2, 2))
        first, second = (root @ root.T for root in roots)
        product = first @ second
        root_trace = np.sqrt(np.trace(product) + 2 * np.sqrt(np.linalg.det(product)))
        expected = np.trace(first) + np.trace(second) - 2 * root_trace
        found = frechet_distance(Moments(2, np.zeros(2), first), Moments(2, np.zeros(2), second))
        assert found == pytest.approx(expected, rel=1e-9)

    def test_a_set_is_at_no_distance_from_itself_and_the_order_of_two_does_not_matter(self):
        first, second = Moments.of(gaussian(40, 0, 1)), Moments.of(gaussian(30, 1, 2, seed=1))
        assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
        assert frechet_distance(first, second) == pytest.approx(frechet_distance(second, first), rel=1e-9)

    def test_fewer_images_than_features(self):
        few = Moments.of(gaussian(4, 0, 1, size=50)), Moments.of(gaussian(5, 0, 1, seed=1, size=50))
        assert np.isfinite(frechet_distance(*few)) and frechet_distance(*few) > 0
        assert frechet_distance(few[0], few[0]) == pytest.approx(0, abs=1e-6)

    def test_batches_add_up_far_from_zero(self):
        features = gaussian(100, 1e6, 1)
        whole, added = Moments.of(features), Moments.of(features[:1]) + Moments.of(features[1:30])
        added = added + Moments.of(features[30:])
        np.testing.assert_allclose(added.mean, whole.mean, rtol=1e-14)
        np.testing.assert_allclose(added.covariance(), np.cov(features.T), rtol=1e-7)

    def test_no_number_without_a_covariance_or_of_two_networks(self):
        with pytest.raises(ValueError, match='1 image has no covariance'):
            frechet_distance(Moments.of(gaussian(1, 0, 1)), Moments.of(gaussian(5, 0, 1)))
        with pytest.raises(ValueError, match='6 and 7 features'):
            frechet_distance(Moments.of(gaussian(5, 0, 1)), Moments.of(gaussian(5, 0, 1, size=7)))


class TestKernel:
    def test_by_hand(self):
        first, second = np.array([[1.0, 0.0], [0.0, 1.0]]), np.array([[2.0, 0.0], [2.0, 2.0]])
        k = lambda x, y: (np.dot(x, y) / 2 + 1) ** 3  # noqa: E731
        across = np.mean([k(x, y) for x in first for y in second])
        expected = k(*first) + k(*second) - 2 * across
        mean, deviation = kernel_distance(first, second, subsets=3)
        assert mean == pytest.approx(expected) and deviation is None  # one comparison, of all

    def test_unbiased_where_the_distributions_agree(self):
        same, _ = kernel_distance(gaussian(600, 0, 1), gaussian(600, 0, 1, seed=1), subset_size=100)
        other, _ = kernel_distance(gaussian(600, 0, 1), gaussian(600, 0.7, 1, seed=1), subset_size=100)
        assert abs(same) < 0.05 < other
        assert kernel_distance(gaussian(60, 0, 1), gaussian(90, 0, 1), subset_size=50)[1] > 0

    def test_too_few(self):
        with pytest.raises(ValueError, match='sets of 1 and 5 images: KID needs at least 2'):
            kernel_distance(gaussian(1, 0, 1), gaussian(5, 0, 1))


class TestInceptionScore:
    def test_bounds(self):
        sure = np.tile(50 * np.eye(4), (25, 1))
        assert inception_score(sure, splits=5) == pytest.approx((4, 0), abs=1e-9)  # sure, classes balanced
        assert inception_score(np.zeros((100, 4)), splits=5) == pytest.approx((1, 0), abs=1e-9)
        assert inception_score(sure[:, :1].repeat(4, 1), splits=5)[0] == pytest.approx(1)

    def test_refusals(self):
        with pytest.raises(ValueError, match='at least 10'):
            inception_score(np.zeros((9, 4)))
        with pytest.raises(ValueError, match='not finite'):
            inception_score(np.full((10, 4), np.nan))


class TestNearest:
    def test_against_all_pairs(self):
        queries, points = gaussian(1030, 0, 1, size=4) + 1000, gaussian(1500, 0, 1, seed=1, size=4) + 1000
        names = np.arange(1500) * 3 + 7
        parts = ((names[start:stop], points[start:stop]) for start, stop in ((0, 5), (5, 5), (5, 1100), (1100, 1500)))
        found, distance = nearest(queries, parts)
        apart = np.sqrt(np.square(queries[:, None] - points).sum(-1))
        np.testing.assert_array_equal(found, names[apart.argmin(axis=1)])
        np.testing.assert_allclose(distance, apart.min(axis=1), atol=2e-3)

    def test_the_first_of_equally_near_points(self):
        points = np.zeros((3, 2))
        found, distance = nearest(np.array([[3.0, 4.0], [0, 0]]), [([5, 6, 4], points), ([1, 2, 3], points)])
        assert found.tolist() == [5, 5] and distance.tolist() == [5, 0]

    def test_refusals(self):
        with pytest.raises(ValueError, match='there are no points'):
            nearest(np.zeros((2, 3)), [])
        with pytest.raises(ValueError, match='3 and 2 features: of two networks'):
            nearest(np.zeros((2, 3)), [([0], np.zeros((1, 2)))])
        with pytest.raises(ValueError, match='1 of 2 images have features that are not finite'):
            nearest(np.zeros((2, 3)), [([0, 1], np.array([[0, 0, 0], [0, np.nan, 0]]))])


class TestPrecisionRecall:
    def test_by_hand(self):
        """On a line, k = 1: real balls [-1, 1], [0, 2] and [1, 5]; generated [-1.5, .5], [-.5, 1.5] and [.5, 99.5]."""
        real, generated = np.array([[0.0], [1.0], [3.0]]), np.array([[-0.5], [0.5], [50.0]])
        assert precision_recall(real, generated, neighbors=1) == pytest.approx((2 / 3, 1))
        real[0] = -9.0  # balls [-19, 1], [-1, 3] and [1, 5]
        assert precision_recall(real, generated, neighbors=1) == pytest.approx((2 / 3, 2 / 3))

    def test_against_all_pairs(self):
        real, generated = gaussian(1100, 0, 1, size=4), gaussian(1030, 0.8, 0.6, seed=1, size=4)

        def inside(points, queries):
            apart = np.square(points[:, None] - points).sum(-1)
            radii = np.sort(apart, axis=1)[:, 3]
            return (np.square(queries[:, None] - points).sum(-1) <= radii).any(axis=1).mean()

        found = precision_recall(real + 1000, generated + 1000)  # far from 0, where float32 has few digits
        np.testing.assert_allclose(found, (inside(real, generated), inside(generated, real)), atol=2e-3)
        assert found[0] > found[1] + 0.1  # a narrow set is precise, and misses much

    def test_identical_sets_and_far_ones(self):
        real = gaussian(20, 0, 1)
        assert precision_recall(real, real) == (1, 1)
        assert precision_recall(real, real + 1e3) == (0, 0)

    def test_too_few(self):
        with pytest.raises(ValueError, match='sets of 3 and 20 images: more than 3'):
            precision_recall(gaussian(3, 0, 1), gaussian(20, 0, 1))


@pytest.mark.parametrize('measure', [kernel_distance, precision_recall, lambda a, b: Moments.of(b)])
@pytest.mark.parametrize(
    'broken, message', [(np.nan, '1 of 6 images have features that are not finite'), (None, 'N, D')]
)
def test_features_that_give_no_number(measure, broken, message):
    features = gaussian(6, 0, 1)
    if broken is None:
        features = features[:0]
    else:
        features[2, 3] = broken
    with pytest.raises(ValueError, match=message):
        measure(gaussian(6, 0, 1), features)


def test_a_sweep_leaves_out_the_fractions_of_which_there_are_no_metrics():
    features = np.random.default_rng(0).integers(0, 255, (64, 3)).astype(np.float32)
    scores = np.concatenate([np.linspace(0.5, 0, 16), np.linspace(1, 0.6, 16), np.linspace(0.4, 0.1, 32)])
    best = np.full_like(features[:16], 7)  # the best are all the same
    real, generated = FeatureStats(features), FeatureStats(np.concatenate([features[:16], best, features[32:]]))
    points = choose_samples(scores, np.zeros(64, int), (1.0, 0.25), len(real))
    found, note = rejection_sweep('classifier', real, real, generated, np.arange(64), points, scores)
    assert [point['keep_fraction'] for point in found] == [1.0]
    assert '0.25: all 16 images of a set have the same features' in note


def test_moments_of_features_that_are_not_finite_have_no_covariance():
    features = gaussian(1500, 0, 1)
    features[1200, 3] = np.nan
    moments = Moments.of(features, allow_nonfinite=True)
    assert moments.count == 1500
    with pytest.raises(ValueError, match='some of 1500 images have features that are not finite'):
        frechet_distance(Moments.of(gaussian(40, 0, 1)), moments)


def test_loops_report_their_progress():
    seen = []

    def track(values):
        seen.append(len(values))
        return values

    sets = gaussian(1100, 0, 1), gaussian(2000, 0, 1, seed=1)
    kernel_distance(*sets, subsets=5, subset_size=100, track=track)
    precision_recall(*sets, track=track)
    assert seen == [5, 2, 2, 2, 2]  # subsets; blocks of 1024 images


def test_a_part_of_the_features_has_its_own_moments():
    features, logits = gaussian(2500, 3, 1).astype(np.float32), gaussian(2500, 0, 1, seed=1).astype(np.float32)
    part = FeatureStats(features, logits, Moments.of(features)).take(np.array([3, 5, 9]))
    assert len(part) == 3
    np.testing.assert_allclose(part.moments.mean, features[[3, 5, 9]].mean(0), rtol=1e-6)
    np.testing.assert_array_equal(part.logits, logits[[3, 5, 9]])
