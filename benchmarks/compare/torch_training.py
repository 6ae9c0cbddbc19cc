"""Training in PyTorch, as its guides to performance advise.

Automatic mixed precision is `torch.autocast`, with a `GradScaler` for float16;
optimizers are fused, gradients are set to None, images are channels-last, and
on a GPU batches are copied from pinned memory without waiting. float32
products may round to TF32 on GPUs that have it, as TensorFlow's do.
"""

import itertools
import pathlib

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks.compare import torch_networks, torch_weights
from benchmarks.compare.cases import AdamW, Case, Sgd, make_batches
from benchmarks.compare.contestants import Contestant
from benchmarks.compare.memory import ResidentMemory, TorchGpuMemory
from benchmarks.compare.turns import Gauge, Turns

_AUTOCAST = {
    "float32": None,
    "mixed_bfloat16": torch.bfloat16,
    "mixed_float16": torch.float16,
}


def prepare(device: str, threads: int) -> Gauge:
    """As `keras_training.prepare`."""
    torch.set_num_threads(threads)
    if device == "gpu":
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.benchmark = True
    image = torch.ones([1, 8, 8, 8], device=_device(device))
    F.conv2d(image, torch.ones([8, 8, 3, 3], device=image.device)).cpu()
    return ResidentMemory() if device == "cpu" else TorchGpuMemory()


def train(
    contestant: Contestant,
    case: Case,
    precision: str,
    epochs: int,
    turns: Turns,
    *,
    device: str,
    weights: pathlib.Path,
) -> None:
    """Trains as the contestant does, all epochs.

    Args:
        contestant: which of PyTorch's ways.
        case: what is trained.
        precision: as Keras names it.
        epochs: of `case.steps` steps.
        turns: is told of each epoch.
        device: "cpu" or "gpu".
        weights: a .npz file of those that Keras's model began with.
    """
    module = torch_networks.build(case.network)
    torch_weights.load(module, dict(np.load(weights)))
    module = module.to(_device(device), memory_format=torch.channels_last)
    optimizer = _make_optimizer(case, module)
    dtype = _AUTOCAST[precision]
    scaler = torch.amp.GradScaler(
        _device(device), enabled=dtype == torch.float16
    )

    def loss_of(x, y):
        return F.cross_entropy(module(x), y)

    if contestant.compiled:
        loss_of = torch.compile(loss_of)
    batches = itertools.cycle(tensors(case, device))
    for _ in range(epochs):
        turns.begin_epoch()
        total = torch.zeros([], device=_device(device))
        for _ in range(case.steps):
            x, y = (
                each.to(_device(device), non_blocking=True)
                for each in next(batches)
            )
            with torch.autocast(
                _device(device), dtype, enabled=dtype is not None
            ):
                loss = loss_of(x, y)
            optimizer.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            total += loss.detach()
        turns.end_epoch(float(total) / case.steps)


def _device(name: str) -> str:
    return "cuda" if name == "gpu" else name


def _make_optimizer(case, module) -> torch.optim.Optimizer:
    match case.optimizer:
        case Sgd(rate, momentum):
            return torch.optim.SGD(
                module.parameters(), rate, momentum=momentum, fused=True
            )
        case AdamW(rate, decay, beta_1, beta_2, epsilon):
            return torch.optim.AdamW(
                module.parameters(),
                rate,
                betas=(beta_1, beta_2),
                eps=epsilon,
                weight_decay=decay,
                fused=True,
            )


def tensors(case, device) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The batches: images as [B, 3, H, W], a token's label in one row each."""
    found = []
    for x, y in make_batches(case):
        x, y = torch.from_numpy(x), torch.from_numpy(y).long()
        if x.ndim == 4:
            # A view: in memory the channels stay last.
            x = x.permute(0, 3, 1, 2)
        if not x.is_floating_point():
            y = y.flatten()
        if device == "gpu":
            x, y = x.pin_memory(), y.pin_memory()
        found.append((x, y))
    return found
