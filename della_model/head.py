"""The vocabulary head: logits for generation, token losses for training."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from della_model.gaussian import at_least_float32
from della_model.shapes import Float, Int

# Logits alive at a time, in elements: 128 MiB in float32, 667 positions of GPT-2's vocabulary.
MAX_LOGITS = 2**25


class _TokenNll(torch.autograd.Function):
    """−log softmax(W h)[target] for each row of h, a chunk of rows at a time.

    Keeps one number a row for the backward pass and makes the chunk's logits again there: the
    logits of a batch, the largest tensor of a step by far, are never held at once.

    Not torch's `linear_cross_entropy`: its chunks took 4.0 × as long on CPU
    (`benchmarks/cross_entropy.py`), and its losses of bfloat16 are bfloat16.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        compute_dtype: torch.dtype,
    ) -> Tensor:
        rows = max(1, MAX_LOGITS // weight.shape[0])
        matrix = weight.to(compute_dtype)
        offset = None if bias is None else bias.to(compute_dtype)
        nll, log_norm = [], []
        for chunk, chunk_targets in zip(hidden.split(rows), targets.split(rows), strict=True):
            logits = at_least_float32(F.linear(chunk.to(compute_dtype), matrix, offset))
            log_norm.append(logits.logsumexp(-1))
            nll.append(log_norm[-1] - logits.gather(-1, chunk_targets[:, None]).squeeze(-1))
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(log_norm))
        ctx.rows, ctx.compute_dtype = rows, compute_dtype
        return torch.cat(nll)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_norm = ctx.saved_tensors
        matrix = weight.to(ctx.compute_dtype)
        offset = None if bias is None else bias.to(ctx.compute_dtype)
        # The sum over chunks is kept in float32 or more: bfloat16 would lose late, small chunks.
        grad_weight = None
        if ctx.needs_input_grad[1]:
            grad_weight = torch.zeros_like(weight, dtype=at_least_float32(weight[:0]).dtype)
        grad_hidden = []
        grad_bias = None
        if ctx.needs_input_grad[2]:
            grad_bias = torch.zeros_like(weight[:, 0], dtype=at_least_float32(weight[:0]).dtype)
        pieces = (hidden, targets, log_norm, grads[0])
        for chunk, target, norm, grad in zip(*(p.split(ctx.rows) for p in pieces), strict=True):
            chunk = chunk.to(ctx.compute_dtype)
            # d nll / d logits = softmax − one-hot
            residual = at_least_float32(F.linear(chunk, matrix, offset))
            residual = residual.sub_(norm[:, None]).exp_()
            residual.scatter_add_(-1, target[:, None], residual.new_full((len(chunk), 1), -1.0))
            residual = residual.mul_(grad[:, None]).to(ctx.compute_dtype)
            grad_hidden.append((residual @ matrix).to(hidden.dtype))
            if grad_weight is not None:
                grad_weight += residual.T @ chunk
            if grad_bias is not None:
                grad_bias += residual.sum(0)
        return (
            torch.cat(grad_hidden) if ctx.needs_input_grad[0] else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


class VocabularyHead(nn.Linear):
    """A backbone's `lm_head` that can also give token losses without keeping logits.

    The loss is part of the module's own forward because ZeRO-3 gathers a weight when the module
    that owns it runs, and at no other time.
    """

    @classmethod
    def adopt(cls, linear: nn.Linear) -> VocabularyHead:
        """Turns a backbone's head into one of these, keeping its parameters, ties and hooks."""
        if isinstance(linear, cls):
            return linear
        linear.__class__ = cls
        return cast(VocabularyHead, linear)

    def forward(
        self,
        input: Float[Tensor, "*rows hidden"],
        targets: Int[Tensor, "*rows"] | None = None,
        constant: Float[Tensor, " vocabulary"] | None = None,
    ) -> Float[Tensor, "*out"]:
        """Logits [..., vocabulary]; with `targets`, −log p(target) in nats [...], float32.

        `constant` is added to the logits, beside the head's own bias.
        """
        bias = self.bias if constant is None else constant
        if self.bias is not None and constant is not None:
            bias = self.bias + constant
        if targets is None:
            return F.linear(input, self.weight, bias)
        device = input.device.type
        autocast = torch.is_autocast_enabled(device)
        compute_dtype = torch.get_autocast_dtype(device) if autocast else input.dtype
        rows = input.reshape(-1, self.in_features)
        nll = _TokenNll.apply(rows, self.weight, bias, targets.reshape(-1), compute_dtype)
        return nll.view(targets.shape)
