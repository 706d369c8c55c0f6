"""A model of four linears whose subclasses read the weights in unusual ways."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from smoothquant_kernels import quantize_model, smooth_lm
from tests.support.models import EXACT, HIDDEN, VOCAB, token_batches


class FourLinears(nn.Module):
    """An embedding, a norm and four linears. Subclasses define `middle`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCAB, HIDDEN)
        self.norm = nn.LayerNorm(HIDDEN)
        self.a, self.b, self.c = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.head = nn.Linear(HIDDEN, VOCAB)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.norm(self.embed(input_ids))
        y: Tensor = self.head(self.middle(x))
        return y

    def middle(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class ReadsInTraining(FourLinears):
    """Reads a weight on a path that inference does not take."""

    def middle(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.b.weight, self.b.bias) if self.training else self.b(x)
        return self.c(self.a(y))


def quantized_both_ways(model: nn.Module) -> list[nn.Module]:
    """The model, quantized without data and quantized after smoothing."""
    smoothed = smooth_lm(copy.deepcopy(model), token_batches(), config=EXACT, progress=False)
    return [quantize_model(copy.deepcopy(model)), quantize_model(smoothed)]
