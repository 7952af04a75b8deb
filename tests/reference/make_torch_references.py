"""Writes the files in tests/reference/torch/: weights of narrow PyTorch networks, images, and PyTorch's logits.

    pip install torch==2.14.1 timm==1.0.31 safetensors==0.8.0
    python tests/reference/make_torch_references.py

With a folder and a network as arguments, it writes that network alone, such as one of full width, to the folder:

    python tests/reference/make_torch_references.py /tmp/a0 timm.create_model '{"model_name": "repvgg_a0"}'

Weights and running statistics are random. timm's networks are timm's own. The networks of the two original repositories
(github.com/DingXiaoH/RepVGG with QARepVGG's block, and github.com/apple/ml-mobileone) are written down here from the
papers (arXiv:2101.03697, 2212.01593, 2206.04040), with the names that the repositories give to the layers.
"""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import save_file
from timm.models.byobnet import ByoBlockCfg, ByobNet, ByoModelCfg
from timm.utils.model import reparameterize_model
from torch import nn

FOLDER = Path(__file__).parent / "torch"
CLASSES = 5
IMAGE_SIZES = ((33, 40), (46, 29))  # height and width, odd and even
# timm rounds widths to multiples of 8, and with these depths groups the same blocks as the original.
STEM, WIDTHS, DEPTHS = 8, (8, 16), (2, 1)
SE_STEM, SE_WIDTHS, SE_DEPTHS = 16, (16, 32), (2, 1)


def convolve(inputs, outputs, size, stride, groups=1, **options):
    return nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, groups=groups, **options)


def convolve_and_normalize(*arguments):
    layers = nn.Sequential()
    layers.add_module("conv", convolve(*arguments, bias=False))
    layers.add_module("bn", nn.BatchNorm2d(arguments[1]))
    return layers


class SqueezeExcite(nn.Module):
    """x * sigmoid(expand(relu(reduce(mean of x))))."""

    def __init__(self, channels, reduce, expand):
        super().__init__()
        self.layers = reduce, expand
        self.add_module(reduce, nn.Conv2d(channels, channels // 16, 1))
        self.add_module(expand, nn.Conv2d(channels // 16, channels, 1))

    def forward(self, images):
        reduce, expand = (getattr(self, name) for name in self.layers)
        return images * torch.sigmoid(expand(torch.relu(reduce(images.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    """relu(se(f(x))); a subclass defines `sum_branches`, which f is, until it is merged to one convolution."""

    merged_name: str
    find_convolution: Callable[[], nn.Conv2d]
    sum_branches: Callable[[torch.Tensor], torch.Tensor]

    def forward(self, images):
        sums = getattr(self, self.merged_name)(images) if hasattr(self, self.merged_name) else self.sum_branches(images)
        return torch.relu(self.se(sums) if hasattr(self, "se") else sums)

    def merge(self):
        """Replaces the branches by one convolution, whose weights are f of zeros and of one-hot images in float64."""
        convolution = self.find_convolution()
        inputs, size, groups = convolution.in_channels, convolution.kernel_size[0], convolution.groups
        images = torch.zeros(1 + inputs * size * size, inputs, size + 4, size + 4, dtype=torch.float64)
        taps = list(itertools.product(range(inputs), range(size), range(size)))
        first = 2  # an output whose window, for strides 1 and 2, lies inside the image
        for number, (channel, row, column) in enumerate(taps, start=1):
            images[number, channel, first + row - size // 2, first + column - size // 2] = 1
        stride = convolution.stride[0]
        with torch.no_grad():
            outputs = self.double().sum_branches(images)[:, :, first // stride, first // stride]
        kernel = (outputs[1:] - outputs[0]).reshape(inputs, size, size, -1).permute(3, 0, 1, 2)
        merged = nn.Conv2d(inputs, kernel.shape[0], size, stride, padding=size // 2, groups=groups)
        per_group = inputs // groups
        for output in range(kernel.shape[0]):
            start = output // (kernel.shape[0] // groups) * per_group
            merged.weight.data[output] = kernel[output, start : start + per_group]
        merged.bias.data = outputs[0].float()
        for name in [name for name, _ in self.named_children() if name != "se"]:
            delattr(self, name)
        self.float()
        self.add_module(self.merged_name, merged)


class RepVGGBlock(Block):
    merged_name = "rbr_reparam"

    def __init__(self, inputs, outputs, stride, groups=1, se=False):
        super().__init__()
        if se:
            self.se = SqueezeExcite(outputs, "down", "up")
        if inputs == outputs and stride == 1:
            self.rbr_identity = nn.BatchNorm2d(inputs)
        self.rbr_dense = convolve_and_normalize(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = convolve_and_normalize(inputs, outputs, 1, stride, groups)

    def sum_branches(self, images):
        sums = self.rbr_dense(images) + self.rbr_1x1(images)
        return sums + self.rbr_identity(images) if hasattr(self, "rbr_identity") else sums

    def find_convolution(self):
        return self.rbr_dense.conv


class QARepVGGBlock(Block):
    merged_name = "rbr_reparam"

    def __init__(self, inputs, outputs, stride, groups=1):
        super().__init__()
        self.rbr_dense = convolve_and_normalize(inputs, outputs, 3, stride, groups)
        self.rbr_1x1 = convolve(inputs, outputs, 1, stride, groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.has_identity = inputs == outputs and stride == 1

    def sum_branches(self, images):
        sums = self.rbr_dense(images) + self.rbr_1x1(images)
        return self.bn(sums + images if self.has_identity else sums)

    def find_convolution(self):
        return self.rbr_dense.conv


class MobileOneBlock(Block):
    merged_name = "reparam_conv"

    def __init__(self, inputs, outputs, size, stride, groups=1, branches=1, se=False):
        super().__init__()
        if se:
            self.se = SqueezeExcite(outputs, "reduce", "expand")
        if inputs == outputs and stride == 1:
            self.rbr_skip = nn.BatchNorm2d(inputs)
        arguments = (inputs, outputs, size, stride, groups)
        self.rbr_conv = nn.ModuleList([convolve_and_normalize(*arguments) for _ in range(branches)])
        if size > 1:
            self.rbr_scale = convolve_and_normalize(inputs, outputs, 1, stride, groups)

    def sum_branches(self, images):
        sums = sum(branch(images) for branch in self.rbr_conv)
        for name in ("rbr_scale", "rbr_skip"):
            sums = sums + getattr(self, name)(images) if hasattr(self, name) else sums
        return sums

    def find_convolution(self):
        return self.rbr_conv[0].conv


class Network(nn.Module):
    """stage0, then stages of blocks, the mean over all pixels, and a linear layer."""

    def __init__(self, stage0, stages, features):
        super().__init__()
        self.names = ["stage0", *(f"stage{number}" for number in range(1, len(stages) + 1))]
        self.stage0 = stage0
        for name, blocks in zip(self.names[1:], stages, strict=True):
            self.add_module(name, nn.Sequential(*blocks))
        self.linear = nn.Linear(features, CLASSES)

    def forward(self, images):
        for name in self.names:
            images = getattr(self, name)(images)
        return self.linear(images.mean((2, 3)))


def build_repvgg(block, stem, widths, depths, groups=1, **options):
    stages, inputs, count = [], stem, 1
    for width, depth in zip(widths, depths, strict=True):
        stages.append([])
        for index in range(depth):
            block_groups = groups if count % 2 == 0 else 1
            stages[-1].append(block(inputs, width, 1 if index else 2, block_groups, **options))
            inputs, count = width, count + 1
    return Network(block(3, stem, 2, **options), stages, inputs)


def build_mobileone(stem, widths, depths, branches, se_blocks):
    stages, inputs = [], stem
    for width, depth, se_count in zip(widths, depths, se_blocks, strict=True):
        stages.append([])
        for index in range(depth):
            options = {"branches": branches, "se": index >= depth - se_count}
            stages[-1].append(MobileOneBlock(inputs, inputs, 3, 1 if index else 2, groups=inputs, **options))
            stages[-1].append(MobileOneBlock(inputs, width, 1, 1, **options))
            inputs = width
    return Network(MobileOneBlock(3, stem, 3, 2), stages, inputs)


def build_timm(stem, blocks, kind, **options):
    return ByobNet(ByoModelCfg(blocks=blocks, stem_type=kind, stem_chs=stem, **options), num_classes=CLASSES)


def build_timm_repvgg(stem, widths, depths, groups=1, **options):
    size = (lambda channels, index: channels // groups if index % 2 else 0) if groups > 1 else 0
    blocks = [ByoBlockCfg(type="rep", d=depth, c=width, gs=size) for width, depth in zip(widths, depths, strict=True)]
    return build_timm(stem, tuple(blocks), "rep", **options)


def build_timm_mobileone(stem, widths, depths, branches, se_blocks):
    stages, inputs = [], stem
    for width, depth, se_count in zip(widths, depths, se_blocks, strict=True):
        stages.append([])
        for index in range(depth):
            attention = {"attn_layer": "se", "attn_kwargs": SE_OPTIONS} if index >= depth - se_count else {}
            shapes = ((inputs, 1, {}), (width, 0, {"kernel_size": 1}))
            for channels, group_size, kernel in shapes:
                arguments = {"num_conv_branches": branches, **kernel}
                stages[-1].append(
                    ByoBlockCfg(type="one", d=1, c=channels, gs=group_size, block_kwargs=arguments, **attention)
                )
            inputs = width
    return build_timm(stem, stages, "one")


SE_OPTIONS = {"rd_ratio": 1 / 16, "rd_divisor": 1}
NARROW = {"stem": STEM, "widths": WIDTHS, "depths": DEPTHS}
NARROW_SE = {"stem": SE_STEM, "widths": SE_WIDTHS, "depths": SE_DEPTHS}
MOBILEONE = {"stem": 16, "widths": (16, 32), "depths": (2, 1), "branches": 2, "se_blocks": (0, 1)}

# {name of the file: a network in training form}; each also gives a file of its deploy form.
NETWORKS = {
    "repvgg": lambda: build_repvgg(RepVGGBlock, groups=2, **NARROW),
    "repvgg_se": lambda: build_repvgg(RepVGGBlock, se=True, **NARROW_SE),
    "qarepvgg": lambda: build_repvgg(QARepVGGBlock, groups=2, **NARROW),
    "timm_repvgg": lambda: build_timm_repvgg(groups=2, **NARROW),
    "timm_repvgg_se": lambda: build_timm_repvgg(**NARROW_SE, attn_layer="se", attn_kwargs=SE_OPTIONS),
    "mobileone": lambda: build_mobileone(**MOBILEONE),
    "timm_mobileone": lambda: build_timm_mobileone(**MOBILEONE),
}


BUILDERS = {
    "timm.create_model": timm.create_model,
    "repvgg": lambda **arguments: build_repvgg(RepVGGBlock, **arguments),
    "mobileone": build_mobileone,
}


def randomize(network):
    """Weights and running statistics as a training might leave them: logits depend on all of them."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.data = torch.rand_like(layer.weight) + 0.5
            layer.weight.data[::5] *= -1
            layer.bias.data.normal_(0, 0.3)
            layer.running_mean.normal_(0, 0.3)
            layer.running_var = torch.rand_like(layer.running_var) * 2 + 1e-3
            layer.num_batches_tracked += 1234
    # Some channels are dead, as in long trainings: there epsilon alone is under the root.
    next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)).running_var[1] = 0


def merge(network):
    if isinstance(network, ByobNet):
        return reparameterize_model(network)
    for block in network.modules():
        if isinstance(block, Block):
            block.merge()
    return network


def randomize_deep(network):
    """Running statistics of random images, disturbed a little, so that activations keep their size in deep networks.

    Where they grow by a factor in each of D2se's 47 blocks, float32 itself decides on the logits.
    """
    norms = [layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        for norm in norms:
            norm.momentum = 1.0
            norm.weight.uniform_(0.3, 1).mul_(torch.where(torch.rand_like(norm.weight) < 0.2, -1.0, 1.0))
            norm.bias.normal_(0, 0.2)
        network.train()(torch.randn(4, 3, 64, 64))
        network.eval()
        for norm in norms:
            norm.running_mean += 0.02 * norm.running_var.sqrt() * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.9 + 0.2 * torch.rand_like(norm.running_var)


def write_network(folder, build, randomize_network, forms=("training", "deploy")):
    """Writes weights and images in float32, and logits in float64, of one network in the given forms."""
    torch.manual_seed(0)
    network = build().eval()
    randomize_network(network)
    images = [torch.randn(2, 3, *size) for size in IMAGE_SIZES]
    for form in forms:
        network = merge(network) if form == "deploy" else network
        save_file({key: value.clone() for key, value in network.state_dict().items()}, folder / f"{form}.safetensors")
        inputs = {f"images_{number}": image for number, image in enumerate(images)}
        with torch.no_grad():
            logits = {f"logits_{number}": network.double()(image.double()) for number, image in enumerate(images)}
        save_file(logits | inputs, folder / f"{form}_results.safetensors")
        network.float()


def main():
    if len(sys.argv) > 1:
        folder, builder, arguments = sys.argv[1:]
        # Merging in float64 by one-hot images is for narrow networks.
        forms = ("training", "deploy") if builder.startswith("timm") else ("training",)
        write_network(Path(folder), lambda: BUILDERS[builder](**json.loads(arguments)), randomize_deep, forms)
        return
    FOLDER.mkdir(exist_ok=True)
    versions = {"torch": torch.__version__, "timm": timm.__version__, "numpy": np.__version__}
    torch.manual_seed(0)
    images = [torch.randn(1, 3, *size) for size in IMAGE_SIZES]
    results = {f"images_{number}": image for number, image in enumerate(images)}
    for name, build in NETWORKS.items():
        network = build().eval()
        randomize(network)
        for form in ("training", "deploy"):
            if form == "deploy":
                network = merge(network)
            weights = {key: value.clone() for key, value in network.state_dict().items()}
            save_file(weights, FOLDER / f"{name}_{form}.safetensors", {"format": "pt"})
            for number, image in enumerate(images):
                with torch.no_grad():
                    results[f"{name}_{form}_{number}"] = network(image)
    save_file(results, FOLDER / "results.safetensors", versions)


if __name__ == "__main__":
    main()
