"""Is our loss of a vocabulary head as good as torch's own `linear_cross_entropy`?

    python benchmarks/cross_entropy.py

Forward and backward of −log p of each row's target (no mean: documents have weights), with GPT-2's
vocabulary: `VocabularyHead`, torch's function with its chunks (torch ≥ 2.13) and torch's plain
logits. They take turns; times are ratios to ours. Peak memory is that of two rounds in a process of
its own, over what is there before: weight, hidden states and what the imports take.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.batches import VOCAB_SIZE  # noqa: E402
from benchmarks.memory import GIB, PeakMemory, own_memory, peak_alone  # noqa: E402
from della_model.head import VocabularyHead  # noqa: E402

Loss = Callable[[nn.Linear, Tensor, Tensor], Tensor]


def ours(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """Chunks of rows, logits made again in the backward pass."""
    loss: Tensor = VocabularyHead.adopt(linear)(hidden, targets)
    return loss


def torch_chunks(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """torch's, with the chunks that it chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, linear.weight, targets, reduction="none", options=options)


def torch_plain(linear: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy(F.linear(hidden, linear.weight), targets, reduction="none")


LOSSES: dict[str, Loss] = {"ours": ours, "torch, chunks": torch_chunks, "torch": torch_plain}


def problem(rows: int, hidden_size: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A head, hidden states, targets and a weight for each row."""
    torch.manual_seed(0)
    linear = nn.Linear(hidden_size, VOCAB_SIZE, bias=False)
    nn.init.normal_(linear.weight, std=0.02)
    hidden = torch.randn(rows, hidden_size, requires_grad=True)
    return linear, hidden, torch.randint(VOCAB_SIZE, (rows,)), torch.rand(rows)


def round_of(name: str, given: tuple[nn.Linear, Tensor, Tensor, Tensor]) -> list[Tensor]:
    """Losses and gradients."""
    linear, hidden, targets, weight = given
    loss = LOSSES[name](linear, hidden, targets)
    gradients = torch.autograd.grad((weight * loss).sum(), [hidden, linear.weight])
    return [loss.detach(), *gradients]


def two_rounds(name: str, rows: int, hidden_size: int) -> None:
    """In a process of its own, for its memory."""
    given = problem(rows, hidden_size)
    for _ in range(2):
        round_of(name, given)


def inputs_alone(rows: int, hidden_size: int) -> int:
    """What the head and the hidden states take, in bytes."""
    before = own_memory()
    with PeakMemory() as memory:
        given = problem(rows, hidden_size)
        time.sleep(0.05)
    del given
    return memory.peak - before


def timed(name: str, given: tuple[nn.Linear, Tensor, Tensor, Tensor]) -> float:
    """Seconds of a round."""
    start = time.perf_counter()
    round_of(name, given)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    names = [n for n in LOSSES if n != "torch, chunks" or hasattr(F, "linear_cross_entropy")]
    base = inputs_alone(options.rows, options.hidden)
    peaks = {n: peak_alone(two_rounds, n, options.rows, options.hidden) - base for n in names}
    given = problem(options.rows, options.hidden)
    found = {name: round_of(name, given) for name in names}
    for name in names[1:]:
        for one, other in zip(found["ours"], found[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    times = [{name: timed(name, given) for name in names} for _ in range(options.repeats)]
    table = Table(title=f"{options.rows} rows of {options.hidden}, vocabulary {VOCAB_SIZE}")
    for column in ("", "s", "time, of ours", "from", "to", "GiB", "memory, of ours"):
        table.add_column(column, justify="left" if not column else "right")
    for name in names:
        ratios = [each[name] / each["ours"] for each in times]
        figures = [statistics.median(ratios), min(ratios), max(ratios)]
        table.add_row(
            name,
            f"{statistics.median(each[name] for each in times):.2f}",
            *(f"{figure:.2f}" for figure in figures),
            f"{peaks[name] / GIB:.2f}",
            f"{peaks[name] / peaks['ours']:.2f}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
