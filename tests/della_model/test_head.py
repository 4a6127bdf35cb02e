import pytest
import torch
from torch import nn

from della_model import head as head_module
from della_model.head import VocabularyHead

ROWS, HIDDEN, VOCAB = 11, 5, 17


@pytest.fixture
def small_chunks(monkeypatch):
    """Three rows at a time, so that eleven rows make an uneven last chunk."""
    monkeypatch.setattr(head_module, "MAX_LOGITS", 3 * VOCAB)


def make_head(dtype=torch.float64):
    return VocabularyHead.adopt(nn.Linear(HIDDEN, VOCAB, bias=False, dtype=dtype))


@pytest.mark.usefixtures("small_chunks")
def test_head_nll_and_gradients_equal_cross_entropy():
    head = make_head()
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    targets, weights = torch.randint(VOCAB, (ROWS,)), torch.randn(ROWS, dtype=torch.float64)
    ours = head(hidden, targets=targets)
    expected = nn.functional.cross_entropy(head(hidden), targets, reduction="none")
    torch.testing.assert_close(ours, expected)
    inputs = (hidden, head.weight)
    ours_grads = torch.autograd.grad((weights * ours).sum(), inputs)
    expected_grads = torch.autograd.grad((weights * expected).sum(), inputs)
    for one, other in zip(ours_grads, expected_grads, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.usefixtures("small_chunks")
def test_head_nll_passes_gradcheck():
    head, targets = make_head(), torch.randint(VOCAB, (ROWS,))
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)

    def nll(hidden, weight):
        return torch.func.functional_call(head, {"weight": weight}, (hidden, targets))

    assert torch.autograd.gradcheck(nll, (hidden, head.weight))


@pytest.mark.usefixtures("small_chunks")
def test_head_nll_never_holds_all_logits():
    head, largest = make_head(), 0

    def watch(tensor):
        nonlocal largest
        largest = max(largest, tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(watch, lambda tensor: tensor):
        head(torch.randn(ROWS, HIDDEN, dtype=torch.float64), targets=torch.zeros(ROWS).long())
    assert largest < ROWS * VOCAB


def test_head_nll_in_bfloat16_is_float32_and_near():
    head = make_head(torch.bfloat16)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    targets = torch.randint(VOCAB, (ROWS,))
    ours = head(hidden, targets=targets)
    expected = nn.functional.cross_entropy(
        hidden.float() @ head.weight.float().T, targets, reduction="none"
    )
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected, atol=0.02, rtol=0.02)
    ours.sum().backward()
    assert head.weight.grad.dtype == torch.bfloat16
    assert head.weight.grad.isfinite().all()


def test_head_nll_under_autocast_is_near_float32():
    head, targets = make_head(torch.float32), torch.randint(VOCAB, (ROWS,))
    hidden = torch.randn(ROWS, HIDDEN, requires_grad=True)
    exact = torch.autograd.grad(head(hidden, targets=targets).sum(), (hidden, head.weight))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = head(hidden, targets=targets)
    near = torch.autograd.grad(nll.sum(), (hidden, head.weight))
    for one, other in zip(near, exact, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, other, atol=0.03, rtol=0.03)


def test_head_frozen_gives_no_weight_gradient():
    head = make_head().requires_grad_(False)
    hidden = torch.randn(ROWS, HIDDEN, dtype=torch.float64, requires_grad=True)
    head(hidden, targets=torch.zeros(ROWS).long()).sum().backward()
    assert head.weight.grad is None
    assert hidden.grad is not None


def test_head_without_rows_gives_no_losses():
    nll = make_head()(torch.zeros(0, HIDDEN, dtype=torch.float64), targets=torch.zeros(0).long())
    assert nll.shape == (0,)
