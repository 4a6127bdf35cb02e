"""Is our implementation faster and smaller than a plain reading of the paper?

    python benchmarks/paper_reading.py --text yahoo.txt --tokenizer FOLDER

The plain reading is what a first implementation does: documents in the order of a shuffle, padded
to the longest of their batch; attention written out; a loop over the ranks of the fusion; all
logits of a batch at once. Ours takes the same documents in batches of like length, of as many
tokens on average. Both start from the same weights, with the same noise for each document, and make
one epoch of AdamW over the documents; before it their losses are compared. Epochs alternate, so
that what else the machine does falls on both. Peak memory is that of an epoch in a process of its
own, over what the imports take.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn import functional as F  # noqa: E402

from benchmarks.batches import VOCAB_SIZE, Batch, documents_of, padded  # noqa: E402
from benchmarks.memory import GIB, peak_alone  # noqa: E402
from della_model import SIZES, Della, DellaConfig, Objective, gpt2_config  # noqa: E402

SPEED_TARGET, MEMORY_TARGET = 2.0, 0.5


class PlainDella(nn.Module):
    """The paper's equations, one after the other, over the weights of a Della around GPT-2."""

    def __init__(self, model: Della) -> None:
        super().__init__()
        self.model = model  # the parameters' home; none of its methods is used
        self.trunk = model.trunk
        self.num_heads = model.config.backbone.n_head
        self.rank = model.config.fusion_rank

    def loss(self, batch: Batch, noise: Tensor) -> Tensor:
        """The negative ELBO of the batch's documents, summed, in nats."""
        input_ids, mask = batch
        visible = mask[:, None, None, :].bool()
        states = self.stack(input_ids, visible, None)
        latents, kl = self.infer(states, mask, noise)
        time_ = input_ids.shape[1]
        causal = torch.ones(time_, time_, dtype=torch.bool).tril()
        states = self.stack(input_ids, visible & causal, latents)
        logits = states[-1] @ self.trunk.wte.weight.T
        nll = F.cross_entropy(logits[:, :-1].transpose(1, 2), input_ids[:, 1:], reduction="none")
        return (nll * mask[:, 1:]).sum() + kl.sum()

    def stack(
        self, input_ids: Tensor, visible: Tensor, latents: list[Tensor] | None
    ) -> list[Tensor]:
        """Hidden states after every layer; the last behind the final norm."""
        trunk, found = self.trunk, []
        hidden = trunk.wte(input_ids) + trunk.wpe(torch.arange(input_ids.shape[1]))
        for layer, block in enumerate(trunk.h):
            z = None if latents is None else latents[layer]
            hidden = hidden + self.attention(block.attn, block.ln_1(hidden), visible, z)
            hidden = hidden + block.mlp(block.ln_2(hidden))
            found.append(hidden)
        found[-1] = trunk.ln_f(found[-1])
        return found

    def attention(
        self, attention: nn.Module, hidden: Tensor, visible: Tensor, z: Tensor | None
    ) -> Tensor:
        """Softmax attention with every score of every head."""
        projection = attention.get_submodule("c_attn.projection")
        query, key, value = projection(hidden).chunk(3, dim=-1)
        if z is not None:
            value = self.fused(attention.get_submodule("c_attn.fusion"), value, z)
        query, key, value = (
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (query, key, value)
        )
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
        return attention.c_proj((weights @ value).transpose(1, 2).flatten(2))

    def fused(self, fusion: nn.Module, value: Tensor, z: Tensor) -> Tensor:
        """Σ_r (W_v^r [v; 1]) ∘ (W_z^r [z; 1]), z beside every position."""
        width = value.shape[-1]
        z = z[:, None].expand(-1, value.shape[1], -1)
        total = torch.zeros_like(value)
        for r in range(self.rank):
            rows = slice(r * width, (r + 1) * width)
            of_value, of_latent = fusion.value_factor, fusion.latent_factor
            from_value = F.linear(value, of_value.weight[rows], of_value.bias[rows])
            total = total + from_value * F.linear(z, of_latent.weight[rows], of_latent.bias[rows])
        return total

    def infer(
        self, states: list[Tensor], mask: Tensor, noise: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """A draw from each posterior, and the KL of each to its prior, in nats."""
        chain, latents, kl = self.model.chain, [], []
        summary = torch.zeros(len(mask), noise.shape[-1])
        for layer, hidden in enumerate(states):
            features = self.pooled(self.model.pooling[layer], hidden, mask)
            raw_q = chain.posterior_from_features[layer](features)
            raw_p = torch.zeros_like(raw_q)
            if layer > 0:
                total = chain.latent_to_summary[layer - 1](latents[-1])
                if layer > 1:
                    total = total + chain.summary_to_summary[layer - 2](summary)
                summary = total.tanh()
                raw_p = chain.prior_heads[layer - 1](summary)
                raw_q = raw_q + chain.posterior_from_summary[layer - 1](summary)
            (q, log_q), (p, log_p) = ((m, 5 * torch.tanh(s / 5)) for m, s in
                                      (raw_q.chunk(2, -1), raw_p.chunk(2, -1)))  # fmt: skip
            latents.append(q + log_q.exp() * noise[:, layer])
            ratio, shift = (2 * (log_q - log_p)).exp(), ((q - p) / log_p.exp()).square()
            kl.append((log_p - log_q + (ratio + shift - 1) / 2).sum(-1))
        return latents, torch.stack(kl, dim=-1)

    @staticmethod
    def pooled(pooling: nn.Module, hidden: Tensor, mask: Tensor) -> Tensor:
        """The paper's pooling by attention, over unpadded positions."""
        normed = pooling.norm(hidden)
        scores = pooling.score(normed).squeeze(-1).masked_fill(mask == 0, -1e9)
        return (scores.softmax(-1)[..., None] * normed).sum(1)


class Epoch:
    """One of the two implementations with its documents, ready to train.

    Args:
        kind: "plain" or "ours".
        options: the command line's.
        documents: token ids of each; a batch has `options.batch` of them on average.
    """

    def __init__(self, kind: str, options: argparse.Namespace, documents: list[Tensor]) -> None:
        torch.manual_seed(0)
        # Neither has dropout, for the losses are compared; latents enter as in the paper.
        config = DellaConfig(
            backbone=gpt2_config(options.size, VOCAB_SIZE, dropout=0.0),
            latent_size=options.latent_size, fusion_rank=options.rank, fusion_residual=False,
        )  # fmt: skip
        self.model = Della(config).train()
        noise = self.model.draw_noise(len(documents))
        self.kind, self.count = kind, len(documents)
        self.plain, self.objective = PlainDella(self.model), Objective(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5)
        rows = list(shuffled(documents, options.batch))
        if kind == "ours":
            rows = list(of_like_length(documents, len(rows)))
        self.batches = [(padded([documents[i] for i in part]), noise[part]) for part in rows]

    def loss(self, batch: Batch, noise: Tensor) -> Tensor:
        """The sum over the batch's documents, in nats."""
        if self.kind == "plain":
            return self.plain.loss(batch, noise)
        return self.objective(*batch, noise, torch.ones(len(noise)), 1.0)[0]

    @torch.no_grad()
    def mean_loss(self) -> float:
        """Nats a document, over all of them."""
        return sum(float(self.loss(*batch)) for batch in self.batches) / self.count

    def train(self) -> None:
        """One optimizer step for each batch."""
        for batch, noise in self.batches:
            loss = self.loss(batch, noise) / len(noise)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()

    @property
    def share_of_padding(self) -> float:
        """Positions without a token among all."""
        masks = [batch[1] for batch, _ in self.batches]
        return 1 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)


def shuffled(documents: list[Tensor], size: int) -> Iterator[list[int]]:
    """Batches of `size` documents in the order of a shuffle."""
    order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(0))
    yield from (part.tolist() for part in order.split(size))


def of_like_length(documents: list[Tensor], count: int) -> Iterator[list[int]]:
    """About `count` batches of documents of like length, with equally many tokens each."""
    budget = math.ceil(sum(map(len, documents)) / count)
    part: list[int] = []
    for i in sorted(range(len(documents)), key=lambda i: len(documents[i])):
        if part and (len(part) + 1) * len(documents[i]) > budget * 1.05:
            yield part
            part = []
        part.append(i)
    yield part


def one_epoch(kind: str, options: argparse.Namespace, documents: list[Tensor]) -> None:
    """In a process of its own, for its memory."""
    torch.set_num_threads(options.threads)
    Epoch(kind, options, documents).train()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="one document a line")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--size", default="gpt2", choices=SIZES)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--batch", type=int, default=16, help="documents of a batch, on average")
    parser.add_argument("--repeats", type=int, default=2, help="pairs of epochs")
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    documents = documents_of(options.text, options.tokenizer)
    chosen = torch.randperm(len(documents), generator=torch.Generator().manual_seed(1))
    documents = [documents[i] for i in chosen[: options.documents]]

    kinds = ("plain", "ours")
    peaks = [peak_alone(one_epoch, kind, options, documents) for kind in kinds]
    epochs = [Epoch(kind, options, documents) for kind in kinds]
    losses = [epoch.mean_loss() for epoch in epochs]
    for epoch in epochs:
        epoch.train()  # warm up: memory, moments
    times = [[timed(epoch) for epoch in epochs] for _ in range(options.repeats)]
    report(options, documents, epochs, losses, times, peaks)


def timed(epoch: Epoch) -> float:
    """Seconds of one epoch."""
    start = time.perf_counter()
    epoch.train()
    return time.perf_counter() - start


def report(
    options: argparse.Namespace, documents: list[Tensor], epochs: list[Epoch],
    losses: list[float], times: list[list[float]], peaks: list[int],
) -> None:  # fmt: skip
    tokens = sum(len(document) - 1 for document in documents)
    table = Table(title=f"{options.size}, {len(documents)} documents, {tokens:,} predicted tokens")
    for column in ("", "batches", "padding", "loss", "tokens/s", "ratio", "peak GiB", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    for index, name in enumerate(("plain reading", "ours")):
        seconds = statistics.median(pair[index] for pair in times)
        speed = statistics.median(pair[0] / pair[index] for pair in times)
        table.add_row(
            name, str(len(epochs[index].batches)), f"{epochs[index].share_of_padding:.0%}",
            f"{losses[index]:.4f}", f"{tokens / seconds:,.0f}", f"{speed:.2f}",
            f"{peaks[index] / GIB:.2f}", f"{peaks[index] / peaks[0]:.2f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    ratios = [plain / ours for plain, ours in times]
    console.print(
        f"{len(ratios)} pairs of epochs; ratios of speed {min(ratios):.2f} to {max(ratios):.2f}; "
        f"losses differ by {abs(losses[1] / losses[0] - 1):.1e} of their value; "
        f"to reach: ≥ {SPEED_TARGET} × the tokens/s, ≤ {MEMORY_TARGET} × the memory"
    )


if __name__ == "__main__":
    main()
