"""LPIPS perceptual distance (Zhang et al. 2018) on VGG16 features, as a training loss."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

VGG16_FILE = "vgg16-397923af.pth"  # torchvision's VGG16_Weights.IMAGENET1K_V1
MIN_IMAGE_SIZE = 16                # VGG16 halves four times before its last block


class LPIPS(nn.Module):
    """Perceptual distance between images, with a gradient to the images and none to its own weights.

    Five VGG16 feature maps are normalised over channels, subtracted, squared, weighted by the linear heads shipped with
    the `lpips` package and averaged over positions.

    Args:
        vgg_weights: torchvision's VGG16 ImageNet file. None looks where torch.hub keeps it. Nothing is ever downloaded.

    FileNotFoundError: no such file (the message names where to put it). ValueError: a file that is not those weights.
    The module is always in eval mode: its heads contain a Dropout that would otherwise act in a training loop.
    """

    def __init__(self, vgg_weights: str | Path | None = None):
        super().__init__()
        path = find_vgg_weights(vgg_weights)
        import lpips

        self.scaling_layer = lpips.ScalingLayer()
        with warnings.catch_warnings(), torch.device("meta"):
            # lpips calls torchvision with an argument that warns; on "meta" the unused 124 M classifier costs nothing.
            warnings.simplefilter("ignore", UserWarning)
            self.net = lpips.pretrained_networks.vgg16(pretrained=False, requires_grad=False)
        self.net.load_state_dict(_trunk_state(path, self.net.state_dict()), assign=True)
        for k, head in _heads(Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth").items():
            linear = lpips.NetLinLayer(head.shape[1], use_dropout=True)
            linear.load_state_dict({"model.1.weight": head})
            self.add_module(f"lin{k}", linear)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> LPIPS:  # noqa: ARG002
        """Stays in eval mode whatever the mode of the module that contains this one."""
        return super().train(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x, y (B, C, H, W) float in [-1, 1], C = 3, or 1 (taken as grey) -> distances (B, 1, 1, 1) float32.

        Computed in float32 under autocast. ValueError: shapes that differ, another channel count, a side under 16.
        """
        if x.shape != y.shape or x.dim() != 4 or x.shape[1] not in (1, 3):
            raise ValueError(f"LPIPS needs equal shapes (B, 1 or 3, H, W), got {tuple(x.shape)} and {tuple(y.shape)}")
        if min(x.shape[2:]) < MIN_IMAGE_SIZE:
            raise ValueError(f"LPIPS needs image sides of at least {MIN_IMAGE_SIZE} pixels, got {tuple(x.shape)}")
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self.features(x), self.features(y), strict=True)
            total = torch.zeros(x.shape[0], 1, 1, 1, device=x.device)
            for k, (fx, fy) in enumerate(pairs):  # (B, C_k, h_k, w_k)
                difference = (normalize_channels(fx) - normalize_channels(fy)).square()
                total = total + self.get_submodule(f"lin{k}")(difference).mean((2, 3), keepdim=True)
            return total

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """x as in forward -> VGG16's activations (B, C_k, h_k, w_k) at its five depths."""
        return tuple(self.net(self.scaling_layer(x.float().expand(-1, 3, -1, -1))))


def normalize_channels(x: Tensor, eps: float = 1e-10) -> Tensor:
    """x / (|x| + eps) over channels, (B, C, h, w) -> same; an all-zero vector stays zero with a finite gradient.

    The plain formula has gradient 0 * inf = NaN there, which one dead position would spread over the whole model.
    """
    squared = x.square().sum(1, keepdim=True)  # (B, 1, h, w)
    empty = squared == 0
    norm = torch.where(empty, 1.0, torch.where(empty, 1.0, squared).sqrt() + eps)
    return x / norm


def find_vgg_weights(path: str | Path | None) -> Path:
    """The VGG16 file: `path`, or torch.hub's cache when None. FileNotFoundError says what to do if it is absent."""
    found = Path(torch.hub.get_dir()) / "checkpoints" / VGG16_FILE if path is None else Path(path)
    if not found.is_file():
        raise FileNotFoundError(
            f"LPIPS needs VGG16 ImageNet weights, and {found} does not exist. Put torchvision's {VGG16_FILE} there, or "
            "name another place with --lpips-vgg-weights PATH"
        )
    return found


def _trunk_state(path: Path, expected: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `features.{i}.*` renamed to the `slice{k}.{i}.*` that lpips cuts the network into."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser's, see runtime/parsing.py
        raise ValueError(f"{path} is not a readable weight file; expected torchvision's {VGG16_FILE}") from error
    state, wrong = {}, []
    for key, tensor in expected.items():
        name = "features." + key.split(".", 1)[1]
        found = saved.get(name) if isinstance(saved, dict) else None
        if isinstance(found, Tensor) and found.shape == tensor.shape:
            state[key] = found.float()
        else:
            wrong.append(f"{name} {tuple(tensor.shape)}")
    if wrong:
        raise ValueError(f"{path} is not torchvision's VGG16: absent or of another shape: {', '.join(wrong)}")
    return state


def _heads(path: Path) -> dict[int, Tensor]:
    saved = torch.load(path, map_location="cpu", weights_only=True)
    return {k: saved[f"lin{k}.model.1.weight"] for k in range(5)}  # (1, C_k, 1, 1)
