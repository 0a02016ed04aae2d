"""Train a GPT over bytes with a trainer class and DDP: a script in the style of PyTorch's minGPT-DDP."""

import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from gpt import GPT, Source
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, random_split


@dataclass
class TrainerConfig:
    epochs: int = 2
    batch_size: int = 24
    lr: float = 2e-3
    grad_norm_clip: float = 1.0
    length: int = 64
    width: int = 64
    samples: int = 4000


class Trainer:
    def __init__(self, config, model, optimizer, train_set, test_set):
        self.config = config
        self.rank = dist.get_rank()
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.device = f"cuda:{self.local_rank}" if torch.cuda.is_available() else "cpu"
        self.train_loader = self._loader(train_set)
        self.test_loader = self._loader(test_set)
        self.model = DistributedDataParallel(model.to(self.device))
        self.optimizer = optimizer

    def _loader(self, dataset):
        batch_size = self.config.batch_size // dist.get_world_size()
        return DataLoader(dataset, batch_size, sampler=DistributedSampler(dataset))

    def _run_batch(self, windows, train):
        with torch.set_grad_enabled(train):
            loss = self.model(windows)
        if train:
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_norm_clip)
            self.optimizer.step()
        return loss.item()

    def _run_epoch(self, epoch, batches, train):
        for step, windows in batches:
            loss = self._run_batch(windows.to(self.device), train)
            if step % 20 == 0 and self.rank == 0:
                print(f"epoch {epoch} {'train' if train else 'test'} step {step} loss {loss:.4f}")

    def train(self):
        for epoch in range(self.config.epochs):
            self.train_loader.sampler.set_epoch(epoch)
            self._run_epoch(epoch, enumerate(self.train_loader), train=True)
            self._run_epoch(epoch, enumerate(self.test_loader), train=False)


def main(config):
    torch.manual_seed(0)
    windows = torch.utils.data.Subset(Source(config.length), range(config.samples))
    train_set, test_set = random_split(windows, [0.9, 0.1])
    model = GPT(config.width, 4, 2, config.length)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    trainer = Trainer(config, model, optimizer, train_set, test_set)
    trainer.train()


if __name__ == "__main__":
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    main(TrainerConfig())
    dist.destroy_process_group()
