"""How large a model is and what running it costs: what its accuracy is read against."""

import time
from typing import Any

import torch

from kd_utils.models.signals import size_of
from kd_utils.tokens.encoding import Example, right_padded


def footprint(model: torch.nn.Module, rows: list[Example]) -> dict[str, float]:
    """The sizes of a decoder of Llama's kind.

    Args:
        rows: the sequences over whose mean length n the cost of attention is averaged.

    Returns:
        parameters: all weights, a tied one once.
        non_embedding: without the embedding and the output layer, which are a large part of a small
            model and do not grow with its depth.
        flops_per_token: floating-point operations of the forward pass (two a multiply-add), the
            output layer included: 2 (non_embedding + V d) + 2 L H P n, where a token attends to
            n / 2 tokens on average.
        bytes: of the weights, four a weight, whatever precision they have here.
        state_bytes_per_token: of keys and values that generation keeps, 2 L K P times four.
    """
    length = sum(len(row.tokens) for row in rows) / len(rows)
    named = {id(weight): weight for weight in model.parameters()}
    outer = (model.get_input_embeddings(), model.get_output_embeddings())
    embedding = {id(layer.weight): layer.weight for layer in outer if hasattr(layer, "weight")}
    parameters = sum(weight.numel() for weight in named.values())
    non_embedding = parameters - sum(weight.numel() for weight in embedding.values())
    layers, heads = size_of(model.config, "num_hidden_layers"), _size(model, "num_attention_heads")
    size = _size(model, "head_dim") or _size(model, "hidden_size") // max(heads, 1)
    keys = _size(model, "num_key_value_heads") or heads
    head = outer[1].weight.numel() if hasattr(outer[1], "weight") else 0
    return {
        "parameters": parameters,
        "non_embedding": non_embedding,
        "flops_per_token": 2 * (non_embedding + head) + 2 * (layers or 0) * heads * size * length,
        "bytes": 4 * parameters,
        "state_bytes_per_token": 4 * 2 * (layers or 0) * keys * size,
    }


@torch.inference_mode()
def tokens_per_second(model: torch.nn.Module, rows: list[Example], seconds: float = 1.0) -> float:
    """Real tokens a second of forward passes over these rows in one batch, by the fastest pass of
    so many seconds, at least two. Other work on the machine makes it smaller.
    """
    padded, lengths = right_padded(rows)
    device = next(model.parameters()).device
    input_ids, end = torch.from_numpy(padded).to(device), time.perf_counter() + seconds
    taken: list[float] = []
    while len(taken) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        model(input_ids=input_ids, use_cache=False).logits[0, 0, 0].item()  # waits for the device
        taken.append(time.perf_counter() - start)
    return sum(lengths) / min(taken[1:])


def _size(model: Any, name: str) -> int:
    """A size by its name in the config; 0: there is none."""
    return size_of(model.config, name) or 0
