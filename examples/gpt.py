"""A small GPT, byte by byte, on the source text of Python's own standard library.

python examples/gpt.py                                       # one process
torchrun --standalone --nproc-per-node 2 examples/gpt.py     # two
hpc-resume submit examples/gpt.py:train -c configs/local.yaml --set steps=500 --wait
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812 - its usual name
from torch.nn.parallel import DistributedDataParallel

import hpc_resume as hr


class Source(torch.utils.data.Dataset[torch.Tensor]):
    """Windows of ``length + 1`` bytes of the standard library's source text: real text that every machine has."""

    def __init__(self, length: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = b"".join(path.read_bytes() for path in sorted(folder.glob("*.py")))
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self.length = length

    def __len__(self) -> int:
        return (len(self.bytes) - 1) // self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        begin = index * self.length
        return self.bytes[begin : begin + self.length + 1].long()


class Block(nn.Module):
    """Attention to what came before, then a perceptron; both on a normalised residual stream."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.attend, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.grow, self.shrink = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``(batch, time, width)`` to the same shape."""
        batch, time, width = x.shape
        qkv = self.attend(self.norms[0](x)).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.merge(seen.transpose(1, 2).reshape(batch, time, width))
        return x + self.shrink(F.gelu(self.grow(self.norms[1](x))))


class GPT(nn.Module):
    """A decoder-only transformer over bytes."""

    def __init__(self, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, window: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of predicting each byte of ``(batch, length + 1)`` windows, in nats."""
        seen, wanted = window[:, :-1], window[:, 1:]
        x = self.token(seen) + self.place.weight[: seen.shape[1]]
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), wanted.flatten())


def train(
    steps: int = 400,
    lr: float = 2e-3,
    width: int = 128,
    layers: int = 3,
    length: int = 96,
    *,
    fsdp: bool = False,
) -> None:
    """Train; goes on where an earlier job has left the run.

    Parameters
    ----------
    steps
        Of the whole run.
    lr
        Highest learning rate, after a warm-up of a tenth of the steps.
    width, layers, length
        Size of the model; bytes in a window.
    fsdp
        Shard the parameters with ``fully_shard`` instead of copying them with DDP.
    """
    with hr.Run() as run:
        model: nn.Module = GPT(width, 4, layers, length).to(run.device)
        model = fully_shard(model) if fsdp else DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.1)
        warm_up = max(steps // 10, 1)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * step / steps)),
        )
        data = run.loader(Source(length), global_batch=12)  # 1, 2, 3, 4, 6 or 12 ranks
        run.track(model=model, optimizer=optimizer, scheduler=scheduler, data=data)
        for _, window in run.steps(data, until=steps):
            loss = model(window.to(run.device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            run.log(loss=loss)


if __name__ == "__main__":
    train()
