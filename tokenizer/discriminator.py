"""PatchGAN discriminator (Isola et al. 2017) of the image experiments, with LlamaGen's state-dict keys and init."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm  # what SyncBatchNorm shares with BatchNorm2d


class NLayerDiscriminator(nn.Module):
    """Image (B, in_channels, H, W) -> one logit per patch (B, 1, H/2^n - 2, W/2^n - 2), high for real.

    Args:
        in_channels: image channels.
        ndf: width of the first layer; doubles per layer up to 8 * ndf.
        n_layers: stride-2 layers; 3 sees 70 x 70 pixel patches.

    ValueError: in_channels, ndf or n_layers below 1.
    """

    def __init__(self, in_channels: int = 3, ndf: int = 64, n_layers: int = 3):
        super().__init__()
        if min(in_channels, ndf, n_layers) < 1:
            raise ValueError(f"in_channels, ndf and n_layers must be at least 1, got {in_channels}, {ndf}, {n_layers}")
        self.in_channels, self.n_layers = in_channels, n_layers
        layers: list[nn.Module] = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
        width = ndf
        for layer in range(1, n_layers + 1):
            width_in, width = width, ndf * min(2**layer, 8)
            stride = 2 if layer < n_layers else 1
            layers += [
                nn.Conv2d(width_in, width, 4, stride=stride, padding=1, bias=False),  # the norm has the bias
                nn.BatchNorm2d(width),
                nn.LeakyReLU(0.2, inplace=True),
            ]
        layers.append(nn.Conv2d(width, 1, 4, stride=1, padding=1))
        self.main = nn.Sequential(*layers)
        self.main.apply(_init_weights)

    @property
    def min_image_size(self) -> int:
        """Shortest image side in pixels that still gives one logit: the two stride-1 layers need 3 positions."""
        return 3 * 2**self.n_layers

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) float in [-1, 1] -> logits. ValueError: another channel count, a side that is too small."""
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"discriminator needs images (B, {self.in_channels}, H, W), got {tuple(x.shape)}")
        if min(x.shape[2:]) < self.min_image_size:
            raise ValueError(
                f"images of {x.shape[2]}x{x.shape[3]} are too small for a discriminator with n_layers={self.n_layers}: "
                f"both sides must be at least {self.min_image_size}; use fewer layers or disc_weight 0"
            )
        return self.main(x)

    @contextmanager
    def generator_pass(self) -> Iterator[None]:
        """Inside, logits carry gradients to the image only, and BatchNorm keeps its running statistics untouched.

        Batch statistics are still used for normalisation in training mode, so the generator faces the network that is
        being trained. The backward pass may run after the context has closed. Call it on the unwrapped module (not on
        its DistributedDataParallel wrapper): nothing here needs a gradient all-reduce.
        """
        parameters = [p for p in self.parameters() if p.requires_grad]
        norms = [m for m in self.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
        for p in parameters:
            p.requires_grad_(False)
        for norm in norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for p in parameters:
                p.requires_grad_(True)
            for norm in norms:
                norm.track_running_stats = True


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, 0.02)  # biases keep PyTorch's default
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, 0.02)
        nn.init.zeros_(module.bias)
