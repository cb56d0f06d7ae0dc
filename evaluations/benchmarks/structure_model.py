"""Times the structure tokenizer: a training step against StructTokenBench's modules, and the extraction of tokens.

    python evaluations/benchmarks/structure_model.py --peer-stb /path/to/StructTokenBench --peer-esm /path/to/esm
    python evaluations/benchmarks/structure_model.py --extract 100

A step is forward, the five reconstruction losses, the quantizer's, and backward, on chains without padding, with the
same weights in one process. The peer's model is its VQVAEModel; of its training step are left out the RMSD and lDDT
that it computes on the CPU every time.
"""

from __future__ import annotations

import argparse
import importlib.abc
import importlib.machinery
import math
import sys
import types
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from protein.structure_config import PRESETS
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least

PROG = "evaluations/benchmarks/structure_model.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--peer-stb", type=Path, help="checkout of StructTokenBench")
    parser.add_argument("--peer-esm", type=Path, help="checkout of esm, which StructTokenBench imports")
    parser.add_argument("--preset", choices=PRESETS, help="default: small for training, paper for --extract")
    parser.add_argument("--quantizer", choices=("vq", "aminoaseed"), default="vq")
    parser.add_argument("--extract", type=int, default=0, help="time the tokens of this many chains instead")
    parser.add_argument("--bf16", action="store_true", help="training steps under bfloat16 autocast")
    for name, default in (("batch-size", 4), ("length", 256), ("threads", 2), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    args = parser.parse_args(argv)
    require_flags_at_least(parser, args, 1, "batch_size length threads repeats")
    require_flags_at_least(parser, args, 0, "extract")
    if args.extract and args.out is not None:
        parser.error("--out holds comparisons with a peer, of which --extract makes none; leave one of them out")
    if not args.extract and (args.peer_stb is None or args.peer_esm is None):
        parser.error("a training step is compared with a peer: give --peer-stb and --peer-esm, or --extract")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch import Tensor, nn

from evaluations.benchmarks import peer
from protein.geometry import place_atom
from protein.losses import structure_losses
from protein.structure_model import StructureModelConfig, StructureVQModel, to_structtokenbench

# What the peer's model file imports for its trainer and its data; none of it takes part in a step of the model.
UNUSED = ("hydra", "pytorch_lightning", "transformers", "deepspeed", "zstd", "cloudpathlib",
          "modeling_util", "util", "protein_chain")


class _Unused(types.ModuleType):
    """A module that has whatever is imported from it: an empty class."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _UnusedFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.split(".")[0] in UNUSED else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Unused(spec.name)

    def exec_module(self, module: types.ModuleType) -> None: ...


class _Config(dict):
    __getattr__ = dict.__getitem__


def load_peer(stb: Path, esm: Path, config: StructureModelConfig) -> Any:
    """StructTokenBench's VQVAEModel of the same sizes as config. ValueError: a checkout without its files."""
    if not (esm / "esm" / "models" / "vqvae.py").is_file():
        raise ValueError(f"--peer-esm {esm} has no esm/models/vqvae.py; name a checkout of evolutionaryscale/esm")
    sys.path.append(str(esm))
    finder = _UnusedFinder()
    sys.meta_path.insert(0, finder)
    try:
        module = peer.load_module(stb / "src", "vqvae_model.py")
    finally:
        sys.meta_path.remove(finder)
    return module.VQVAEModel(_Config(
        quantizer=_Config(
            quantizer_type="StraightThroughQuantizer", codebook_size=config.codebook_size, _need_init=False,
            codebook_embed_size=config.codebook_embed_dim, freeze_codebook=config.quantizer == "aminoaseed",
            use_linear_project=config.quantizer == "aminoaseed",
            loss_weight={"commitment_loss_weight": config.commit_loss_beta, "quantization_loss_weight": 1.0,
                         "reconstruction_loss_weight": 1.0},
        ),
        encoder=_Config(d_model=config.encoder_width, n_heads=1, v_heads=config.encoder_heads,
                        n_layers=config.encoder_layers, d_out=config.codebook_embed_dim),
        decoder=_Config(d_model=config.decoder_width, n_heads=config.decoder_heads, n_layers=config.decoder_layers),
    ))


def backbones(batch: int, length: int) -> Tensor:
    """Chains (batch, length, 3, 3) of ideal bonds and random torsions around those of a helix."""
    generator = torch.Generator().manual_seed(0)
    torsions = torch.tensor([-0.82, math.pi, -1.05]).repeat(length) + 0.4 * torch.randn(
        batch, 3 * length, generator=generator)  # psi, omega, phi: of the atoms N, CA, C that follow
    atoms = [torch.tensor(atom).expand(batch, 3) for atom in ((0.0, 0.0, 0.0), (1.46, 0.0, 0.0), (2.0, 1.43, 0.0))]
    for i in range(3, 3 * length):
        a, b, c = atoms[-3:]
        atoms.append(place_atom(a, b, c, (1.33, 1.46, 1.52)[i % 3], (2.03, 2.12, 1.94)[i % 3], torsions[:, i]))
    return torch.stack(atoms, dim=1).view(batch, length, 3, 3)


def compare_training(
    args: argparse.Namespace, config: StructureModelConfig, device: torch.device
) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ours = StructureVQModel(config).to(device).train()
    theirs = load_peer(args.peer_stb, args.peer_esm, config)
    theirs.load_state_dict(to_structtokenbench(ours))
    theirs.to(device).train()
    coords = backbones(args.batch_size, args.length).to(device)
    mask = torch.ones(coords.shape[:2], dtype=torch.bool, device=device)
    index = torch.arange(args.length, device=device).expand(args.batch_size, -1)
    sequence = torch.randint(4, 24, index.shape, device=device)
    atom37 = torch.cat([coords, coords.new_zeros(*coords.shape[:2], 34, 3)], dim=2)

    def our_terms(as_coded: bool = False) -> list[Tensor]:
        out = ours(coords, mask, index)
        return [*structure_losses(out, coords, sequence, index, as_coded=as_coded).values(), out.quantized.loss]

    def their_terms() -> list[Tensor]:
        z = theirs.encoder.encode(atom37, mask, None, index)
        quantized, indices, quantizer_loss, _ = theirs.quantizer(z)
        decoded = theirs.decoder.decode(quantized, indices, mask, None)
        found, true = decoded["bb_pred"], atom37[:, :, :3]
        return [
            theirs.compute_geometric_distance(found, true, mask)[0],
            theirs.compute_geometric_direction(found, true, mask)[0],
            theirs.compute_binned_distance(decoded["pairwise_dist_logits"], atom37, mask)[0],
            theirs.compute_binned_direction(decoded["pairwise_dir_logits"], true, mask)[0],
            theirs.compute_inverse_folding(decoded["last_hidden_state"], sequence, mask)[0],
            quantizer_loss,
        ]

    with torch.no_grad():
        print("losses, ours computed as theirs and theirs:")  # noqa: T201
        for mine, other in zip(our_terms(as_coded=True), their_terms(), strict=True):
            print(f"  {mine.item():10.5f} {other.item():10.5f}")  # noqa: T201

    def run(model: nn.Module, terms: Any) -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=args.bf16):
            loss = torch.stack([term.float() for term in terms()]).sum()
        loss.backward()
        model.zero_grad(set_to_none=True)

    times = peer.compare(lambda: run(ours, our_terms), lambda: run(theirs, their_terms), args.repeats,
                         peer.clock_of(device))
    return [peer.report("training step of structures", "chains", args.batch_size, *times)]


def time_extraction(args: argparse.Namespace, config: StructureModelConfig, device: torch.device) -> None:
    torch.manual_seed(0)
    model = StructureVQModel(config).to(device).eval()
    coords = backbones(args.extract, args.length).to(device)
    model.encode(coords[:1])
    taken = peer.seconds(lambda: [model.encode(chain[None]) for chain in coords])
    print(f"{args.extract} chains of {args.length} residues to tokens, one by one: {taken:.1f} s")  # noqa: T201


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """ValueError: a checkout that lacks files."""
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = args.preset or ("paper" if args.extract else "small")
    config = StructureModelConfig(**PRESETS[preset], quantizer=args.quantizer)
    print(f"{preset} model on {device}, {args.threads} threads, torch {torch.__version__}")  # noqa: T201
    if args.extract:
        time_extraction(args, config, device)
        return []
    print(f"training step of {args.batch_size} chains of {args.length} residues")  # noqa: T201
    return compare_training(args, config, device)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG):
        peer.keep(args.out, measure(args))


if __name__ == "__main__":
    main()
