"""Which k directions of the residual stream a narrower student keeps: one basis for all layers."""

import torch
from torch import Tensor

from kd_utils.models.cut.narrowing import folded
from kd_utils.models.cut.slots import StoredModel, slot_of


def of_weights(source: StoredModel, width: int) -> Tensor:
    """(d, k) the top right singular vectors of all matrices that touch the residual stream.

    They are stacked, each divided by its Frobenius norm, with its rows along the stream:
    [E; head; W_q; W_k; W_v; W_o^T; W_gate; W_up; W_down^T] of all layers, gains folded in. The
    vectors are the eigenvectors of the stack's (d, d) Gram matrix, to which one matrix is added at
    a time. A tied output layer counts beside the embedding, with its own gain.
    """
    size = source.config.hidden_size
    gram = torch.zeros(size, size, dtype=torch.float64)
    for key in source.keys:
        if len(axes := slot_of(key).axes) == 2:
            matrix = folded(source, key)
            matrix = matrix if axes[1] == "width" else matrix.T
            gram += (matrix.T @ matrix / matrix.square().sum()).double()
    return top_eigenvectors(gram, width)


def top_eigenvectors(gram: Tensor, width: int) -> Tensor:
    """(d, k) float32 eigenvectors of the k largest eigenvalues of a symmetric (d, d) matrix."""
    return torch.linalg.eigh(gram.double()).eigenvectors.flip(1)[:, :width].float().contiguous()


def of_channels(channels: list[int], size: int) -> Tensor:
    """(d, k) columns of the identity: the stream's own channels, as pruning keeps them."""
    return torch.eye(size)[:, channels]


def at_random(size: int, width: int, seed: int) -> Tensor:
    """(d, k) the first columns of a random rotation, uniform over all of them."""
    drawn = torch.randn(size, size, generator=torch.Generator().manual_seed(seed))
    q, r = torch.linalg.qr(drawn.double())
    return (q * r.diagonal().sign())[:, :width].float().contiguous()
