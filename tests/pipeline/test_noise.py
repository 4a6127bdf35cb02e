from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.noise import Purpose, Stream, document_noise, document_uniforms, generator, torch_seed
from pipeline.sampling import DocumentSampler

STREAM = Stream(7, Purpose.LIKELIHOOD)


def test_noise_of_a_document_does_not_depend_on_its_batch() -> None:
    together = document_noise(STREAM, [5, 11, 3], (3, 5), draw=2)
    alone = document_noise(STREAM, [11], (3, 5), draw=2)
    np.testing.assert_array_equal(together[1], alone[0])


@pytest.mark.parametrize(
    ("stream", "document", "draw"),
    [
        (Stream(8, Purpose.LIKELIHOOD), 11, 2),
        (Stream(7, Purpose.PRIOR), 11, 2),
        (Stream(7, Purpose.LIKELIHOOD, epoch=1), 11, 2),
        (STREAM, 12, 2),
        (STREAM, 11, 3),
        (STREAM, 2, 11),
    ],
)
def test_noise_differs_by_all_that_names_it(stream: Stream, document: int, draw: int) -> None:
    noise = document_noise(STREAM, [11], (3, 5), draw=2)
    assert not np.isclose(document_noise(stream, [document], (3, 5), draw), noise).any()


def test_noise_of_documents_and_draws_is_standard_normal() -> None:
    noise = np.stack([document_noise(STREAM, range(400), (3, 5), draw) for draw in range(5)])
    flat = noise.reshape(2000, 15)
    assert np.abs(flat.mean(axis=0)).max() < 0.1
    assert np.abs(np.cov(flat.T) - np.eye(15)).max() < 0.13
    # Neighbouring documents and draws share nothing.
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 0.02
    assert abs((noise[1:] * noise[:-1]).mean()) < 0.02


def test_uniforms_fill_the_unit_interval() -> None:
    numbers = document_uniforms(STREAM, range(500), 20)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    counts, _ = np.histogram(numbers, bins=10, range=(0, 1))
    assert np.abs(counts / 1000 - 1).max() < 0.15
    np.testing.assert_array_equal(document_uniforms(STREAM, [9], 20)[0], numbers[9])


def test_seeds_and_generators_are_functions_of_their_key() -> None:
    assert torch_seed(1, 2, 3) == torch_seed(1, 2, 3)
    assert len({torch_seed(*key) for key in np.ndindex(3, 3, 3)}) == 27
    assert generator(1, 2).random() == generator(1, 2).random()
    assert generator(1, 2).random() != generator(2, 1).random()


def test_sampler_draws_tokens_as_often_as_they_are_likely() -> None:
    scores = torch.tensor([0.3, -1.0, 1.2, 0.0, 2.0]).expand(4000, 5)
    numbers = document_uniforms(STREAM, range(4000), 2)
    sampler = DocumentSampler(numbers, temperature=0.7, top_k=0, top_p=1.0)
    expected = (scores[0] / 0.7).softmax(-1)
    for _ in range(2):  # two tokens, drawn by different numbers
        chosen = sampler(torch.zeros(4000, 1, dtype=torch.long), scores).argmax(-1)
        found = torch.bincount(chosen, minlength=5) / 4000
        error = (expected * (1 - expected) / 4000).sqrt()
        assert ((found - expected).abs() < 4 * error).all()


def test_sampler_leaves_one_token_within_top_k_and_top_p() -> None:
    scores = torch.log(torch.tensor([[0.1, 0.5, 0.25, 0.15]])).expand(200, 4)
    numbers = document_uniforms(STREAM, range(200), 1)
    for options, allowed in (((2, 1.0), {1, 2}), ((0, 0.7), {1, 2}), ((1, 1.0), {1})):
        left = DocumentSampler(numbers, 1.0, *options)(torch.zeros(200, 1), scores)
        assert (torch.isfinite(left).sum(-1) == 1).all()
        assert set(left.argmax(-1).tolist()) == allowed


def test_sampler_never_draws_what_has_no_probability() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 2)
    numbers = np.array([[0.0], [np.nextafter(1, 0)]])
    chosen = DocumentSampler(numbers, 1.0, 0, 1.0)(torch.zeros(2, 1), scores).argmax(-1)
    assert chosen.tolist() == [1, 1]
