"""Every host that `attach` knows in a small model, trained bare and with ProVQ, with all else equal.

    python scripts/train_hosts.py --out every-host.json
    python scripts/train_hosts.py --hosts dac dac-residual --seeds 0

Codecs are trained on made sound of 8 kHz (32 tokens a window), all others on scikit-learn's digits (16 tokens of 16x16
pixels), between the same few convolutions. 64 codes of 8 channels, residual quantizers 3 levels of 32. Adam at one
learning rate for all; options of the hosts as they come. Bare is `attach` with a zero-length curriculum, which equals
the host alone bit for bit; attached spends a third of the steps each on warm-up, transition and discrete training.
--out has every run: codes used on held-out data and the error, and where the host's class is
from: the version of its package, a checkout in PROVQ_HOSTS (CONTRIBUTING.md), or a stand-in in tests/workers/.

--out is written after every run, and read: its runs are not repeated, so the same command goes on where it was ended.
Needs requirements-dev.txt. The tables of RESULTS.md are written from it by evaluations/evidence/document.py.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import itertools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from evaluations.benchmarks import host_flags
from tokenizer.runtime.command import command, make_parser, refuse_early, require_flags_at_least, require_out_file

PROG = "scripts/train_hosts.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("--hosts", nargs="+", metavar="KIND", help="of the table in tokenizer/README.md; default all")
    parser.add_argument("--sounds", type=int, default=4096, help="to train on")
    host_flags.add_flags(parser)
    parser.set_defaults(val_size=297, steps=300, batch_size=16)
    parser.add_argument("--out", type=Path, help="a JSON file of every run; see above")
    args = parser.parse_args(argv)
    host_flags.check_flags(parser, args, 4)
    require_flags_at_least(parser, args, 1, "sounds")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evaluations.benchmarks import bare_and_attached, made_sound
from evaluations.evidence import hosts as tables
from tokenizer import provq_attach
from tokenizer.provq_attach import ADAPTERS, Adapter, Curriculum, adapt

DIM, CODES, LEVELS, LEVEL_CODES = 8, 64, 3, 32


class Host(NamedTuple):
    """How a quantizer is made, and trained."""

    make: Callable[[], nn.Module]  # of latents with DIM channels
    source: str  # of its class: the version of its package, "checkout" or "stand-in"
    data: str  # "images" or "sound"
    losses: dict[str, float] | None = None  # of the adapter's losses, those that its repository adds up -> weights; all
    start: Callable[[Adapter, Tensor], None] | None = None  # its own codes of latents (N, DIM), bare, where it has some


def _levels(name: str = "num_quantizers") -> dict[str, int]:
    return {name: LEVELS, "codebook_size": LEVEL_CODES}


def _first_latents(adapter: Any, latents: Tensor) -> None:
    adapter.set_codebook_(latents[torch.randperm(len(latents))[:CODES]])


@functools.cache
def every_host() -> dict[str, Host]:
    """By kind, as ADAPTERS has them, less those that are refused."""
    sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
    import diveq
    import vector_quantize_pytorch as lucidrains
    from workers import provq_codecs, provq_hosts

    def found(package: str, path: str, stand_in: Any) -> tuple[Any, str]:
        try:
            cls = provq_codecs.original(package, path, stand_in.__name__)
        except ModuleNotFoundError:  # of a package or checkout that lacks what it needs itself
            cls = None
        if cls is None:
            return stand_in, "stand-in"
        try:
            return cls, importlib.metadata.version({"dac": "descript-audio-codec"}.get(package, package))
        except importlib.metadata.PackageNotFoundError:
            return cls, "checkout"

    def host(
        package: str, path: str, stand_in: Any, options: dict[str, Any], data: str = "images", **more: Any,
    ) -> Host:
        cls, source = found(package, path, stand_in)
        return Host(lambda: cls(**options), source, data, **more)

    def of_lucidrains(name: str, data: str = "images", **options: Any) -> Host:
        version = importlib.metadata.version("vector-quantize-pytorch")
        return Host(lambda: getattr(lucidrains, name)(dim=DIM, **options), version, data)

    sizes = {"n_e": CODES, "e_dim": DIM}
    codec = {"input_dim": DIM, "codebook_dim": DIM}
    taming = "taming/modules/vqvae/quantize"
    esm, source = found("esm", "layers/codebook", provq_hosts.EMACodebook)
    return {
        "llamagen": host("LlamaGen", "tokenizer/tokenizer_image/vq_model", provq_hosts.VectorQuantizer, {
            **sizes, "beta": 0.25, "entropy_loss_ratio": 0.0, "l2_norm": True, "show_usage": False}),
        "taming": host("taming-transformers", taming, provq_hosts.VectorQuantizer2, {**sizes, "beta": 0.25}),
        "simvq": host("SimVQ", taming, provq_hosts.SimVQ, sizes),
        "taming-ema": Host(lambda: provq_hosts.EMAVectorQuantizer(CODES, DIM, 0.25), "stand-in", "images"),
        "esm": Host(lambda: provq_hosts.frozen(esm(CODES, DIM)), source, "images", start=_first_latents),
        "encodec": host("encodec", "quantization/core_vq", provq_codecs.VectorQuantization,
                        {"dim": DIM, "codebook_size": CODES}, "sound"),
        "encodec-residual": host("encodec", "quantization/core_vq", provq_codecs.ResidualVectorQuantization,
                                 {"dim": DIM, **_levels()}, "sound"),
        "dac": host("dac", "nn/quantize", provq_codecs.VectorQuantize, {**codec, "codebook_size": CODES}, "sound",
                    losses={"commit": 0.25, "codebook": 1.0}),
        "dac-residual": host("dac", "nn/quantize", provq_codecs.ResidualVectorQuantize,
                             {**codec, **_levels("n_codebooks"), "quantizer_dropout": 0.5}, "sound",
                             losses={"commit": 0.25, "codebook": 1.0}),
        "diffusers": host("diffusers", "models/autoencoders/vae", provq_codecs.DiffusersQuantizer,
                          {"n_e": CODES, "vq_embed_dim": DIM, "beta": 0.25, "legacy": False}),
        "titok": host("1d-tokenizer", "modeling/quantizer/quantizer", provq_codecs.TiTokQuantizer,
                      {"codebook_size": CODES, "token_size": DIM}, losses={"quantizer_loss": 1.0}),
        "ibq": host("SEED-Voken", "src/IBQ/modules/vqvae/quantize", provq_codecs.IndexPropagationQuantize, sizes),
        "diveq": Host(lambda: diveq.DIVEQ(CODES, DIM, verbose=False), importlib.metadata.version("diveq"), "images"),
        "lucidrains": of_lucidrains("VectorQuantize", codebook_size=CODES),
        "lucidrains-residual": of_lucidrains("ResidualVQ", "sound", **_levels()),
        "lucidrains-simvq": of_lucidrains("SimVQ", codebook_size=CODES),
        "lucidrains-residual-simvq": of_lucidrains("ResidualSimVQ", "sound", **_levels()),
        "lucidrains-grouped": of_lucidrains("GroupedResidualVQ", "sound", groups=2, **_levels()),
        "lucidrains-fsq": of_lucidrains("FSQ", levels=[4, 4, 4]),
        "lucidrains-lfq": of_lucidrains("LFQ", codebook_size=CODES),
        "lucidrains-latent": of_lucidrains("LatentQuantize", levels=[4, 4, 4]),
        "lucidrains-residual-fsq": of_lucidrains("ResidualFSQ", "sound", levels=[4, 4, 2], num_quantizers=LEVELS),
        "lucidrains-residual-lfq": of_lucidrains("ResidualLFQ", "sound", **_levels()),
    }


def _net(sizes: list[int], convolution: Callable[..., nn.Module], scale: int) -> list[nn.Module]:
    """Convolutions that each divide lengths by scale, or multiply them if transposed, with SiLU between them."""
    layers = [convolution(a, b, 2 * scale, scale, scale // 2) for a, b in itertools.pairwise(sizes)]
    return [layer for convolution in layers for layer in (convolution, nn.SiLU())]


class Model(nn.Module):
    """Images (B, C, S, S), or sound (B, 1, T), around a quantizer; called: y, the quantizer's loss [], indices."""

    def __init__(self, host: Host, channels: int):
        super().__init__()
        self.losses = host.losses
        if host.data == "images":
            self.encoder = nn.Sequential(*_net([channels, 32, 64], nn.Conv2d, 2), nn.Conv2d(64, DIM, 1))
            self.decoder = nn.Sequential(nn.Conv2d(DIM, 64, 1), nn.SiLU(), *_net([64, 32], nn.ConvTranspose2d, 2),
                                         nn.ConvTranspose2d(32, channels, 4, 2, 1))
        else:
            self.encoder = nn.Sequential(*_net([channels, 16, 32, 32], nn.Conv1d, 4), nn.Conv1d(32, DIM, 1))
            self.decoder = nn.Sequential(nn.Conv1d(DIM, 32, 1), nn.SiLU(), *_net([32, 32, 16], nn.ConvTranspose1d, 4),
                                         nn.ConvTranspose1d(16, channels, 8, 4, 2))
        self.quantizer: Any = host.make()
        self.adapter = [adapt(self.quantizer, check=False)]  # no child; it says what the host takes and returns

    def tokens(self, x: Tensor) -> Tensor:
        """Latents (N, DIM)."""
        return self.encoder(x).movedim(1, -1).flatten(0, -2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, adapter = self.encoder(x), self.adapter[0]
        last = z.movedim(1, -1)
        rows = last.flatten(0, -2) if not adapter.spatial else last.flatten(1, -2) if adapter.spatial == 1 else last
        given = rows.movedim(-1, adapter.channel_dim) if adapter.spatial else rows
        out = self.quantizer(given.contiguous())
        quantized = provq_attach._get(out, adapter.quantized_at)
        quantized = quantized.movedim(adapter.channel_dim, -1) if adapter.spatial else quantized
        terms = [weight * provq_attach._get(out, adapter.losses_at[name]).mean() for name, weight
                 in (self.losses or dict.fromkeys(adapter.losses_at, 1.0)).items()] if self.training else []
        assert adapter.indices_at
        return (self.decoder(quantized.reshape(last.shape).movedim(-1, 1)), sum(terms, z.new_zeros(())),
                provq_attach._get(out, adapter.indices_at))


OBJECTIVES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"images": F.mse_loss, "sound": made_sound.objective}


def load(args: argparse.Namespace, data: str) -> tuple[Tensor, Tensor]:
    """Training and held-out x."""
    if data == "images":
        return bare_and_attached.load_images(args, None)
    return made_sound.sounds(args.sounds, 0), made_sound.sounds(args.val_size, 1)


def train(args: argparse.Namespace, host: Host, curriculum: Curriculum, seed: int, x: Tensor) -> Model:
    torch.manual_seed(seed)
    model = Model(host, x.shape[1])
    if host.start and not curriculum.warmup_steps:
        with torch.no_grad():
            host.start(model.adapter[0], model.tokens(x[torch.randperm(len(x))[: args.batch_size]]))
    bare_and_attached.train(args, model, model.quantizer, curriculum, seed, x, OBJECTIVES[host.data])
    return model.eval()


@torch.no_grad()
def score(model: Model, data: str, x: Tensor) -> dict[str, Any]:
    """Codes used on x, of all levels, and the error of evaluations/evidence/hosts.py."""
    adapter = model.adapter[0]
    counts, errors = bare_and_attached.no_counts(adapter), []
    for part in x.split(250):
        y, _, indices = model(part)
        errors.append(made_sound.spectral_error(y, part) if data == "sound" else (y - part).square().mean((1, 2, 3)))
        counts += bare_and_attached.counts_of(adapter, indices)
    error = torch.cat(errors).mean().item()
    return {"error": round(error if data == "sound" else 50 * error**0.5, 4), "codes": int((counts > 0).sum())}


def compare(args: argparse.Namespace) -> None:
    """ValueError: --hosts names none, --out has runs of other settings or classes."""
    provq_attach._companions()  # they put their adapters into ADAPTERS
    kinds = [kind for kind, adapter in ADAPTERS.items() if not hasattr(adapter, "refused")]
    if unknown := [kind for kind in args.hosts or () if kind not in kinds]:
        raise ValueError(f"--hosts {unknown[0]} is none of {', '.join(kinds)}")
    document = bare_and_attached.document(
        args, PROG, "steps image_size batch_size lr code_lr loss_floor val_size max_images sounds")
    for kind in args.hosts or kinds:
        host = every_host()[kind]

        def run(x: tuple[Tensor, Tensor], curriculum: Curriculum, seed: int, host: Host = host) -> dict[str, Any]:
            return score(train(args, host, curriculum, seed, x[0]), host.data, x[1])

        codes = adapt(host.make(), check=False).num_codes
        about = {"source": host.source, "data": host.data, "codes": codes}
        if document.setdefault("hosts", {}).setdefault(kind, about) != about:
            raise ValueError(f"--out {args.out}: its runs of {kind} are of {document['hosts'][kind]}, this is {about}")
        runs = bare_and_attached.complete(args, document, kind, functools.partial(load, args, host.data), run)
        print(tables.markdown({"hosts": {kind: about}, "runs": runs}, host.data), flush=True)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        if args.out:
            require_out_file(args.out)
        compare(args)


if __name__ == "__main__":
    main()
