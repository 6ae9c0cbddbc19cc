"""The networks in PyTorch: the same layers, weights and products as in Keras.

Where the frameworks' conventions differ, Keras's are kept:

*   ResNet-50 is that of `keras.applications`: version 1, whose first 1x1
    convolution of a stage has the stride, convolutions with biases. It pads by
    a layer of its own before it strides, so "same" with stride 2, which pads
    one side more than the other, does not occur. Max pooling pads with zeros
    there and with -inf here, behind a ReLU the same.
*   Batch norm: Keras's momentum m is 1 - m in PyTorch. PyTorch's moving
    variance is the unbiased one; training never reads it.
*   Kernels are transposed when they are loaded; images are channels-last in
    memory, as in TensorFlow and as PyTorch advises for 16 bits.
"""

import itertools

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.compare.cases import Gpt, Mlp, Network, ResNet50, UNet

_ROPE_WAVELENGTH = 10_000.0


def build(network: Network) -> nn.Module:
    """The module; its output is float32 logits with classes second.

    Images come as [B, 3, H, W], tokens as [B, T]; logits leave as [B, V],
    [B, V, H, W] or, of tokens, [B * T, V].
    """
    match network:
        case ResNet50(_, classes):
            return _ResNet50(classes)
        case Gpt():
            return _Gpt(network)
        case UNet(_, widths, classes):
            return _UNet(widths, classes)
        case Mlp(widths):
            return _Mlp(widths)


class _Mlp(nn.Module):
    def __init__(self, widths):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Linear(i, o) for i, o in itertools.pairwise(widths)
        )

    def forward(self, x):
        *hidden, last = self.layers
        for layer in hidden:
            x = F.relu(layer(x))
        return last(x).float()


def _norm(channels, momentum, epsilon):
    return nn.BatchNorm2d(channels, eps=epsilon, momentum=1 - momentum)


class _Residual(nn.Module):
    """The bottleneck block; its layers in the order that Keras lists them."""

    def __init__(self, inputs, width, stride, has_projection):
        super().__init__()

        def norm(channels):
            return _norm(channels, momentum=0.99, epsilon=1.001e-5)

        self.conv1 = nn.Conv2d(inputs, width, 1, stride)
        self.norm1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.norm2 = norm(width)
        self.projection = None
        if has_projection:
            self.projection = nn.Conv2d(inputs, 4 * width, 1, stride)
            self.projection_norm = norm(4 * width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1)
        self.norm3 = norm(4 * width)

    def forward(self, x):
        shortcut = x
        if self.projection is not None:
            shortcut = self.projection_norm(self.projection(x))
        x = F.relu(self.norm1(self.conv1(x)))
        x = F.relu(self.norm2(self.conv2(x)))
        return F.relu(shortcut + self.norm3(self.conv3(x)))


class _ResNet50(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, padding=3)
        self.norm = _norm(64, momentum=0.99, epsilon=1.001e-5)
        blocks, inputs = [], 64
        for width, count in zip((64, 128, 256, 512), (3, 4, 6, 3), strict=True):
            for i in range(count):
                stride = 2 if i == 0 and width > 64 else 1
                blocks.append(_Residual(inputs, width, stride, i == 0))
                inputs = 4 * width
        self.blocks = nn.Sequential(*blocks)
        self.predictions = nn.Linear(inputs, num_classes)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = self.blocks(F.max_pool2d(x, 3, 2, padding=1))
        return self.predictions(x.mean((2, 3))).float()


class _UNet(nn.Module):
    def __init__(self, widths, num_classes):
        super().__init__()
        *finer, coarsest = widths
        inputs, down = 3, []
        for width in finer:
            down.append(_two_convolutions(inputs, width))
            inputs = width
        self.down = nn.ModuleList(down)
        self.middle = _two_convolutions(inputs, coarsest)
        inputs = coarsest
        up, upsample = [], []
        for width in reversed(finer):
            upsample.append(nn.ConvTranspose2d(inputs, width, 2, 2))
            up.append(_two_convolutions(2 * width, width))
            inputs = width
        self.upsample = nn.ModuleList(upsample)
        self.up = nn.ModuleList(up)
        self.logits = nn.Conv2d(inputs, num_classes, 1)

    def forward(self, x):
        skips = []
        for block in self.down:
            skips.append(block(x))
            x = F.max_pool2d(skips[-1], 2)
        x = self.middle(x)
        for upsample, block in zip(self.upsample, self.up, strict=True):
            x = block(torch.cat([skips.pop(), upsample(x)], dim=1))
        return self.logits(x).float()


def _two_convolutions(inputs, width):
    layers = []
    for channels in (inputs, width):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            _norm(width, momentum=0.9, epsilon=1e-5),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)


class _Gpt(nn.Module):
    def __init__(self, network):
        super().__init__()
        width, heads = network.width, network.num_heads
        self.embedding = nn.Embedding(network.vocabulary_size, width)
        self.blocks = nn.ModuleList(
            _Block(width, heads) for _ in range(network.num_layers)
        )
        self.norm = nn.RMSNorm(width, eps=1e-6)
        half = width // heads // 2
        frequencies = _ROPE_WAVELENGTH ** (-torch.arange(half) / half)
        positions = torch.arange(network.sequence_length)
        angles = positions[:, None, None] * frequencies
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return logits.flatten(0, 1).float()


class _Block(nn.Module):
    def __init__(self, width, num_heads):
        super().__init__()

        def dense(inputs, outputs):
            return nn.Linear(inputs, outputs, bias=False)

        # As `recipes.transformer` chooses it.
        hidden = max(round(8 / 3 * width / 64), 1) * 64
        self.num_heads = num_heads
        self.attention_norm = nn.RMSNorm(width, eps=1e-6)
        self.query = dense(width, width)
        self.key = dense(width, width)
        self.value = dense(width, width)
        self.attention_output = dense(width, width)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)
        self.gate = dense(width, hidden)
        self.up = dense(width, hidden)
        self.mlp_output = dense(hidden, width)

    def forward(self, x, cos, sin):
        y = self.attention_norm(x)
        query, key, value = (
            layer(y).unflatten(-1, (self.num_heads, -1))
            for layer in (self.query, self.key, self.value)
        )
        y = F.scaled_dot_product_attention(
            _rotate(query, cos, sin).transpose(1, 2),
            _rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
            is_causal=True,
        )
        x = x + self.attention_output(y.transpose(1, 2).flatten(-2))
        y = self.mlp_norm(x)
        return x + self.mlp_output(F.silu(self.gate(y)) * self.up(y))


def _rotate(x, cos, sin):
    """Rotary positions, computed in float32 as the recipe does."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat(
        [first * cos - second * sin, second * cos + first * sin], dim=-1
    )
    return rotated.to(x.dtype)
