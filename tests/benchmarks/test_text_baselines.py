"""The baselines of text, on texts short enough to count by hand."""

import math

import pytest

from benchmarks import text_baselines


def test_a_byte_that_always_was_costs_what_witten_and_bell_say():
    # Three times "a", one kind of it: (3 + 1/256) / (3 + 1).
    bits = text_baselines.ngram_bits(b"aaa", b"aa", order=1)
    assert bits == pytest.approx(-math.log2((3 + 1 / 256) / 4))


def test_a_context_tells_more_than_frequencies():
    text = b"ab" * 50
    unigram = text_baselines.ngram_bits(text, text, order=1)
    bigram = text_baselines.ngram_bits(text, text, order=2)
    assert unigram == pytest.approx(1.0, abs=0.05)
    assert bigram < 0.1


def test_a_context_that_never_was_leaves_the_shorter_one():
    # Nothing followed "b": after it, the unigram decides.
    first = text_baselines.ngram_bits(b"aab", b"b", order=2)
    both = text_baselines.ngram_bits(b"aab", b"ba", order=2)
    unigram = (2 + 2 / 256) / (3 + 2)
    assert 2 * both - first == pytest.approx(-math.log2(unigram))


def test_a_text_read_before_compresses_to_almost_nothing():
    text = bytes(i * i % 251 for i in range(2000))
    assert text_baselines.compressed_bits(text, text) < 0.5
    assert text_baselines.compressed_bits(b"", text) > 1.0
