"""States to save: like a GPT-2 with AdamW, and like a model of many small tensors."""

from __future__ import annotations

from collections.abc import Iterator

import torch


def gpt_shapes(layers: int, width: int, vocabulary: int) -> Iterator[tuple[int, ...]]:
    """Shapes of a GPT-2's parameters."""
    for _ in range(layers):
        yield from [(3 * width, width), (3 * width,), (width, width), (width,)]
        yield from [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
        yield from [(width,)] * 4
    yield from [(vocabulary, width), (1024, width), (width,), (width,)]


def gpt_state(*, quick: bool) -> dict[str, torch.Tensor]:
    """Parameters and two moments of each: 444 tensors, 1.49 GB; 156 tensors, 0.16 GB if quick."""
    shapes = gpt_shapes(4, 384, 16000) if quick else gpt_shapes(12, 768, 50257)
    generator = torch.Generator().manual_seed(0)
    state = {}
    for index, shape in enumerate(shapes):
        for kind in ("weight", "exp_avg", "exp_avg_sq"):
            state[f"{index:03d}.{kind}"] = torch.randn(shape, generator=generator)
    return state


def small_state(*, quick: bool) -> dict[str, torch.Tensor]:
    """20,000 tensors of 16 to 256 numbers (2,000 if quick)."""
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(16, 257, (2000 if quick else 20000,), generator=generator).tolist()
    return {
        f"layer.{index:05d}.scale": torch.randn(size, generator=generator) for index, size in enumerate(sizes)
    }


def size_of(state: dict[str, torch.Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())
