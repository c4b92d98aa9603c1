"""PyTorch: the loop of its tutorials without a DataLoader, with Adam's update in one fused kernel."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.task import Arrays, Task

__all__ = ["Compiled", "Eager", "OneThread"]

THREADS = torch.get_num_threads()
"""What PyTorch chose when it was imported: one for each core."""


class Eager:
    """Eager mode, with as many threads as PyTorch starts by itself."""

    threads = THREADS

    def __init__(self, task: Task):
        self.task = task
        self.x, self.y = torch.from_numpy(task.x), torch.from_numpy(task.y.astype(np.int64))
        self.shuffling = torch.Generator().manual_seed(task.seed)
        torch.manual_seed(task.seed)
        layers: list[torch.nn.Module] = []
        self.by_name: dict[str, torch.nn.Module] = {}
        if task.channels:
            layers.append(torch.nn.Unflatten(1, (1, task.side, task.side)))
        for i, (n_in, n_out) in enumerate(itertools.pairwise((1, *task.channels))):
            layers += [
                torch.nn.Conv2d(n_in, n_out, 3, padding="same"),
                torch.nn.ReLU(),
                torch.nn.MaxPool2d(2),
            ]
            self.by_name[f"conv_{i}"] = layers[-3]
        if task.channels:
            layers.append(torch.nn.Flatten())
        widths = (task.features, *task.hidden)
        for i, (n_in, n_out) in enumerate(itertools.pairwise(widths)):
            layers.append(torch.nn.Linear(n_in, n_out))
            self.by_name[f"dense_{i}"] = layers[-1]
            if task.batch_norm:
                # PyTorch's momentum is one minus the others'.
                layers.append(torch.nn.BatchNorm1d(n_out, eps=1e-5, momentum=0.01))
                self.by_name[f"batch_norm_{i}"] = layers[-1]
            layers.append(torch.nn.ReLU())
            if task.rate:
                layers.append(torch.nn.Dropout(task.rate))
        layers.append(torch.nn.Linear(widths[-1], task.classes))
        self.by_name[f"dense_{len(task.hidden)}"] = layers[-1]
        # Channels last is what oneDNN has its fastest convolutions for.
        self.model = torch.nn.Sequential(*layers).to(self.x.dtype).train()
        for parameter in self.model.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            for path, value in task.first_parameters().items():
                self._parameter(path).copy_(torch.from_numpy(task.channels_first(path, value).copy()))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=task.learning_rate, fused=True)

    def loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.model(x), y)

    def epoch(self, order: np.ndarray | None = None) -> float:
        task = self.task
        torch.set_num_threads(self.threads)
        if order is None:
            shuffled = torch.randperm(len(self.x), generator=self.shuffling)
        else:
            shuffled = torch.from_numpy(np.asarray(order, np.int64))
        total = torch.zeros((), dtype=self.x.dtype)
        for rows in shuffled[: task.steps * task.batch_size].split(task.batch_size):
            loss = self.loss(self.x.index_select(0, rows), self.y.index_select(0, rows))
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        return float(total) / task.steps

    def parameters(self) -> Arrays:
        found = {path: self._parameter(path).detach().numpy().copy() for path in self.task.first_parameters()}
        return {path: self.task.channels_last(path, value) for path, value in found.items()}

    def _parameter(self, path: str) -> Any:
        layer, name = path.split("/")
        return getattr(self.by_name[layer], {"kernel": "weight", "scale": "weight", "bias": "bias"}[name])


class OneThread(Eager):
    """Eager mode in one thread: products as small as these are not worth the waiting of several."""

    threads = 1


class Compiled(Eager):
    """Forward and backward pass through ``torch.compile``, which takes half a minute and a C++ compiler."""

    def __init__(self, task: Task):
        super().__init__(task)
        self.loss = torch.compile(super().loss)
