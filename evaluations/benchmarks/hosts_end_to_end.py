"""The curriculum in hosts of three families, end to end: each trained bare and attached, with all else equal.

    python evaluations/benchmarks/hosts_end_to_end.py --images cifar10_train.zip --structures pdbs/ --out hosts.json

image: diffusers' VQModel, 8x8 tokens, 256 learned codes. codec: EnCodec's SEANet and ResidualVectorQuantization, 4
levels of 64 codes, on made sound of 8 kHz. protein: this repository's encoder and decoder (ESM3's architecture) around
ESM's EMACodebook, 128 codes, on stretches of 32 residues. Adam at one learning rate for all. Bare is `attach` with a
zero-length curriculum, which equals the host alone bit for bit; attached spends a third of the steps each on warm-up,
transition and discrete training. Prints a table: errors on held-out data and codes used on it, mean and standard
deviation over seeds, and the paired difference of the first error with its 95 % interval.

--out is written after every run, and read: its runs are not repeated, so the same command goes on where it was ended.
Needs diffusers, encodec and esm, each for its family.
"""

from __future__ import annotations

import argparse
import functools
import sys
from pathlib import Path
from typing import Any, cast

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from evaluations.benchmarks import host_flags
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file

PROG = "evaluations/benchmarks/hosts_end_to_end.py"
NAMES = ("image", "codec", "protein")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--hosts", nargs="+", default=NAMES, choices=NAMES, metavar="NAME",
                        help=f"of {', '.join(NAMES)}; default all")
    parser.add_argument("--images", help="as for train_provq.py; none = scikit-learn's digits")
    parser.add_argument("--structures", help="as for protein/train_provq.py; none = generated backbones")
    parser.add_argument("--stretches", type=int, default=8, help="of each chain")
    parser.add_argument("--sounds", type=int, default=4096, help="to train on")
    host_flags.add_flags(parser)
    parser.add_argument("--out", type=Path, help="a JSON file of every run; see above")
    args = parser.parse_args(argv)
    host_flags.check_flags(parser, args, 2)
    require_flags_at_least(parser, args, 1, "stretches sounds")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluations.benchmarks import bare_and_attached, made_sound
from evaluations.benchmarks.host_flags import ATTACHED, BARE
from protein.geometry import backbone_rmsd, lddt
from protein.losses import direction_loss, distance_loss
from protein.structure_data import StructureDataset, hold_out_entries, open_structures, usable_chains
from protein.structure_decoder import VectorDecoder
from protein.structure_encoder import StructureEncoder
from tokenizer.pixels import psnr
from tokenizer.provq import code_statistics
from tokenizer.provq_attach import Adapter, Curriculum
from tokenizer.runtime.over_seeds import mean_interval, shown


class Host(nn.Module):
    """A model around somebody else's quantizer. Its call: x -> y, the loss of the quantizer [], indices."""

    errors: dict[str, tuple[str, int]]  # of `measure`, the first is compared -> heading, digits
    quantizer: Any  # a module of another package, with attach's .provq

    @staticmethod
    def load(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
        """Training and held-out x (n, ...)."""
        raise NotImplementedError

    def start(self, x: Tensor) -> None:
        """How the host's own codes start, where not in its constructor or first forward."""

    def objective(self, y: Tensor, x: Tensor) -> Tensor:
        raise NotImplementedError

    def measure(self, y: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Of each item (B,)."""
        raise NotImplementedError


class ImageHost(Host):
    """diffusers' VQModel of images (B, C, S, S) in [-1, 1], with its learned table and its loss as they are."""

    errors = {"psnr": ("PSNR (dB)", 2)}  # noqa: RUF012
    model: Any

    def __init__(self, x: Tensor):
        super().__init__()
        from diffusers import VQModel  # not needed by anything else in this repository

        self.model = cast(Any, VQModel)(  # what its package loads lazily has no type
            in_channels=x.shape[1], out_channels=x.shape[1], block_out_channels=(16, 32), norm_num_groups=8,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            mid_block_add_attention=False, latent_channels=8, num_vq_embeddings=256)
        self.quantizer = self.model.quantize

    load = staticmethod(lambda args: bare_and_attached.load_images(args, args.images))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indices = []
        hook = self.quantizer.register_forward_hook(lambda *call: indices.append(call[-1][2][2]))  # it keeps them
        y, loss = self.model(x, return_dict=False)
        hook.remove()
        return y, loss, indices[0]

    def objective(self, y: Tensor, x: Tensor) -> Tensor:
        return F.mse_loss(y, x)

    def measure(self, y: Tensor, x: Tensor) -> dict[str, Tensor]:
        return {"psnr": psnr(y.clamp(-1, 1), x, data_range=2.0)}


class CodecHost(Host):
    """EnCodec's encoder, levels and decoder, with its k-means of the first batch and its restart of rare codes."""

    errors = {"spectral": ("log-spectral error (dB)", 2), "snr": ("SNR (dB)", 2)}  # noqa: RUF012

    def __init__(self, x: Tensor):  # noqa: ARG002
        super().__init__()
        from encodec.modules import SEANetDecoder, SEANetEncoder  # not needed by anything else here
        from encodec.quantization.core_vq import ResidualVectorQuantization

        net: dict[str, Any] = {"dimension": 16, "n_filters": 8, "ratios": [4, 4, 2], "lstm": 1}
        self.encoder, self.decoder = SEANetEncoder(**net), SEANetDecoder(**net)
        self.quantizer = ResidualVectorQuantization(num_quantizers=4, dim=16, codebook_size=64)

    @staticmethod
    def load(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
        return made_sound.sounds(args.sounds, 0), made_sound.sounds(args.val_size, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, losses = self.quantizer(self.encoder(x))
        return self.decoder(quantized), losses.mean(), indices

    def objective(self, y: Tensor, x: Tensor) -> Tensor:
        return made_sound.objective(y, x)

    def measure(self, y: Tensor, x: Tensor) -> dict[str, Tensor]:
        noise = (y - x).square().sum((1, 2))
        return {"spectral": made_sound.spectral_error(y, x), "snr": 10 * (x.square().sum((1, 2)) / noise).log10()}


class ProteinHost(Host):
    """Backbones (B, L, 3, 3) in Angstrom around ESM's frozen EMACodebook: latents are drawn to codes that stay."""

    errors = {"rmsd": ("RMSD (Å)", 2), "lddt": ("lDDT", 3)}  # noqa: RUF012
    LENGTH = 32  # residues

    def __init__(self, x: Tensor):  # noqa: ARG002
        super().__init__()
        from esm.layers.codebook import EMACodebook  # not needed by anything else here

        self.encoder = StructureEncoder(64, 16, 1, 16)
        self.decoder = VectorDecoder(16, 128, 4, 3)
        self.quantizer = EMACodebook(128, 16)
        self.quantizer.freeze_codebook = True  # its update is not released

    @classmethod
    def load(cls, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
        structures = open_structures(args.structures, ideal_chains=400)
        usable = usable_chains(structures, min_length=cls.LENGTH, max_length=cls.LENGTH)
        training, held_out = hold_out_entries(structures, usable.indices, 0.2, seed=0)
        return (cls._stretches(structures, training, args.stretches),
                cls._stretches(structures, held_out, args.stretches))

    @classmethod
    def _stretches(cls, structures: Any, indices: Any, times: int) -> Tensor:
        """(n, L, 3, 3): as many stretches of each chain, less those with breaks."""
        dataset = StructureDataset(structures, indices, max_length=cls.LENGTH)
        items = [dataset[epoch, i] for epoch in range(times) for i in range(len(dataset))]
        whole = [item["coords"] for item in items if len(item["coords"]) == cls.LENGTH
                 and bool(item["coords"].isfinite().all()) and bool((item["residue_index"].diff() == 1).all())]
        if not whole:
            raise ValueError(f"--structures: no stretch of {cls.LENGTH} residues without a break")
        return torch.stack(whole)

    def start(self, x: Tensor) -> None:
        self.quantizer._init_embeddings(self.encoder(x).contiguous())  # as its first training forward would

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        quantized, indices, loss = self.quantizer(self.encoder(x).contiguous())
        return self.decoder(quantized).coords, loss, indices

    def objective(self, y: Tensor, x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        return distance_loss(y, x, mask) + direction_loss(y, x, mask)

    def measure(self, y: Tensor, x: Tensor) -> dict[str, Tensor]:
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        return {"rmsd": backbone_rmsd(y, x, mask), "lddt": lddt(y[:, :, 1:2], x[:, :, 1:2], mask)}


HOSTS: dict[str, type[Host]] = dict(zip(NAMES, (ImageHost, CodecHost, ProteinHost), strict=True))


def train(args: argparse.Namespace, name: str, curriculum: Curriculum, seed: int, data: Tensor) -> Host:
    torch.manual_seed(seed)
    host = HOSTS[name](data)
    if not curriculum.warmup_steps:
        with torch.no_grad():
            host.start(data[torch.randperm(len(data))[: args.batch_size]])
    bare_and_attached.train(args, host, host.quantizer, curriculum, seed, data, host.objective)
    return host.eval()


@torch.no_grad()
def score(host: Host, data: Tensor) -> dict[str, Any]:
    """Means over the data; codes used on it and their perplexity, of each level, coarse to fine."""
    adapter: Adapter = host.quantizer.provq.quantizer
    counts, parts = bare_and_attached.no_counts(adapter), []
    for x in data.split(250):
        y, _, indices = host(x)
        parts.append(host.measure(y, x))
        counts += bare_and_attached.counts_of(adapter, indices)
    tables = counts.split([part.num_codes for part in adapter.parts()])
    return {**{key: torch.cat([part[key] for part in parts]).mean().item() for key in host.errors},
            "codes": [int((table > 0).sum()) for table in tables],
            "perplexity": [code_statistics(table)["perplexity"] for table in tables]}




def markdown(runs: list[dict[str, Any]], name: str) -> str:
    """The table of a host: a row for each curriculum, over the seeds that both have."""
    by = {label: {run["seed"]: run for run in runs if run["host"] == name and run["curriculum"] == label}
          for label in (BARE, ATTACHED)}
    seeds = sorted(by[BARE].keys() & by[ATTACHED].keys())
    errors = HOSTS[name].errors
    first, digits = next((key, digits) for key, (_, digits) in errors.items())
    heads = [heading for heading, _ in errors.values()]
    lines = [f"| {name} | {' | '.join(heads)} | codes used | {heads[0]}, difference [95 %] |",
             "|---" * (len(heads) + 3) + "|"]
    for label, found in by.items():
        cells = [shown([found[seed][key] for seed in seeds], places)
                 for key, (_, places) in errors.items()]
        levels = zip(*(found[seed]["codes"] for seed in seeds), strict=True)
        cells.append(", ".join(shown(level, 0) for level in levels))
        gap = ""
        if label == ATTACHED and len(seeds) > 1:
            found_gap = mean_interval(np.array([by[ATTACHED][seed][first] - by[BARE][seed][first] for seed in seeds]))
            gap = f"{found_gap['mean']:+.{digits}f} [" + ", ".join(f"{e:+.{digits}f}" for e in found_gap["ci95"]) + "]"
        lines.append(f"| {label} | {' | '.join(cells)} | {gap} |")
    return "\n".join(lines) + "\n"


def compare(args: argparse.Namespace) -> None:
    document = bare_and_attached.document(
        args, PROG, "steps image_size batch_size lr code_lr loss_floor val_size max_images stretches sounds")
    for name in args.hosts:
        def run(data: tuple[Tensor, Tensor], curriculum: Curriculum, seed: int, name: str = name) -> dict[str, Any]:
            return score(train(args, name, curriculum, seed, data[0]), data[1])

        runs = bare_and_attached.complete(args, document, name, functools.partial(HOSTS[name].load, args), run)
        print(markdown(runs, name), flush=True)  # noqa: T201


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        if args.out:
            require_out_file(args.out)
        compare(args)


if __name__ == "__main__":
    main()
