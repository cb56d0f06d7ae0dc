"""Features of images for distribution distances: the Inception-v3 of the field's tables, a model of timm's, or any
TorchScript module.

Inception is the network of TensorFlow's 2015-12-05 graph, through torch-fidelity: resizing and arithmetic agree with
the graph, so numbers agree with ADM's evaluator. Its weights are read from a file; nothing is ever downloaded.
"""

from __future__ import annotations

import hashlib
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's conversion of the TensorFlow graph
INCEPTION_WIDTHS = {"pooled": 2048, "spatial": 2023}
SPATIAL_CHANNELS = 7  # sFID takes the first 7 channels of a 17 x 17 map: 2,023 numbers (Nash et al. 2021, as in ADM)


class Features(NamedTuple):
    """Of N images, float32."""

    pooled: Tensor                 # (N, D); Inception: pool_3, D = 2048. FID, KID, precision, recall
    logits: Tensor | None = None   # (N, C); Inception: 1,008 classes, without bias as ADM's evaluator. Inception Score
    spatial: Tensor | None = None  # (N, S); Inception: 2,023. sFID


class Extractor(nn.Module):
    """uint8 images (N, 3, H, W) of any size -> Features. In eval mode, float32, TF32 off: features must not depend on
    the batch or the GPU.

    name: "inception", "timm:NAME" or "torchscript". sha256: of the weights' file, of a TorchScript file's weights and
    code, 64 hex digits, for protocols and caches. widths: of the features that ADM's references store statistics of;
    {}: none are stored of this extractor's.
    """

    def __init__(self, name: str, sha256: str, network: nn.Module, run: Callable[[Tensor], Features],
                 widths: Mapping[str, int] | None = None):
        super().__init__()
        self.name, self.sha256, self.network, self._run = name, sha256, network, run
        self.widths = dict(widths or {})
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Extractor:  # noqa: ARG002
        """Stays in eval mode."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        with _without_tf32():
            return self._run(images)


@contextmanager
def _without_tf32() -> Iterator[None]:
    """Inside, float32 on CUDA is exact, whichever of torch's switches the host program has set.

    torch 2.9 renamed the switches and raises where the old name is read after the new one was set.
    """
    cudnn = torch.backends.cudnn
    parts = (torch.backends.cuda.matmul, getattr(cudnn, "conv", cudnn))
    switches = [(part, "fp32_precision", "ieee") if hasattr(part, "fp32_precision") else (part, "allow_tf32", False)
                for part in parts]
    saved = [getattr(part, name) for part, name, _ in switches]
    try:
        for part, name, exact in switches:
            setattr(part, name, exact)
        yield
    finally:
        for (part, name, _), value in zip(switches, saved, strict=True):
            setattr(part, name, value)


def open_extractor(spec: str, inception_weights: str | Path | None = None) -> Extractor:
    """The extractor that --features names: "inception", "timm:NAME:PATH" or "torchscript:PATH".

    inception_weights: torch-fidelity's file; None looks where torch.hub keeps it. timm's model NAME with the weights in
    PATH sees whole images, resized (bicubic, antialiased) and normalized as its configuration says; features are what
    its classifier reads, logits what that returns if it has one. A TorchScript module takes uint8
    (N, 3, H, W) and returns pooled features (N, D), or a tuple of them, logits (N, C) and flattened spatial features
    (N, S). FileNotFoundError: no such file, saying where to put it. ValueError: an unknown spec or a foreign file.
    """
    if spec == "inception":
        return _open_inception(inception_weights)
    if spec.startswith("torchscript:"):
        return _open_torchscript(Path(spec.removeprefix("torchscript:")))
    if spec.startswith("timm:"):
        _, name, path = (*spec.split(":", 2), "")[:3]
        if not path:
            raise ValueError(f"--features {spec}: name the file of weights as well, timm:{name or 'NAME'}:PATH")
        return _open_timm(name, Path(path))
    raise ValueError(f"--features {spec!r} is none of inception, timm:NAME:PATH and torchscript:PATH")


def find_inception_weights(path: str | Path | None = None) -> Path:
    """The weights' file: `path`, or torch.hub's cache when None. FileNotFoundError says where it belongs."""
    found = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE if path is None else Path(path)
    if not found.is_file():
        raise FileNotFoundError(
            f"Inception weights: {found} does not exist. Put torch-fidelity's {INCEPTION_FILE} (of its release v0.2.0) "
            "there, or name another place with --inception-weights PATH"
        )
    return found


def _open_inception(weights: str | Path | None) -> Extractor:
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = find_inception_weights(weights)
    try:
        # torch-fidelity unpickles the file unchecked. What this call accepts holds tensors only and is harmless there.
        torch.load(path, map_location="cpu", weights_only=True)
        network = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(path))
    except Exception as error:  # a damaged file makes parsers fail in any way
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"--inception-weights: {path} is not torch-fidelity's {INCEPTION_FILE} ({reason})") from error
    kept: list[Tensor] = []
    # TensorFlow's "mixed_6/conv", which sFID reads, is the third block of 17 x 17 (Mixed_6b is "mixed_4"), its branch
    # of one 1 x 1 convolution, after batch norm and ReLU: in TensorFlow the tensor named like the scope is the last.
    network.Mixed_6d.branch1x1.register_forward_hook(lambda _module, _args, out: kept.append(out[:, :SPATIAL_CHANNELS]))

    def run(images: Tensor) -> Features:
        kept.clear()
        pooled, logits = network(images)
        return Features(pooled, logits, kept.pop().flatten(1))

    return Extractor("inception", _sha256(path), network, run, INCEPTION_WIDTHS)


def _open_timm(name: str, path: Path) -> Extractor:
    import timm

    if not timm.is_model(name):
        raise ValueError(f"--features timm:{name}:{path}: timm {timm.__version__} has no model {name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"--features timm:{name}:{path}: no such file; nothing is downloaded")
    network: Any = timm.create_model(name, pretrained=False)
    try:
        timm.models.load_checkpoint(network, str(path), strict=True, weights_only=True)
    except Exception as error:  # as above
        raise ValueError(f"--features timm:{name}:{path}: not the weights of that model") from error
    config = timm.data.resolve_model_data_config(network)
    channels, *size = config["input_size"]
    if channels != 3:
        raise ValueError(f"--features timm:{name}: the model takes images of {channels} channels, not 3")
    mean, std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))

    def run(images: Tensor) -> Features:
        x = F.interpolate(images.float(), size=size, mode="bicubic", antialias=True).clamp(0.0, 255.0) / 255.0
        inside = network.forward_features((x - mean.to(x.device)) / std.to(x.device))
        pooled = network.forward_head(inside, pre_logits=True).float()
        return Features(pooled, network.forward_head(inside).float() if network.num_classes else None)

    return Extractor(f"timm:{name}", _sha256(path), network, run)


def _open_torchscript(path: Path) -> Extractor:
    if not path.is_file():
        raise FileNotFoundError(f"--features torchscript:{path}: no such file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that TorchScript is deprecated helps nobody here
            network = torch.jit.load(str(path), map_location="cpu")
    except Exception as error:  # as above
        raise ValueError(f"--features torchscript:{path}: not a TorchScript file") from error
    try:
        digest = _torchscript_sha256(path)
    except Exception as error:  # of a sum that is wrong, which torch does not look at
        raise ValueError(f"--features torchscript:{path}: damaged ({error})") from error

    def run(images: Tensor) -> Features:
        out = network(images)
        parts = list(out) if isinstance(out, tuple) else [out]
        good = 1 <= len(parts) <= 3 and all(
            isinstance(p, Tensor) and p.dim() == 2 and len(p) == len(images) and p.is_floating_point() for p in parts
        )
        if not good:
            shapes = [tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts]
            raise ValueError(f"--features torchscript:{path} returned {shapes} for {len(images)} images; expected "
                             "(N, D), or a tuple of (N, D), (N, C), (N, S)")
        pooled, logits, spatial = [*(p.float() for p in parts), None, None][:3]
        return Features(pooled, logits, spatial)

    return Extractor("torchscript", digest, network, run)


_ATTRIBUTES = re.compile(rb"^(  \w+ : [^\n]*\n)+", re.MULTILINE)  # bodies are indented more, or assign


def _torchscript_sha256(path: Path) -> str:
    """Equal for files of the same weights and code that a command wrote. Left out: paths of the machine, and the order
    in which Python's hashes put the attributes of a class. Left in: the numbers that a process gives its classes: files
    of a process that made other TorchScript before may differ though they compute the same."""
    digest = hashlib.sha256()
    with zipfile.ZipFile(path) as archive:
        for name in sorted(archive.namelist()):
            _, _, record = name.partition("/")  # before it: the file's own name when it was written
            if record.endswith((".debug_pkl", "serialization_id")):
                continue
            content = archive.read(name)
            if record.endswith(".py"):
                content = _ATTRIBUTES.sub(lambda found: b"".join(sorted(found[0].splitlines(keepends=True))), content)
            digest.update(f"{record} {len(content)} ".encode() + content)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
