"""Residual networks and their plain twins, for ImageNet and for CIFAR.

He, Zhang, Ren, Sun, "Deep residual learning for image recognition", 2015, unless another paper is named.

`ResNet`, for ImageNet (table 1), with the number of blocks in each stage:

    layer               output   18     34     50          101         152
    conv 7x7, stride 2  112x112
    max 3x3, stride 2   56x56
    stage 1             56x56    2      3      3           3           3
    stage 2             28x28    2      4      4           4           8
    stage 3             14x14    2      6      6           23          36
    stage 4             7x7      2      3      3           3           3
    average, dense      1000
    block                        basic  basic  bottleneck  bottleneck  bottleneck

A basic block is two 3x3 convolutions, a bottleneck block a 1x1, a 3x3 and a 1x1. The stages have 64, 128, 256
and 512 filters; the last convolution of a bottleneck block has four times as many. Parameters, with option B:

          stem     stage 1      stage 2       stage 3       stage 4      dense        in all
    18   9,536     147,968      525,568     2,099,712     8,393,728    513,000    11,689,512
    34   9,536     221,952    1,116,416     6,822,400    13,114,368    513,000    21,797,672
    50   9,536     215,808    1,219,584     7,098,368    14,964,736  2,049,000    25,557,032
    101  9,536     215,808    1,219,584    26,090,496    14,964,736  2,049,000    44,549,160
    152  9,536     215,808    2,339,840    40,613,888    14,964,736  2,049,000    60,192,808

`CifarResNet` (section 4.2), of depth 6n + 2:

    output map    32x32     16x16    8x8
    layers        1 + 2n    2n       2n
    filters       16        32       64

then global average pooling and a dense layer. Parameters, with option A: 269,722 at depth 20, 464,154 at 32,
658,586 at 44, 853,018 at 56, 1,727,962 at 110, 19,421,274 at 1202. Option B adds 2,752.

In both networks, batch normalisation follows every convolution, and the first block of every stage except
the first has stride 2. A plain net, or plain twin, is the same net without the additions (section 3.3). It
has the same parameters, under the same names, as the residual net with shortcut option A, so both start from
the same initial values. Plain-18 has 11,515,688 parameters, plain-34 has 21,623,848. Option B adds 64*128 +
128*256 + 256*512 weights of projections and 2 * (128 + 256 + 512) parameters of their norms.

`PreactCifarResNet`, of depth 9n + 2 (He, Zhang, Ren, Sun, "Identity mappings in deep residual networks",
2016): maps of the same sizes, in stages of n bottleneck blocks with 16, 32 and 64 filters, hence 64, 128 and
256 channels. Norm and ReLU precede each convolution of a block; one more pair follows the last block.
Parameters:

           stem    stage 1      stage 2      stage 3    norm    dense        in all
    164     432     81,952      326,272    1,291,520     512    2,570     1,703,258
    1001    432    504,544    1,980,928    7,838,720     512    2,570    10,327,706 (10,178,490 without norms)

Very deep nets: `scan_blocks=True` runs blocks 2 to n of each stage of a CIFAR net as one `nn.scan`, so XLA
compiles two blocks for a stage of any depth. Their parameters and statistics are then stacked along a new
first axis, block 2 first: `stage1_blocks/conv1/kernel [n-1, 3, 3, 16, 16]` replaces
`stage1_block2/conv1/kernel` to `stage1_block{n}/conv1/kernel`, each [3, 3, 16, 16]. From the same parameters,
the net computes the same; from the same key, it draws other initial values. Times to trace and compile a
training step of `CifarResNet` at 8x8 pixels and batch size 8, and to run it, on two CPU cores, 2026-11-28:

    depth                   20       110     1202
    unrolled  compile    4.7 s    17.2 s     about 170 s, estimated at 0.28 s a block
              step      3.5 ms     22 ms     not measured
    scanned   compile    5.8 s     6.8 s     6.6 s
              step      4.3 ms     25 ms     0.32 s

Departures from the papers: none in the networks with their default fields. Where the papers are silent: batch
normalisation has fb.resnet.torch's epsilon of 1e-5, and each step keeps 0.9 of its running statistics (the
authors' released models average exactly, after training); the dense layer is initialised like the
convolutions; a pre-activation block has its stride, and a projection without a norm, where the authors' code
(KaimingHe/resnet-1k-layers) has them. Options beyond the papers, off by default: stride placement "v1.5",
zero initial values of the last gammas, plain nets of bottleneck blocks.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn

from cnn_cases import checks
from cnn_cases.models.fast import keep, max_pool, relu
from cnn_cases.models.layers import Conv, Dense, batch_norm

SHORTCUTS = {
    "A": "identity, subsampled and padded with zero channels where the shape changes",
    "B": "1x1 projection where the shape changes, identity elsewhere",
    "C": "1x1 projection everywhere",
}

STRIDE_PLACEMENTS = {
    "v1": "in the first 1x1 convolution of a bottleneck block, as in the authors' models",
    "v1.5": "in its 3x3 convolution, as in fb.resnet.torch and most public weights",
}

MAX_DEPTH = 5_000  # of the nets for CIFAR; the papers' deepest has 1202 layers

# He et al. 2015b ("Delving deep into rectifiers"): standard deviation sqrt(2 / fan_in), not truncated.
gaussian_he = nn.initializers.variance_scaling(2.0, "fan_in", "normal")


def make_layers(train, dtype, axis_name):
    """Returns `Conv` and `BatchNorm` with the settings that all networks in this file share."""
    conv = functools.partial(Conv, use_bias=False, kernel_init=gaussian_he, dtype=dtype)
    return conv, batch_norm(train=train, epsilon=1e-5, dtype=dtype, axis_name=axis_name)


def check_shortcut(shortcut, plain):
    """Raises ValueError if `shortcut` is unknown, or if it is not "A" in a plain net."""
    checks.one_of("model.shortcut", shortcut, SHORTCUTS)
    if plain and shortcut != "A":
        raise ValueError(
            f"model.shortcut = {shortcut!r} has no effect in a plain net; set it to 'A', or "
            "model.plain to False"
        )


def identity_shortcut(x, filters, stride):
    """Option A: every `stride`-th pixel, padded with zero channels. [B, H, W, C] -> [B, H', W', filters]."""
    x = x[:, ::stride, ::stride]
    return jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, filters - x.shape[-1])))


def shortcut_branch(x, filters, stride, shortcut, conv, norm):
    """The shortcut's term of a block's sum, by option `shortcut`. [B, H, W, C] -> [B, H', W', filters].

    Call it inside the block, which then owns `projection` and `projection_norm` if they exist.
    """
    changes_shape = stride != 1 or x.shape[-1] != filters
    if shortcut == "C" or (shortcut == "B" and changes_shape):
        x = conv(filters, (1, 1), stride, padding=0, name="projection")(x)
        return norm(name="projection_norm")(x)
    return identity_shortcut(x, filters, stride)


def last_gamma(zero):
    """Returns the initialiser of a block's last scale: ones, or zeros, so that it starts as the identity."""
    return nn.initializers.zeros if zero else nn.initializers.ones


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and the shortcut around them (figure 2).

    Attributes:
      filters: channels of both convolutions.
      stride: of the first convolution.
      shortcut: a key of SHORTCUTS (section 4.1).
      plain: omit the shortcut and its addition.
      conv, norm: `Conv` and `BatchNorm` with the network's settings.
      zero_init_last_gamma: initialise the last norm's scale to zero.
    """

    filters: int
    stride: int
    shortcut: str
    plain: bool
    conv: Any
    norm: Any
    zero_init_last_gamma: bool = False

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), filters]."""
        y = self.conv(self.filters, (3, 3), self.stride, padding=1, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.filters, (3, 3), padding=1, name="conv2")(y)
        y = self.norm(scale_init=last_gamma(self.zero_init_last_gamma), name="norm2")(y)
        if not self.plain:
            y = y + shortcut_branch(x, y.shape[-1], self.stride, self.shortcut, self.conv, self.norm)
        return relu(y)


class BottleneckBlock(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and the shortcut around them (figure 5).

    Attributes:
      filters: channels of the first two convolutions; the third has four times as many.
      stride: of the convolution that `stride_placement` names.
      stride_placement: a key of STRIDE_PLACEMENTS.
      shortcut, plain, conv, norm, zero_init_last_gamma: as in BasicBlock.
    """

    filters: int
    stride: int
    shortcut: str
    plain: bool
    conv: Any
    norm: Any
    zero_init_last_gamma: bool = False
    stride_placement: str = "v1"

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), 4 filters]."""
        stride1, stride2 = (self.stride, 1) if self.stride_placement == "v1" else (1, self.stride)
        y = self.conv(self.filters, (1, 1), stride1, padding=0, name="conv1")(x)
        y = nn.relu(self.norm(name="norm1")(y))
        y = self.conv(self.filters, (3, 3), stride2, padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(4 * self.filters, (1, 1), padding=0, name="conv3")(y)
        y = self.norm(scale_init=last_gamma(self.zero_init_last_gamma), name="norm3")(y)
        if not self.plain:
            y = y + shortcut_branch(x, y.shape[-1], self.stride, self.shortcut, self.conv, self.norm)
        return relu(y)


# Table 1: the kind of block and the number of blocks in each stage.
IMAGENET_DEPTHS = {
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
}


class ResNet(nn.Module):
    """The ImageNet network, residual or plain, for images of any size; the paper's are 224x224.

    Attributes:
      depth: number of weighted layers: 18, 34, 50, 101 or 152.
      plain: omit the shortcuts.
      shortcut: a key of SHORTCUTS; a plain net allows only option A, which has no parameters.
      stride_placement: a key of STRIDE_PLACEMENTS. It makes no difference at depths 18 and 34,
        which have no bottleneck blocks.
      zero_init_last_gamma: initialise the scale of each block's last norm to zero, so that every block starts
        as the identity (Goyal et al. 2017, section 5.1).
      num_classes: length of the logits.
      dtype: compute type; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are taken, None for this device's batch alone.
    """

    depth: int = 50
    plain: bool = False
    shortcut: str = "B"
    stride_placement: str = "v1"
    zero_init_last_gamma: bool = False
    num_classes: int = 1000
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        Raises:
          ValueError: `depth`, `shortcut` or `stride_placement` is unknown, or a plain net has projections or
            zero initial last gammas.
        """
        checks.one_of("model.depth", self.depth, IMAGENET_DEPTHS)
        check_shortcut(self.shortcut, self.plain)
        checks.one_of("model.stride_placement", self.stride_placement, STRIDE_PLACEMENTS)
        if self.plain and self.zero_init_last_gamma:
            raise ValueError(
                "model.zero_init_last_gamma = True would make every block of a plain net output zeros; "
                "set it to False, or model.plain to False"
            )
        conv, norm = make_layers(train, self.dtype, self.axis_name)
        block_type, stage_sizes = IMAGENET_DEPTHS[self.depth]
        if block_type is BottleneckBlock:
            block_type = functools.partial(BottleneckBlock, stride_placement=self.stride_placement)
        x = conv(64, (7, 7), 2, padding=3, name="conv1")(x)
        x = nn.relu(norm(name="norm1")(x))
        x = max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for stage, num_blocks in enumerate(stage_sizes, start=1):
            for block in range(1, num_blocks + 1):
                x = block_type(
                    filters=64 * 2 ** (stage - 1),
                    stride=2 if stage > 1 and block == 1 else 1,
                    shortcut=self.shortcut,
                    plain=self.plain,
                    conv=conv,
                    norm=norm,
                    zero_init_last_gamma=self.zero_init_last_gamma,
                    name=f"stage{stage}_block{block}",
                )(x)
        x = x.mean(axis=(1, 2))
        return Dense(self.num_classes, kernel_init=gaussian_he, dtype=self.dtype, name="logits")(x)


class PreactBlock(nn.Module):
    """A bottleneck block whose norms and ReLUs come before its convolutions (He et al. 2016, figure 4e).

    Where the shape changes, the shortcut is a projection of the activated input; elsewhere it is the
    identity, with no norm or ReLU between the block's input and its sum.

    Attributes:
      filters: channels of the first two convolutions; the third has four times as many.
      stride: of the first convolution.
      conv, norm: `Conv` and `BatchNorm` with the network's settings.
    """

    filters: int
    stride: int
    conv: Any
    norm: Any

    @nn.compact
    def __call__(self, x):
        """[B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), 4 filters]."""
        y = nn.relu(self.norm(name="norm1")(x))
        if self.stride != 1 or x.shape[-1] != 4 * self.filters:
            x = self.conv(4 * self.filters, (1, 1), self.stride, padding=0, name="projection")(y)
        y = self.conv(self.filters, (1, 1), self.stride, padding=0, name="conv1")(y)
        y = nn.relu(self.norm(name="norm2")(y))
        y = self.conv(self.filters, (3, 3), padding=1, name="conv2")(y)
        y = nn.relu(self.norm(name="norm3")(y))
        y = self.conv(4 * self.filters, (1, 1), padding=0, name="conv3")(y)
        return keep(x + y)


def cifar_blocks_per_stage(depth, layers):
    """Returns the n for which depth = layers * n + 2.

    Raises:
      ValueError: no such n exists, or the depth is above MAX_DEPTH.
    """
    if depth > MAX_DEPTH:
        raise ValueError(
            f"model.depth = {depth} must be at most {MAX_DEPTH}; even that depth takes minutes to trace"
        )
    n, rest = divmod(depth - 2, layers)
    if rest or n < 1:
        lower = layers * max(n, 1) + 2
        raise ValueError(
            f"model.depth = {depth} is not {layers}n + 2 with n >= 1; nearest: {lower} and {lower + layers}"
        )
    return n


def cifar_stages(x, block, blocks_per_stage, scan_blocks):
    """Applies the three stages of a CIFAR network, with blocks made by `block`; call it inside the network.

    [B, H, W, 16] -> [B, ceil(H / 4), ceil(W / 4), C], with C = 64 for basic blocks and 256 for bottlenecks.
    """
    repeat = nn.scan(
        lambda block, x, _: (block(x), None),
        variable_axes={"params": 0, "batch_stats": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=blocks_per_stage - 1,
    )
    for stage, filters in enumerate((16, 32, 64), start=1):
        x = block(filters=filters, stride=1 if stage == 1 else 2, name=f"stage{stage}_block1")(x)
        if scan_blocks and blocks_per_stage > 1:
            x, _ = repeat(block(filters=filters, stride=1, name=f"stage{stage}_blocks"), x, None)
        else:
            for i in range(2, blocks_per_stage + 1):
                x = block(filters=filters, stride=1, name=f"stage{stage}_block{i}")(x)
    return x


class CifarResNet(nn.Module):
    """The CIFAR network of depth 6n + 2, residual or plain.

    Attributes:
      depth: number of weighted layers: 8, 14, 20, ..., 1202.
      plain: omit the shortcuts.
      shortcut: a key of SHORTCUTS; a plain net allows only option A, which has no parameters.
      scan_blocks: run blocks 2 to n of each stage as one scan (see the module's docstring).
      num_classes: length of the logits.
      dtype: compute type; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are taken, None for this device's batch alone.
    """

    depth: int = 20
    plain: bool = False
    shortcut: str = "A"
    scan_blocks: bool = False
    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        Raises:
          ValueError: `depth` is not 6n + 2, `shortcut` is unknown, or a plain net has projections.
        """
        blocks_per_stage = cifar_blocks_per_stage(self.depth, 6)
        check_shortcut(self.shortcut, self.plain)
        conv, norm = make_layers(train, self.dtype, self.axis_name)
        x = conv(16, (3, 3), padding=1, name="conv1")(x)
        x = nn.relu(norm(name="norm1")(x))
        block = functools.partial(BasicBlock, shortcut=self.shortcut, plain=self.plain, conv=conv, norm=norm)
        x = cifar_stages(x, block, blocks_per_stage, self.scan_blocks)
        x = x.mean(axis=(1, 2))
        return Dense(self.num_classes, kernel_init=gaussian_he, dtype=self.dtype, name="logits")(x)


class PreactCifarResNet(nn.Module):
    """The pre-activation CIFAR network of depth 9n + 2, of bottleneck blocks.

    Attributes:
      depth: number of weighted layers: 11, 20, 29, ..., 164, ..., 1001.
      scan_blocks: as in CifarResNet.
      num_classes: length of the logits.
      dtype: compute type; parameters and batch statistics are float32.
      axis_name: the pmap axis over which batch statistics are taken, None for this device's batch alone.
    """

    depth: int = 164
    scan_blocks: bool = False
    num_classes: int = 10
    dtype: Any = jnp.float32
    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train: bool):
        """image [B, H, W, C] -> logits [B, num_classes].

        Raises:
          ValueError: `depth` is not 9n + 2.
        """
        blocks_per_stage = cifar_blocks_per_stage(self.depth, 9)
        conv, norm = make_layers(train, self.dtype, self.axis_name)
        x = conv(16, (3, 3), padding=1, name="conv1")(x)
        block = functools.partial(PreactBlock, conv=conv, norm=norm)
        x = cifar_stages(x, block, blocks_per_stage, self.scan_blocks)
        x = nn.relu(norm(name="final_norm")(x))
        x = x.mean(axis=(1, 2))
        return Dense(self.num_classes, kernel_init=gaussian_he, dtype=self.dtype, name="logits")(x)
