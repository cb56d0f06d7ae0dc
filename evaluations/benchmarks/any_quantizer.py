"""The curriculum around quantizers of other packages: each trained bare and attached, with all else equal.

    python evaluations/benchmarks/any_quantizer.py [cifar10_train.zip] [--quantizers ema fsq] [--seeds 0 1 2]

A small convolutional autoencoder at --image-size pixels, mean squared error, Adam at one learning rate for all. Bare is
`attach` with a zero-length curriculum, which equals the quantizer alone bit for bit; attached spends a third of the
steps each on warm-up, transition and discrete training. Prints a table: PSNR (dB) of held-out images, codes used on
them and perplexity, mean and standard deviation over seeds. Needs vector-quantize-pytorch and diveq.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.benchmarks import host_flags
from tokenizer.runtime.command import command, make_parser, refuse_early, require_out_file
from tokenizer.vq_config import Architecture

PROG = "evaluations/benchmarks/any_quantizer.py"
DIM = 8  # channels of a code
ARCHITECTURE = Architecture(32, (1, 1), encoder_blocks=(0, 2), decoder_blocks=(0, 2), z_channels=32)  # halves once


def _lucidrains(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import vector_quantize_pytorch as package  # not needed by anything else in this repository

        return getattr(package, name)(dim=DIM, **options)
    return make


def _diveq() -> nn.Module:
    import diveq

    return diveq.DIVEQ(num_embeddings=256, embedding_dim=DIM, verbose=False)


QUANTIZERS: dict[str, Callable[[], nn.Module]] = {  # about 256 codes each
    "ema": _lucidrains("VectorQuantize", codebook_size=256),
    "ema-kmeans": _lucidrains("VectorQuantize", codebook_size=256, kmeans_init=True),  # its own, on the first batch
    "ema-restart": _lucidrains("VectorQuantize", codebook_size=256, threshold_ema_dead_code=2),
    "cosine": _lucidrains("VectorQuantize", codebook_size=256, use_cosine_sim=True),
    "learned": _lucidrains("VectorQuantize", codebook_size=256, learnable_codebook=True, ema_update=False),
    "residual": _lucidrains("ResidualVQ", codebook_size=16, num_quantizers=2),
    "simvq": _lucidrains("SimVQ", codebook_size=256),
    "fsq": _lucidrains("FSQ", levels=[8, 6, 5]),
    "lfq": _lucidrains("LFQ", codebook_size=256),
    "diveq": _diveq,
}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("data_path", nargs="?", help="images, as for train_provq.py; none = scikit-learn's digits")
    parser.add_argument("--quantizers", nargs="+", default=list(QUANTIZERS), choices=QUANTIZERS, metavar="NAME",
                        help=f"of {', '.join(QUANTIZERS)}; default all")
    host_flags.add_flags(parser)
    parser.add_argument("--out", type=Path, help="also write every run as a line of JSON there")
    args = parser.parse_args(argv)
    host_flags.check_flags(parser, args, ARCHITECTURE.downsample)
    if args.out and args.out.exists():
        parser.error(f"--out {args.out} exists: name another file, or remove it")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluations.benchmarks import bare_and_attached
from tokenizer.pixels import psnr
from tokenizer.provq import code_statistics
from tokenizer.provq_attach import Curriculum
from tokenizer.runtime.over_seeds import shown
from tokenizer.vq_model import Decoder, Encoder


class Autoencoder(nn.Module):
    """Images (B, C, S, S) in [-1, 1] around any quantizer of tokens."""

    quantize: Any  # a module of another package, with attach's .provq

    def __init__(self, quantizer: nn.Module, channels: int, flat: bool):
        super().__init__()
        self.encoder, self.decoder = Encoder(ARCHITECTURE, channels, 0.0), Decoder(ARCHITECTURE, channels, 0.0)
        self.before = nn.Conv2d(ARCHITECTURE.z_channels, DIM, 1)
        self.after = nn.Conv2d(DIM, ARCHITECTURE.z_channels, 1)
        self.quantize, self.flat = quantizer, flat  # flat: takes (N, D), not (B, N, D)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> reconstruction, the quantizer's loss [], indices of any shape."""
        z = self.before(self.encoder(x))  # (B, D, h, w)
        tokens = z.flatten(2).movedim(1, -1)  # (B, h w, D)
        quantized, indices, *rest = self.quantize(tokens.flatten(0, 1) if self.flat else tokens)
        quantized = quantized.reshape(tokens.shape).movedim(-1, 1).reshape(z.shape)
        # FSQ has no loss; what diveq returns last is a perplexity.
        loss = rest[0].sum() if rest and not self.flat else z.new_zeros(())
        return self.decoder(self.after(quantized)), loss, indices


def train(args: argparse.Namespace, name: str, curriculum: Curriculum, seed: int, images: Tensor) -> Autoencoder:
    torch.manual_seed(seed)
    model = Autoencoder(QUANTIZERS[name](), images.shape[1], flat=name == "diveq")
    bare_and_attached.train(args, model, model.quantize, curriculum, seed, images, F.mse_loss)
    return model.eval()


@torch.no_grad()
def score(model: Autoencoder, images: Tensor) -> dict[str, float]:
    adapter = model.quantize.provq.quantizer
    counts, quality = bare_and_attached.no_counts(adapter), []
    for x in images.split(250):
        reconstruction, _, indices = model(x)
        quality.append(psnr(reconstruction.clamp(-1, 1), x, data_range=2.0))
        counts += bare_and_attached.counts_of(adapter, indices)
    return {"psnr": torch.cat(quality).mean().item(), "codes": int((counts > 0).sum()),
            "perplexity": code_statistics(counts)["perplexity"]}


def compare(args: argparse.Namespace) -> None:
    training, held_out = bare_and_attached.load_images(args, args.data_path)
    print("| quantizer | | PSNR (dB) | codes used | perplexity |\n|---|---|---|---|---|")  # noqa: T201
    for name in args.quantizers:
        for label, curriculum in bare_and_attached.curricula(args).items():
            runs = [score(train(args, name, curriculum, seed, training), held_out) for seed in args.seeds]
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    for seed, run in zip(args.seeds, runs, strict=True):
                        file.write(json.dumps({"quantizer": name, "curriculum": label, "seed": seed, **run}) + "\n")
            cells = [shown([run[key] for run in runs], digits)
                     for key, digits in (("psnr", 2), ("codes", 0), ("perplexity", 0))]
            print(f"| {name} | {label} | {' | '.join(cells)} |", flush=True)  # noqa: T201


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        if args.out:
            require_out_file(args.out)
        compare(args)


if __name__ == "__main__":
    main()
