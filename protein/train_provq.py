"""Trains a protein structure tokenizer on the ProVQ curriculum (paper, sections 4 and 5.1.3).

    torchrun --nproc_per_node=1 protein/train_provq.py                                    # generated backbones, minutes
    torchrun --nproc_per_node=8 protein/train_provq.py --preset paper --data-path pdb/                      # VanillaVQ
    torchrun --nproc_per_node=8 protein/train_provq.py --preset paper --data-path pdb/ --quantizer aminoaseed \\
        --results-dir runs/aminoaseed

--results-dir is the run's folder: the same command again resumes the run, at the very step.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from protein.train_config import RESUMABLE, TrainConfig, check, check_data, loss_weights, parse_config
from tokenizer.runtime.command import refuse_early
from tokenizer.runtime.ranks import started_together

PROG = "protein/train_provq.py"

if __name__ == "__main__":
    refuse_early(PROG, lambda: parse_config(description=__doc__),
                 lambda cfg: check(cfg, started_together()), check_data)

import torch
from torch import Tensor

from protein.clusters import members, read_clusters
from protein.losses import TERMS, contributing_chains, structure_losses
from protein.pretrained import load_structure_model
from protein.structure_data import (
    StructureBatchSampler,
    StructureDataset,
    StructureSet,
    collate,
    hold_out_entries,
    open_structures,
    usable_chains,
)
from protein.structure_io import ATOMS, Chain, write_structure
from protein.structure_model import StructureModelConfig, StructureVQModel
from protein.validation import StructureMeter
from tokenizer.code_meter import PaceMeter, count_
from tokenizer.curriculum import CurriculumTrainer, build_curriculum, choose_code_search, code_usage
from tokenizer.curriculum_config import kmeans_batches, last_step, with_length
from tokenizer.data import consecutive, make_loader, spread
from tokenizer.init_from import opened
from tokenizer.quantizers import build_restart
from tokenizer.runtime import config, distributed
from tokenizer.runtime.ema import EMA
from tokenizer.runtime.optim import accumulating, build_adamw, learning_rate, replicate, set_learning_rate, update
from tokenizer.runtime.packing import packed
from tokenizer.runtime.precision import set_tf32
from tokenizer.runtime.run import Run, launch
from tokenizer.runtime.throughput import Throughput

FED = ("coords", "mask", "residue_index", "sequence", "places")  # what of a batch goes to the device
PROBED, EXAMPLES = 16, 4  # validation chains whose drift is watched, and that are written at each stage's end


def build_model(cfg: TrainConfig) -> StructureVQModel:
    """The tokenizer with its curriculum; weights are a function of --global-seed alone. ValueError: see its parts."""
    curriculum, adaptive = build_curriculum(cfg)
    torch.manual_seed(cfg.global_seed)
    return StructureVQModel(StructureModelConfig.from_dict(config.to_dict(cfg)), curriculum, adaptive=adaptive)


class Trainer(CurriculumTrainer):
    """Everything that one run holds. Built from a checked configuration; `train` trains it to the end."""

    best_metric, higher_is_better, warmup_metric = "rmsd", False, "rmsd"
    shown = ("rmsd", "lddt", "tm", "usage", "perplexity")

    def __init__(self, cfg: TrainConfig, device: torch.device):
        set_tf32(convolutions=cfg.tf32, matmul=cfg.tf32)
        choose_code_search(cfg.code_search, device)
        fingerprints = self._open_data(cfg)
        cfg = with_length(cfg, len(self.train_set))
        self.cfg, self.device = cfg, device
        self.run = Run(cfg, device, resumable=RESUMABLE, inputs=fingerprints, end=last_step(cfg))
        self.raw = build_model(cfg).to(device)
        self.optimizer = build_adamw(self.raw, cfg, scaled=self.quantize.parameters(), scale=cfg.codebook_lr_scale)
        self.scaler = torch.amp.GradScaler(enabled=False)  # fp16 is not offered: coordinates need the range
        self.ema = EMA(self.raw, cfg.ema_decay) if cfg.ema else None
        self.restart = build_restart(cfg, self.raw.quantize.quantizer)
        self.drift = PaceMeter()
        self.kmeans_batches = kmeans_batches(cfg, max(1, int(cfg.global_batch_size * self.train_set.observed.mean())))
        self.resume({"model": self.raw, "ema": self.ema, "optimizer": self.optimizer, "drift": self.drift,
                     "restart": self.restart})
        if cfg.init_from and not self.run.start:
            self.begin_from(cfg.init_from, opened(cfg.init_from, load_structure_model))
        self.run.throughput = Throughput(cfg, device, float(self.train_set.observed.mean()), self._forward_once)
        self.model = replicate(self.raw, device)

    def _forward_once(self) -> None:
        """What a chain of mean length costs in FLOP."""
        length, model = max(2, round(float(self.train_set.observed.mean()))), self.raw
        coords = torch.zeros(1, length, 3, 3, device=self.device)
        valid = torch.ones(1, length, dtype=torch.bool, device=self.device)
        z = model.encoder(coords, valid, None, torch.arange(length, device=self.device))
        model.decoder.pair_logits(model.decoder(z, valid).hidden)

    def _open_data(self, cfg: TrainConfig) -> dict[str, str]:
        def opened(flag: str, path: str | None) -> StructureSet:
            try:
                return open_structures(path, max_bad=cfg.max_bad_structures, num_workers=cfg.num_workers,
                                       ideal_chains=cfg.ideal_chains, seed=cfg.global_seed, min_plddt=cfg.min_plddt,
                                       plddt_from=cfg.plddt_from)
            except (ValueError, OSError) as error:
                raise ValueError(f"{flag}: {error}") from error

        structures = opened("--data-path", cfg.data_path)
        val_structures = opened("--val-path", cfg.val_path) if cfg.val_path else structures
        chains = usable_chains(structures, min_length=cfg.min_length, max_length=cfg.max_length, overlong=cfg.overlong)
        clusters = None
        if cfg.clusters:
            clusters, unlisted = read_clusters(cfg.clusters, structures)
            distributed.print0(f"--clusters: {len(set(clusters))} clusters; {unlisted} of {len(structures)} chains are "
                               "not listed, each is one of its own")
        if cfg.val_path:
            train, val = chains.indices, usable_chains(
                val_structures, min_length=cfg.min_length, max_length=cfg.max_length, overlong=cfg.overlong).indices
        else:
            train, val = hold_out_entries(structures, chains.indices, cfg.val_fraction, cfg.global_seed, clusters)
        if not len(val):
            raise ValueError("no chain is held out for validation: give --val-path, or --val-fraction above 0")
        val = val[spread(len(val), cfg.val_size or len(val))]
        groups = members(clusters, train) if clusters and cfg.sample_by == "cluster" else None
        self.train_set = StructureDataset(structures, train, max_length=cfg.max_length, seed=cfg.global_seed,
                                          clusters=groups)
        self.val_set = StructureDataset(val_structures, val, max_length=cfg.max_length)
        watched = spread(len(val), PROBED)
        if not any(self.val_set[i]["coords"].isfinite().all((1, 2)).sum() >= 3 for i in watched):
            raise ValueError(f"validation could measure nothing: in their stretches of --max-length {cfg.max_length}, "
                             f"none of {len(watched)} held-out chains has 3 residues with N, CA and C; raise "
                             "--max-length, or name other structures by --val-path")
        distributed.print0(f"{len(train)} training and {len(val)} validation chains; left out: {chains.short} shorter "
                           f"than {cfg.min_length} residues, {chains.long} longer than {cfg.max_length}")
        return {"data_fingerprint": structures.fingerprint(), "val_fingerprint": val_structures.fingerprint()}

    # ------------------------------------------------------------------------------------------------- the method

    def train(self) -> None:
        """The curriculum of the paper, one optimizer step after another."""
        cfg, run, quantize = self.cfg, self.run, self.quantize
        self.raw.train()
        batches = self.batches(run.start, run.end)
        for step in run.steps():                    # seeds what the step draws; after it a checkpoint, where one is due
            quantize.set_step(step)                 # stage 1, 2 or 3, alpha (Eq. 3) and omega (Eq. 4)
            self.start_codebook(step)               # once, at needs_init: init_codebook by k-means (section 4.1)
            labels = self.position() | {"lr": learning_rate(cfg, step)}
            set_learning_rate(self.optimizer, labels["lr"])
            terms = self.train_step(batches, step)  # decodes z~ = alpha z + (1 - alpha) z_q (Eq. 2); updates once
            self.finish_step(step)                  # set_step(step + 1): the steps up to this one are done; averages
            run.log(terms, labels, derive=lambda row: self.with_pace(row["step"], code_usage(row)))
            with run.untimed():
                if run.due(cfg.val_every):
                    self.validate()
                self.save_stage_end(labels["stage"])
        run.finish(self.summary())

    def train_step(self, batches: Iterator[dict[str, Tensor]], step: int) -> dict[str, Tensor]:  # noqa: ARG002
        """-> unweighted terms, means over the micro-batches; code_counts.

        The quantizer's loss is a mean over tokens, the others over the chains that have any of what they measure: each
        is weighted by the micro-batch's share of those in the global batch, so that the gradient is that of the global
        batch however it is split. --losses-as-coded are means of a micro-batch, as StructTokenBench has them.
        """
        cfg, parts = self.cfg, self.cfg.gradient_accumulation_steps
        totals: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.device))
        together = [next(batches) for _ in range(parts)]
        counts = torch.stack([self._counted(batch) for batch in together])
        every = distributed.all_reduce_(counts.sum(0)).clamp_min(1)
        weights = (counts * (parts * distributed.world_size()) / every).float()  # of one micro-batch: exactly 1
        for part, batch in enumerate(together):
            with accumulating(self.model, part < parts - 1):
                with self.autocast():
                    out = self.model(batch["coords"], batch["mask"], batch["residue_index"], batch["places"])
                terms = structure_losses(out, batch["coords"], batch["sequence"], batch["residue_index"],
                                         as_coded=cfg.losses_as_coded)
                if not cfg.losses_as_coded:
                    terms = {name: share * terms[name] for name, share in zip(TERMS, weights[part, 1:], strict=True)}
                weighted = [weight * terms[name] for name, weight in loss_weights(cfg).items()]
                loss = torch.stack(weighted).sum() + weights[part, 0] * out.quantized.loss
                (loss / parts).backward()
            logged = {f"{name}_loss": value.detach() for name, value in terms.items()} | {"loss": loss.detach()}
            logged |= {f"{k}_loss": weights[part, 0] * out.quantized.losses.get(k, loss.new_zeros(()))
                       for k in ("codebook", "commit")}
            for name, value in logged.items():
                totals[name] = totals[name] + value / parts
        totals["grad_norm"] = update(self.optimizer, self.raw, self.scaler, cfg.max_grad_norm)
        return totals | {"code_counts": self.quantize.pop_counts()}

    def _counted(self, batch: dict[str, Tensor]) -> Tensor:
        """float64 (1 + terms,): what the losses of a micro-batch are means over, see train_step."""
        valid = self.raw.residues(batch["coords"], batch["mask"])
        chains = contributing_chains(valid, batch["sequence"], batch["residue_index"])
        return torch.stack([valid.sum(), *(chains[name] for name in TERMS)]).double()

    # --------------------------------------------------------------------------------------------------- data

    def batches(self, start: int, end: int) -> Iterator[dict[str, Tensor]]:
        cfg = self.cfg
        data = self.train_set
        sampler = StructureBatchSampler(
            data.lengths if data.clusters is None else [0] * len(data), cfg.global_batch_size, seed=cfg.global_seed,
            length_of=None if data.clusters is None else data.length, start_step=start, end_step=end,
            rank=distributed.rank(), world=distributed.world_size(), micro_batches=cfg.gradient_accumulation_steps,
        )
        yield from self._load(self.train_set, sampler)

    def _load(self, dataset: StructureDataset, batches: Any) -> Iterator[dict[str, Tensor]]:
        pin = self.device.type == "cuda"
        for batch in make_loader(dataset, batches, num_workers=self.cfg.num_workers, pin_memory=pin,
                                 collate=partial(packed, collate=collate, names=FED)):
            yield batch.to(self.device)

    # -------------------------------------------------------------------------------------- what is tokenized

    def latents(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        z, valid = self._latents(self.raw, batch)
        return z[valid], valid.sum(1).cpu()

    def _latents(self, model: StructureVQModel, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Latents (B, L, D) and the residues (B, L) that have one."""
        z = model.encode_latents(batch["coords"], batch["mask"], batch["residue_index"])
        return z, model.residues(batch["coords"], batch["mask"])

    def _val_batches(self, places: list[int]) -> Iterator[dict[str, Tensor]]:
        """Batches of similar lengths; which chain shares one with which changes nothing but the padding."""
        places = sorted(places, key=lambda place: self.val_set.lengths[place])
        size = self.run.micro_batch()
        yield from self._load(self.val_set, [[places[i] for i in rows] for rows in consecutive(len(places), size)])

    def _mine(self) -> list[int]:
        return list(range(distributed.rank(), len(self.val_set), distributed.world_size()))

    @torch.no_grad()
    def evaluate(self, model: StructureVQModel) -> dict[str, Any]:
        was_training = model.training
        model.eval()
        quantize = model.quantize
        meter = StructureMeter(quantize.num_codes, quantize.dim, self.device)
        for batch in self._val_batches(self._mine()):
            z, valid = self._latents(model, batch)
            out = quantize(z, valid)
            meter.add_chains(model.decode(out.quantized, valid).coords, batch["coords"], valid)
            known = out.indices is not None
            meter.codes.add(quantize.quantizer.latent(z[valid]), out.quantized[valid] if known else None,
                            out.indices[valid] if known else None)
        model.train(was_training)
        return meter.result(quantize.codebook() if quantize.has_codebook else None)

    def probe(self, model: StructureVQModel) -> Tensor:
        """Of 16 chains."""
        found = [self._latents(model, batch) for batch in self._probe_batches]
        return torch.cat([z[valid] for z, valid in found])

    @cached_property
    def _probe_batches(self) -> list[dict[str, Tensor]]:
        """Read once, looked at with every log row."""
        return list(self._val_batches(spread(len(self.val_set), PROBED)))

    def count_codes(self, model: StructureVQModel) -> Tensor:
        counts = torch.zeros(model.quantize.num_codes, dtype=torch.int64, device=self.device)
        for batch in self._val_batches(self._mine()):
            tokens = model.encode(batch["coords"], batch["mask"], batch["residue_index"])
            count_(counts, tokens)
        return distributed.all_reduce_(counts)

    def save_examples(self, model: StructureVQModel, stem: str) -> None:
        """RUN/structures/STEM/: a few chains as they are and as they come back, for a molecular viewer.

        mmCIF, which holds numbers and coordinates of any size. A chain that has nothing to show (a crop without a whole
        residue, a model that gives NaN) is left out with a note: looking must not end the training.
        """
        folder = self.run.folder / "structures" / stem
        folder.mkdir(parents=True, exist_ok=True)
        for place in spread(len(self.val_set), EXAMPLES):
            batch = next(self._load(self.val_set, [[place]]))
            z, valid = self._latents(model, batch)
            decoded = model.decode(model.quantize(z, valid).quantized, valid).coords
            decoded = torch.where(valid[..., None, None], decoded, torch.nan)
            for what, coords in (("target", batch["coords"]), ("decoded", decoded)):
                if coords.isfinite().all(-1).any():
                    _write(folder / f"{place:04d}_{what}.cif", coords[0], batch["residue_index"][0])
                else:
                    distributed.print0(f"note: {folder.name}: validation chain {place} ({what}) has no atoms to write")

    def summary(self) -> dict[str, Any]:
        return super().summary() | {"training_chains": len(self.train_set), "validation_chains": len(self.val_set)}


def _write(path: Path, backbone: Tensor, residue_index: Tensor) -> None:
    """backbone (L, 3, 3) of N, CA, C; the residues are called glycine, the model sees none of their side chains."""
    length = len(backbone)
    coords = torch.full((length, len(ATOMS), 3), torch.nan)
    coords[:, :3] = backbone
    write_structure(path, Chain(
        name=path.stem, chain_id="A", sequence="G" * length, coords=coords.numpy(),
        residue_numbers=residue_index.cpu().numpy() + 1, insertion_codes=("",) * length,
        bfactors=torch.full((length,), torch.nan).numpy()))


def main(argv: list[str] | None = None) -> None:
    def build(cfg: TrainConfig) -> Trainer:
        device = distributed.init(cfg.device)
        check(cfg, distributed.world_size())
        return Trainer(cfg, device)

    launch(PROG, lambda: parse_config(argv, __doc__), build)


if __name__ == "__main__":
    main()
