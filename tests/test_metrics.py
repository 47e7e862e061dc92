"""Metrics against closed forms, enumeration and each other."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vqvae2_jax.metrics import classification, codebook, psnr

CODE_LISTS = st.lists(st.integers(0, 6), min_size=1, max_size=60)


def zeros(shape):
    return np.zeros(shape, int)


class TestPSNR:
    def test_closed_form_and_scale(self):
        assert psnr.psnr_from_mse(0.01, data_range=1) == pytest.approx(20)
        assert psnr.psnr_from_mse(0.01 * 255**2, data_range=255) == pytest.approx(20)
        assert psnr.psnr_from_mse(1, data_range=1) == 0
        assert psnr.psnr_from_mse(0, data_range=1) == math.inf

    @pytest.mark.parametrize('mse, data_range', [(-1, 1), (math.nan, 1), (1, 0), (1, math.nan)])
    def test_psnr_refuses(self, mse, data_range):
        with pytest.raises(ValueError, match='mse >= 0 and data_range > 0'):
            psnr.psnr_from_mse(mse, data_range)


class TestCodes:
    def test_histogram(self):
        values = np.array([[0, 2], [2, 2]], np.uint16)
        np.testing.assert_array_equal(codebook.histogram(values, 4), [1, 0, 3, 0])

    def test_perplexity_closed_forms(self):
        assert codebook.perplexity(np.full(512, 3)) == pytest.approx(512)
        assert codebook.perplexity([0, 7, 0]) == pytest.approx(1)
        # p = 1/2, 1/4, 1/4: entropy 1.5 bits.
        assert codebook.perplexity([2.0, 1.0, 1.0]) == pytest.approx(2**1.5)

    @given(CODE_LISTS)
    def test_entropy_bounds_and_agreement(self, values):
        entropy = codebook.unigram_entropy(np.array(values), 7)
        assert -1e-12 <= entropy <= math.log(len(set(values))) + 1e-12
        assert codebook.perplexity(codebook.histogram(np.array(values), 7)) == pytest.approx(math.exp(entropy))

    def test_positional_cross_entropy_by_hand(self):
        # Position 0 was 0 three times; position 1 was 0, 1, 1. alpha 1, K 3: p = (count + 1) / 6.
        train = np.array([[0, 0], [0, 1], [0, 1]])
        held_out = np.array([[0, 1], [2, 0]])
        expected = -np.mean(np.log([4 / 6, 3 / 6, 1 / 6, 2 / 6]))
        assert codebook.positional_cross_entropy(train, held_out, 3, alpha=1.0) == pytest.approx(expected)

    @pytest.mark.parametrize('chunk', [1, 7, 10**9])
    def test_positional_cross_entropy_against_loops(self, monkeypatch, chunk):
        monkeypatch.setattr(codebook, '_CHUNK', chunk)
        rng = np.random.default_rng(0)
        # uint8, while positions times K is beyond it.
        train, held_out = (rng.integers(0, 90, (n, 2, 3), dtype=np.uint8) for n in (50, 4))
        total = 0.0
        for image in held_out:
            for i in range(2):
                for j in range(3):
                    total -= math.log((np.sum(train[:, i, j] == image[i, j]) + 0.5) / (50 + 0.5 * 90))
        assert codebook.positional_cross_entropy(train, held_out, 90, alpha=0.5) == pytest.approx(total / 24)

    def test_a_fixed_pattern_is_certain_by_position_and_not_pooled(self):
        pattern = np.arange(200, dtype=np.uint8).reshape(1, 200).repeat(50, axis=0)
        assert codebook.positional_cross_entropy(pattern, pattern, 200, alpha=1e-6) == pytest.approx(0, abs=1e-4)
        assert codebook.unigram_entropy(pattern, 200) == pytest.approx(math.log(200))

    def test_bits_per_image(self):
        # 1 bit a code on 2x2, 3 bits a code on 4x4.
        assert codebook.bits_per_image([math.log(2), math.log(8)], [(2, 2), (4, 4)]) == pytest.approx(4 + 48)

    def test_compression_ratio_of_the_paper(self):
        ratio = codebook.compression_ratio((256, 256, 3), [(64, 64), (32, 32)], [512, 512])
        assert ratio == pytest.approx(34.1333, rel=1e-4)
        assert codebook.compression_ratio((4, 8, 1), [(2, 2)], [16]) == pytest.approx(16)

    @pytest.mark.parametrize(
        'call, error, match',
        [
            (lambda: codebook.histogram(np.array([0, 4]), 4), ValueError, r'codes spans 0..4, but .* 4 allows 0..3'),
            (lambda: codebook.histogram(np.array([-1, 2]), 4), ValueError, r'spans -1..2'),
            (lambda: codebook.unigram_entropy(zeros(0), 4), ValueError, 'codes is empty'),
            (lambda: codebook.histogram(np.array([0.0]), 4), TypeError, 'dtype float64; codes are integers'),
            (lambda: codebook.perplexity([0, 0]), ValueError, 'not all zero'),
            (lambda: codebook.perplexity([1, -1, 3]), ValueError, 'non-negative'),
            (lambda: codebook.perplexity([[1, 2]]), ValueError, r'shape \(1, 2\)'),
            (lambda: codebook.perplexity([1, math.nan]), ValueError, 'finite'),
            (lambda: codebook.perplexity([1, math.inf]), ValueError, 'finite'),
            (
                lambda: codebook.positional_cross_entropy(zeros((2, 3)), zeros((2, 4)), 2, 1),
                ValueError,
                'same positions',
            ),
            (lambda: codebook.positional_cross_entropy(zeros(2), zeros(2), 2, 1), ValueError, r'\[N, ...\]'),
            (
                lambda: codebook.positional_cross_entropy(zeros((2, 3)), np.full((1, 3), 2), 2, 1),
                ValueError,
                'codes spans 2..2',
            ),
            (lambda: codebook.positional_cross_entropy(zeros((2, 3)), zeros((1, 3)), 2, 0), ValueError, 'alpha.*got 0'),
            (lambda: codebook.bits_per_image([1.0], [(2, 2), (4, 4)]), ValueError, 'has 1 levels and shapes has 2'),
            (lambda: codebook.compression_ratio((4, 4, 3), [], []), ValueError, 'at least one'),
            (lambda: codebook.compression_ratio((4, 4, 3), [(2, 2)], [1]), ValueError, 'fewer than 2 codes'),
        ],
    )
    def test_refuses(self, call, error, match):
        with pytest.raises(error, match=match):
            call()

    def test_results_are_python_floats(self):
        values = np.zeros((2, 2), np.uint8)
        results = [
            codebook.perplexity([1, 2]),
            codebook.unigram_entropy(values, 2),
            codebook.positional_cross_entropy(values, values, 2, 1),
            codebook.bits_per_image([np.float32(1)], [(1, 1)]),
            codebook.compression_ratio((4, 4, 3), [(2, 2)], [4]),
        ]
        assert [type(result) for result in results] == [float] * 5


class TestClassification:
    def test_accuracy(self):
        assert classification.accuracy([0, 1, 2, 2], [0, 1, 1, 2]) == 0.75

    def test_top_k(self):
        scores = np.array([[0.1, 0.7, 0.2], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]])
        labels = [2, 0, 0]
        assert classification.top_k_accuracy(scores, labels, 1) == pytest.approx(1 / 3)
        assert classification.top_k_accuracy(scores, labels, 2) == pytest.approx(2 / 3)
        assert classification.top_k_accuracy(scores, labels, 3) == 1
        assert classification.top_k_accuracy(scores, labels, 1) == classification.accuracy(scores.argmax(1), labels)

    def test_a_constant_score_earns_nothing(self):
        assert classification.top_k_accuracy(np.zeros((5, 3)), [0, 1, 2, 0, 1], 2) == 0

    def test_per_class(self):
        assert classification.per_class_accuracy([0, 1, 1, 0], [0, 0, 1, 0], 3) == [pytest.approx(2 / 3), 1.0, None]

    @pytest.mark.parametrize(
        'call, error, match',
        [
            (lambda: classification.accuracy([0], [0, 1]), ValueError, 'predicted has 1 examples and labels has 2'),
            (lambda: classification.accuracy(zeros(0), zeros(0)), ValueError, 'at least one'),
            (lambda: classification.accuracy([0.5], [0]), TypeError, 'predicted has dtype float64'),
            (lambda: classification.accuracy([[0]], [0]), ValueError, r'predicted must be \[N\]'),
            (lambda: classification.per_class_accuracy([0], [3], 3), ValueError, r'labels spans 3..3, but 3 classes'),
            (lambda: classification.top_k_accuracy(np.zeros((1, 3)), [0], 4), ValueError, 'k is 4, but .* 3 classes'),
            (lambda: classification.top_k_accuracy(np.zeros(3), [0, 1, 2], 1), ValueError, r'\[N, classes\]'),
            (lambda: classification.top_k_accuracy(np.full((1, 2), np.nan), [0], 1), ValueError, 'NaN'),
        ],
    )
    def test_refuses(self, call, error, match):
        with pytest.raises(error, match=match):
            call()
