"""Yuan 2.0 in plain PyTorch, for one sample at a time, written from the paper (arXiv 2311.15786): shares nothing with the engine.

Weights are whole tensors under the engine's names.
"""

import torch
from torch.nn.functional import conv1d, cross_entropy, pad, silu, softmax


def rms_norm(x, weight, epsilon=1e-6):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + epsilon)


def look_back(x, weight, bias):
    """A causal convolution over [s, channels], with zeros before the first token."""
    return conv1d(pad(x.t(), (1, 0))[None], weight, bias)[0].t()


def turn(x, angles):
    """RoPE on [s, heads, d]: channel i and i + d/2 are one complex number, turned by angles [s, d/2]."""
    halves = x.unflatten(-1, (2, -1)).transpose(-1, -2).contiguous()
    turned = torch.view_as_complex(halves) * torch.polar(torch.ones_like(angles), angles)[:, None]
    return torch.view_as_real(turned).transpose(-1, -2).flatten(-2)


def fp32_angles(positions, width, base=10000.0):
    return torch.outer(positions.float(), base ** (-torch.arange(0, width, 2) / width))


def layer(weights, x, angles, heads):
    """One layer on [s, h]; `weights` of this layer."""
    tokens, hidden = x.shape
    normed = rms_norm(x, weights["input_layernorm.weight"])
    conv = [weights[f"self_attention.filter.{name}"] for name in ("conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias")]
    filtered = normed + look_back(look_back(normed, *conv[:2]), *conv[2:])
    filtered = rms_norm(filtered, weights["self_attention.filter.norm.weight"])
    pairs = (filtered @ weights["self_attention.linear_qk.weight"].t()).view(tokens, heads, 2, -1)
    query, key = turn(pairs[:, :, 0], angles), turn(pairs[:, :, 1], angles)
    value = (normed @ weights["self_attention.linear_v.weight"].t()).view(tokens, heads, -1)
    scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[-1] ** 0.5
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), float("-inf"))
    context = torch.einsum("hqk,khd->qhd", softmax(scores, -1), value).reshape(tokens, hidden)
    x = x + context @ weights["self_attention.linear_proj.weight"].t()
    gate, up = (rms_norm(x, weights["pre_mlp_layernorm.weight"]) @ weights["mlp.linear_fc1.weight"].t()).chunk(2, -1)
    return x + (silu(gate) * up) @ weights["mlp.linear_fc2.weight"].t()


def logits(weights, ids, positions, heads, layers, angles=fp32_angles):
    """[s, vocabulary] of one sequence of ids [s] at positions [s]."""
    table = weights["embedding.word_embeddings.weight"]
    x = table[ids]
    turns = angles(positions, x.shape[1] // heads)
    for number in range(layers):
        prefix = f"decoder.layers.{number}."
        x = layer({name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}, x, turns, heads)
    return rms_norm(x, weights["decoder.final_layernorm.weight"]) @ table.t()


def packed_logits(weights, ids, documents, mode, heads, layers):
    """[s, vocabulary] of a sample whose documents have the lengths `documents`.

    mode: `across`; `positions`: they begin again in each document; `apart`: each document is a sequence of its own.
    """
    parts = ids.split(documents)
    places = [torch.arange(len(part)) for part in parts]
    if mode == "apart":
        return torch.cat([logits(weights, *pair, heads, layers) for pair in zip(parts, places, strict=True)])
    return logits(weights, ids, torch.cat(places) if mode == "positions" else torch.arange(len(ids)), heads, layers)


def loss_and_gradients(weights, samples, mode, heads, layers):
    """Mean loss over all tokens of (ids, labels, documents), and its gradients by name."""
    weights = {name: w.detach().requires_grad_() for name, w in weights.items()}
    loss = torch.stack(
        [cross_entropy(packed_logits(weights, ids, documents, mode, heads, layers), labels) for ids, labels, documents in samples]
    ).mean()
    loss.backward()
    return loss.item(), {name: w.grad for name, w in weights.items()}
