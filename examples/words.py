"""Predict words with an LSTM: a script in the style of PyTorch's word language model."""

import argparse
import sysconfig
from collections import Counter
from operator import itemgetter
from pathlib import Path

import torch
from torch import nn

import hpc_resume as hr

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
parser.add_argument("--lr", type=float, default=20.0)
parser.add_argument("--clip", type=float, default=0.25)
parser.add_argument("--epochs", type=int, default=6)
parser.add_argument("--batch-size", type=int, default=20)
parser.add_argument("--bptt", type=int, default=35)
parser.add_argument("--seed", type=int, default=1111)
parser.add_argument("--log-interval", type=int, default=20)
args = parser.parse_args()
torch.manual_seed(args.seed)

# The words of the standard library's source text, as numbers; the rarest are all number 0.
folder = Path(sysconfig.get_paths()["stdlib"])
text = " ".join(path.read_text() for path in sorted(folder.glob("a*.py"))).split()
known = {word: number for number, (word, _) in enumerate(Counter(text).most_common(500), 1)}
corpus = torch.tensor([known.get(word, 0) for word in text])


def batchify(data):
    rows = data.size(0) // args.batch_size
    return data[: rows * args.batch_size].view(args.batch_size, -1).t().contiguous()


def get_batch(source, i):
    length = min(args.bptt, len(source) - 1 - i)
    return source[i : i + length], source[i + 1 : i + 1 + length].reshape(-1)


class RNNModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Embedding(len(known) + 1, args.width)
        self.rnn = nn.LSTM(args.width, args.width, args.layers, dropout=0.2)
        self.dropout = nn.Dropout(0.2)
        self.decoder = nn.Linear(args.width, len(known) + 1)

    def forward(self, data, hidden):
        output, hidden = self.rnn(self.dropout(self.encoder(data)), hidden)
        return self.decoder(self.dropout(output)).flatten(0, 1), hidden

    def init_hidden(self):
        shape = args.layers, args.batch_size, args.width
        return [torch.zeros(shape), torch.zeros(shape)]


train_data, val_data = batchify(corpus[: -len(corpus) // 10]), batchify(corpus[-len(corpus) // 10 :])
model = RNNModel()
criterion = nn.CrossEntropyLoss()
state = {"lr": args.lr, "best": None}


def train(epoch):
    model.train()
    for batch, i in run.steps(starts):
        hidden = state["hidden"] if i else model.init_hidden()
        data, targets = get_batch(train_data, i)
        model.zero_grad()
        output, state["hidden"] = model(data, [each.detach() for each in hidden])
        loss = criterion(output, targets)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), args.clip)
        for p in model.parameters():
            p.data.add_(p.grad, alpha=-state["lr"])
        if batch % args.log_interval == 0:
            print(f"epoch {epoch} batch {batch} lr {state['lr']:.4g} loss {loss.item():.4f}")


def evaluate():
    model.eval()
    total, hidden = 0.0, model.init_hidden()
    with torch.no_grad():
        for i in range(0, len(val_data) - 1, args.bptt):
            data, targets = get_batch(val_data, i)
            output, hidden = model(data, hidden)
            total += len(data) * criterion(output, targets).item()
    return total / (len(val_data) - 1)


with hr.Run() as run:
    starts = run.loader(range(0, len(train_data) - 1, args.bptt), 1, shuffle=False, collate_fn=itemgetter(0))
    run.track(model=model, state=state, data=starts)
    for epoch in run.epochs(starts, until=args.epochs):
        train(epoch)
        loss = evaluate()
        print(f"end of epoch {epoch} validation loss {loss:.4f}")
        if state["best"] is None or loss < state["best"]:
            state["best"] = loss
        else:
            state["lr"] /= 4.0  # anneal if there was no improvement
