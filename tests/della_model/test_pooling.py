import pytest
import torch

from della_model.pooling import POOLINGS, Pooling

HIDDEN = 7


@pytest.fixture
def hidden():
    return torch.randn(3, 5, HIDDEN)


UNPADDED = torch.tensor([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]).bool()


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_ignores_padding(kind, hidden):
    pooling = Pooling(HIDDEN, kind)
    pooled = pooling(hidden, UNPADDED)
    changed = hidden.masked_fill(~UNPADDED.unsqueeze(-1), 1e3)
    torch.testing.assert_close(pooling(changed, UNPADDED), pooled)


def test_pooling_mean_equals_a_plain_mean(hidden):
    pooled = Pooling(HIDDEN, "mean")(hidden, UNPADDED)
    for row in range(3):
        normed = torch.nn.functional.layer_norm(hidden[row, UNPADDED[row]], (HIDDEN,))
        torch.testing.assert_close(pooled[row], normed.mean(0))


def test_pooling_attention_starts_as_the_mean(hidden):
    attention = Pooling(HIDDEN, "attention")
    attention.reset_parameters()
    mean = Pooling(HIDDEN, "mean")(hidden, UNPADDED)
    torch.testing.assert_close(attention(hidden, UNPADDED), mean)


def test_pooling_attention_equals_a_plain_softmax(hidden):
    pooling = Pooling(HIDDEN, "attention")
    torch.nn.init.normal_(pooling.score.weight)
    pooled = pooling(hidden, UNPADDED)
    for row in range(3):
        normed = torch.nn.functional.layer_norm(hidden[row, UNPADDED[row]], (HIDDEN,))
        weights = (normed @ pooling.score.weight[0]).softmax(0)
        torch.testing.assert_close(pooled[row], weights @ normed)


def test_pooling_first_token_takes_the_first_unpadded(hidden):
    pooled = Pooling(HIDDEN, "first_token")(hidden, UNPADDED)
    for row, first in enumerate((0, 3, 0)):
        expected = torch.nn.functional.layer_norm(hidden[row, first], (HIDDEN,))
        torch.testing.assert_close(pooled[row], expected)


@pytest.mark.parametrize("kind", POOLINGS)
def test_pooling_of_padding_alone_is_finite(kind, hidden):
    assert Pooling(HIDDEN, kind)(hidden, torch.zeros(3, 5).bool()).isfinite().all()
