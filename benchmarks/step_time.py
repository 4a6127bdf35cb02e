"""How much longer does a training step of DELLA take than one of its backbone alone?

    python benchmarks/step_time.py --text train.txt --tokenizer FOLDER

The folder holds `vocab.json` and `merges.txt` of GPT-2.

12 layers × 768, GPT-2's vocabulary, float32, dropout as in training, AdamW, batches of documents of
like length. Both models make their steps on the same batches, in turns, so that what else the
machine does falls on both; the figure is the median of the ratios. Without `--text`, token ids are
drawn at random, with lengths like a corpus of sentences.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from della_model import SIZES, Della, DellaConfig, Objective, gpt2_config

VOCAB_SIZE = 50257
END_OF_TEXT = VOCAB_SIZE - 1
TARGET = 2.3

Batch = tuple[Tensor, Tensor]
Step = Callable[[Batch], None]


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(0)
    device = torch.device(arguments.device)
    documents = read_documents(arguments) if arguments.text else random_documents()
    batches = make_batches(documents, arguments.batch_tokens, arguments.repeats + 1, device)
    plain, della = plain_step(arguments, device), della_step(arguments, device)
    for step in (plain, della):  # memory, optimizer states and kernels
        step(batches[0])

    times = [(timed(plain, batch), timed(della, batch)) for batch in batches[1:]]
    report(arguments, times, batches[1:])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, help="one document a line")
    parser.add_argument("--tokenizer", type=Path, help="folder with vocab.json and merges.txt")
    parser.add_argument("--size", default="gpt2", choices=SIZES)
    parser.add_argument("--batch-tokens", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--latent-size", type=int, default=32)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    if arguments.text and not arguments.tokenizer:
        parser.error("--text needs --tokenizer: token counts depend on it")
    return arguments


def read_documents(arguments: argparse.Namespace) -> list[Tensor]:
    tokenizer = GPT2Tokenizer.from_pretrained(arguments.tokenizer)
    lines = [line.strip() for line in arguments.text.open(encoding="utf-8")][:20_000]
    encoded = tokenizer([line for line in lines if line])["input_ids"]
    return [torch.tensor([END_OF_TEXT, *ids, END_OF_TEXT]) for ids in encoded]


def random_documents() -> list[Tensor]:
    # Log-normal, mean near 27 tokens: like sentences of news text.
    lengths = torch.empty(20_000).log_normal_(mean=3.2, std=0.5).long().clamp(4, 200)
    return [torch.randint(VOCAB_SIZE, (int(length),)) for length in lengths]


def make_batches(
    documents: list[Tensor], tokens: int, count: int, device: torch.device
) -> list[Batch]:
    """Batches of about `tokens` tokens from all over the lengths, shortest to longest shuffled."""
    documents = sorted(documents, key=len)
    batches = []
    for start in torch.linspace(0.1, 0.9, count).mul(len(documents)).long():
        chosen: list[Tensor] = []
        while sum(map(len, chosen)) < tokens and start + len(chosen) < len(documents):
            chosen.append(documents[start + len(chosen)])
        input_ids = pad_sequence(chosen, batch_first=True, padding_value=END_OF_TEXT)
        lengths = torch.tensor([len(document) for document in chosen])
        mask = torch.arange(input_ids.shape[1]) < lengths[:, None]
        batches.append((input_ids.to(device), mask.long().to(device)))
    order = torch.randperm(count)
    return [batches[i] for i in order]


def plain_step(arguments: argparse.Namespace, device: torch.device) -> Step:
    model = GPT2LMHeadModel(gpt2_config(arguments.size, VOCAB_SIZE)).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters())

    def step(batch: Batch) -> None:
        input_ids, mask = batch
        labels = input_ids.masked_fill(mask == 0, -100)
        loss = model(input_ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def della_step(arguments: argparse.Namespace, device: torch.device) -> Step:
    config = DellaConfig(
        backbone=gpt2_config(arguments.size, VOCAB_SIZE),
        latent_size=arguments.latent_size,
        fusion_rank=arguments.rank,
    )
    model = Della(config).to(device)
    objective = Objective(model).train()
    optimizer = torch.optim.AdamW(objective.parameters())

    def step(batch: Batch) -> None:
        count = len(batch[0])
        weight = torch.full((count,), 1 / count, device=device)
        loss, _ = objective(*batch, model.draw_noise(count), weight, 1.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def timed(step: Step, batch: Batch) -> float:
    synchronize = torch.cuda.synchronize if batch[0].is_cuda else lambda: None
    synchronize()
    start = time.perf_counter()
    step(batch)
    synchronize()
    return time.perf_counter() - start


def report(
    arguments: argparse.Namespace, times: list[tuple[float, float]], batches: list[Batch]
) -> None:
    ratios = [della / plain for plain, della in times]
    tokens = [int(mask.sum()) for _, mask in batches]
    table = Table(title=f"One training step, {arguments.size}, {batches[0][0].device.type}")
    for column in ("", "s a step", "tokens/s", "ratio"):
        table.add_column(column, justify="left" if not column else "right")
    rows = zip(("GPT2LMHeadModel", "Della"), zip(*times, strict=True), ("1.00", None), strict=True)
    for name, seconds, ratio in rows:
        rate = statistics.median(n / s for n, s in zip(tokens, seconds, strict=True))
        shown = ratio or f"{statistics.median(ratios):.2f}"
        table.add_row(name, f"{statistics.median(seconds):.3f}", f"{rate:,.0f}", shown)
    console = Console()
    console.print(table)
    console.print(
        f"{len(times)} pairs of steps; ratios {min(ratios):.2f} to {max(ratios):.2f}; "
        f"{statistics.mean(tokens):,.0f} unpadded tokens a batch; "
        f"to reach: ≤ {TARGET:.2f}: {'yes' if statistics.median(ratios) <= TARGET else 'no'}"
    )


if __name__ == "__main__":
    main()
