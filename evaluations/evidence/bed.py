"""The bed that arms are compared on: an autoencoder of images, mean squared error, Adam at a constant learning rate.
A setting may add a discriminator.

A run is a function of (arm, setting, seed): weights, batches and codes are drawn from the seed alone, so that runs of
one seed are pairs. Sizes: B images, S pixels, N tokens, D latent channels, K codes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evaluations.distribution import frechet_distance, gaussian_statistics
from evaluations.evidence.arm_quantizers import make_provq
from evaluations.evidence.arms import ADAPTIVE_CHECKS, KINDS, RESTART_BELOW, Arm
from evaluations.evidence.setting import DISC_MIN_IMAGE_SIZE, DISC_SIZES, MODELS, Setting
from evaluations.features import Extractor, open_extractor
from evaluations.image_sets import in_colour
from tokenizer.code_meter import effective_rank, mean_pairwise_distance, moved, second_moments, spread
from tokenizer.data import ImageDataset, split_holdout
from tokenizer.discriminator import NLayerDiscriminator
from tokenizer.image_names import to_line
from tokenizer.image_readers import FileImages
from tokenizer.image_sources import open_images
from tokenizer.losses import disc_active, discriminator_loss, generator_loss
from tokenizer.pixels import from_uint8, mse, psnr, ssim, to_uint8
from tokenizer.provq import VectorQuantizer, code_statistics
from tokenizer.provq_codes import RESTART_EVERY, DeadCodeRestart
from tokenizer.runtime.checkpoint import load_file
from tokenizer.runtime.files import atomic_write, require_writable
from tokenizer.runtime.parsing import parsing
from tokenizer.runtime.seeding import fold
from tokenizer.vq_model import Decoder, Encoder

assert NLayerDiscriminator(3, **DISC_SIZES).min_image_size == DISC_MIN_IMAGE_SIZE
BETAS = (0.9, 0.95)  # of Adam
PROBE = 256  # further held-out images: traces and the adaptive warm-up look at these, never at those that are scored
CHUNK = 250  # images at a time where nothing is trained
WEIGHTS, CODES, DRAWS, DISCRIMINATOR = range(4)  # what is drawn from a seed
DISC_WEIGHT = 0.5  # of the adversarial loss, in units of the pixel loss's gradient at the last layer (VQGAN, Eq. 7)


class Diverged(ArithmeticError):
    """A run that cannot go on, or whose scores would mean nothing."""


def with_features(setting: Setting, which: str | None) -> Setting:
    """setting that scores rFID too, in the features of an extractor; None: as it is. FileNotFoundError, ValueError."""
    return dataclasses.replace(setting, features=open_extractor(which).sha256) if which else setting


# ------------------------------------------------------------------------------------------------------- images

def prepare(path: Path, setting: Setting, folder: Path) -> Path:
    """Decode the images of `path` at the setting's size, once: a memory-mappable uint8 array (n, 3, S, S) in folder.

    ValueError: too few images, or some cannot be read; a damaged array, or a folder that takes none. OSError: no such
    file.
    """
    key = json.dumps([str(path.resolve()), *_stamps(path), setting.image_size])
    cache = folder / f"images-{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"
    if not cache.exists():
        require_writable(folder, "--cache")
        source = open_images(str(path), channels=3)
        images = ImageDataset(source, setting.image_size)
        pixels = np.empty((len(images), 3, setting.image_size, setting.image_size), dtype=np.uint8)
        unread = list(source.damaged)
        for i in range(len(images)):
            item = images[i]
            pixels[i] = item["image"].numpy()
            unread += item["bad"][:1]  # whose place another image takes
        if unread:
            raise ValueError(f"{path}: {len(unread)} images cannot be read, such as {to_line(unread[0])}; mend or "
                             "remove them: in a comparison another must not take their place")
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(cache, lambda file: np.save(file, pixels))
    with parsing(cache, "a damaged array of images; remove it"):
        count = len(np.load(cache, mmap_mode="r"))
    if count <= setting.held_out + PROBE:
        raise ValueError(f"--held-out {setting.held_out} and {PROBE} to look at, of {count} images in {path}, leave "
                         "none to train on")
    return cache


def _stamps(path: Path) -> list[tuple[int, int]]:
    """Sizes and times of the files in which the images of `path` are."""
    files = [path]
    if path.is_dir() or path.suffix.lower() in (".txt", ".csv"):
        source = open_images(str(path), channels=3)
        files += [Path(source.root, name) for name in source.names] if isinstance(source, FileImages) else sorted(
            path.rglob("*"))
    return [(stat.st_size, stat.st_mtime_ns) for stat in (file.stat() for file in files if file.exists())]


def pixels_sha256(cache: Path) -> str:
    """Of a prepared array, 16 hex digits: results say which images they are of, whatever file has these."""
    return hashlib.sha256(np.load(cache, mmap_mode="r")).hexdigest()[:16]


class Images:
    """The three parts of a prepared array. Parts are (n, 3, S, S) uint8; `floats` are what the model sees."""

    def __init__(self, cache: Path, held_out: int):
        self.pixels = np.load(cache, mmap_mode="r")  # processes share its memory
        training, apart = split_holdout(len(self.pixels), held_out + PROBE, seed=0)
        mixed = np.argsort([fold(1, int(i)) for i in apart])  # `apart` is sorted, and images may be sorted by class
        self.training, self.probe, self.held_out = training, apart[mixed[:PROBE]], apart[mixed[PROBE:]]

    def floats(self, indices: np.ndarray) -> Tensor:
        """indices (n,) -> images (n, 3, S, S) float32 in [-1, 1]."""
        return from_uint8(torch.from_numpy(self.pixels[indices]))

    def batch(self, size: int, generator: torch.Generator) -> Tensor:
        return self.floats(self.training[torch.randint(len(self.training), (size,), generator=generator).numpy()])


# -------------------------------------------------------------------------------------------------------- model

class Autoencoder(nn.Module):
    """Images (B, 3, S, S) in [-1, 1] -> latents (B, D, h, w), and back."""

    def __init__(self, setting: Setting):
        super().__init__()
        architecture = MODELS[setting.model]
        self.encoder, self.decoder = Encoder(architecture, 3, 0.0), Decoder(architecture, 3, 0.0)
        self.before = nn.Conv2d(architecture.z_channels, setting.dim, 1)
        self.after = nn.Conv2d(setting.dim, architecture.z_channels, 1)

    def encode(self, x: Tensor) -> Tensor:
        return self.before(self.encoder(x))

    def decode(self, z: Tensor) -> Tensor:
        return self.decoder(self.after(z))


def tokens(z: Tensor) -> Tensor:
    """(B, D, h, w) -> (B h w, D)."""
    return z.movedim(1, -1).flatten(0, -2)


def recluster_steps(arm: Arm, setting: Setting) -> set[int]:
    """Steps at which codes are set once more. ValueError: there are no codes then, or they never are."""
    first = {"warmup": setting.warmup_steps, "provq": setting.warmup_steps,
             "adaptive": setting.discrete_from}.get(arm.curriculum, 0)
    if first >= setting.steps:
        raise ValueError(f"--steps {setting.steps} end before the warm-up of {first} steps has, and there are no codes")
    if arm.recluster and setting.discrete_from in arm.recluster_at:
        raise ValueError(f"--recluster-at {setting.discrete_from} is where the transition ends: there is that already")
    steps = {*arm.recluster_at, *([setting.discrete_from] if arm.recluster else [])}
    for step in sorted(steps):
        if step >= setting.steps:
            raise ValueError(f"re-clustering at step {step} of {setting.steps} never comes: give the setting more "
                             "steps, or shorter stages")
        if first and step <= first:
            raise ValueError(f"re-clustering at step {step} is not after the warm-up of {first} steps, when codes are "
                             "first set: give a later step, or a transition")
    return steps


def require_trainable(name: str, arm: Arm, setting: Setting) -> None:
    """ValueError, with the arm's name: the setting is not for it, its numbers make no sense, a package is missing."""
    try:
        recluster_steps(arm, setting)
        make_provq(arm, setting.num_codes, setting.dim, setting.warmup_steps, setting.transition_steps)
    except (ValueError, ImportError) as error:
        raise ValueError(f"arm {name}: {error}") from error


class Trainer:
    """One run. `run()` returns its metrics and its trace, JSON-able."""

    def __init__(self, arm: Arm, setting: Setting, seed: int, images: Images, extractor: Extractor | None = None):
        """extractor: the one that setting.features names. ValueError: the arm needs more steps than the setting has, or
        other sizes; another extractor."""
        if (extractor.sha256 if extractor else None) != setting.features:
            raise ValueError(f"the extractor of this setting has the hash {setting.features}, not "
                             f"{extractor.sha256 if extractor else None}")
        self.arm, self.setting, self.seed, self.images, self.extractor = arm, setting, seed, images, extractor
        self.kind = KINDS[arm.quantizer]
        self.recluster_steps = recluster_steps(arm, setting)
        torch.manual_seed(fold(seed, WEIGHTS))
        self.model = Autoencoder(setting)  # equal in all arms of a seed
        torch.manual_seed(fold(seed, CODES))
        self.provq = make_provq(arm, setting.num_codes, setting.dim, setting.warmup_steps, setting.transition_steps)
        quantizer = list(self.provq.parameters())
        codes = quantizer if self.kind.trained else []  # projections of a grid are as fast as the rest
        others = [*self.model.parameters(), *([] if codes else quantizer)]
        groups: list[dict[str, Any]] = [{"params": others}, {"params": codes, "lr": arm.lr * arm.code_lr_scale}]
        self.optimizer = torch.optim.Adam([group for group in groups if group["params"]], arm.lr, BETAS)
        self.discriminator: NLayerDiscriminator | None = None
        if setting.disc_start is not None:
            torch.manual_seed(fold(seed, DISCRIMINATOR))
            self.discriminator = NLayerDiscriminator(3, **DISC_SIZES)
            self.disc_optimizer = torch.optim.Adam(self.discriminator.parameters(), arm.lr, BETAS)
        self.batches = torch.Generator().manual_seed(fold(seed, DRAWS))
        self.restart: DeadCodeRestart | None = None
        if arm.restart:
            assert isinstance(self.provq.quantizer, VectorQuantizer)  # what make_provq makes of an arm with a table
            self.restart = DeadCodeRestart(self.provq.quantizer, RESTART_BELOW)
        self.trace: list[dict[str, float]] = []
        self.reference: tuple[Tensor, Tensor] | None = None  # latents of the probe and codes, as last set

    # --------------------------------------------------------------------------------------------------- training

    def run(self, warmups: Path | None = None) -> dict[str, Any]:
        """warmups: folder where runs that share seed and warm-up leave its result to one another.

        Diverged: the loss or the latents are not finite.
        """
        began, first = time.process_time(), self._warm_up(warmups)
        if self.restart:
            self.restart.steps = first % RESTART_EVERY  # of a warm-up that was taken over as well
        for step in range(first, self.setting.steps):
            self._step(step)
        self.provq.set_step(self.setting.steps)
        self._look(self.setting.steps)
        metrics = self.score()
        return {"metrics": metrics, "trace": self.trace, "first_step": first,
                "seconds": round(time.process_time() - began, 2)}

    def _warm_up(self, folder: Path | None) -> int:
        """Do the warm-up, or take it over from another run of the same; -> the step to go on from.

        Its steps are the same whatever the quantizer, bit for bit, but for unit norm of its latents: nothing else of it
        is called, and it is forgotten afterwards.
        """
        setting, last = self.setting, self.setting.warmup_steps
        if folder is None or not last or self.arm.curriculum not in ("warmup", "provq") or self._adversarial(last - 1):
            return 0
        shared = dataclasses.asdict(dataclasses.replace(setting, num_codes=1, transition_steps=0, latents_per_code=1,
                                                        disc_start=None, features=None))
        of_all = [shared, self.seed, self.arm.lr, self.provq.quantizer.l2_norm]
        key = hashlib.sha256(json.dumps(of_all, sort_keys=True).encode()).hexdigest()[:16]
        path = folder / f"warmup-{key}.pt"
        parameters = list(self.model.parameters())
        if not path.exists():
            for step in range(last):
                self._step(step)
            state = {"model": self.model.state_dict(), "batches": self.batches.get_state(), "trace": self.trace,
                     "adam": [self.optimizer.state[p] for p in parameters]}
            atomic_write(path, lambda file: torch.save(state, file))
            return last
        done = load_file(path)
        self.model.load_state_dict(done["model"])
        self.batches.set_state(done["batches"])
        self.trace = done["trace"]
        for parameter, moments in zip(parameters, done["adam"], strict=True):
            self.optimizer.state[parameter] = moments
        return last

    def _adversarial(self, step: int) -> bool:
        return self.setting.disc_start is not None and disc_active(step, self.setting.disc_start)

    def _step(self, step: int) -> None:
        setting, provq = self.setting, self.provq
        provq.set_step(step)
        if provq.adaptive and provq.stage == 1 and step % max(1, setting.discrete_from // ADAPTIVE_CHECKS) == 0:
            provq.observe(self._probe()["psnr"])
        if provq.needs_init:
            self._set_codes(provq.init_codebook, step, seed=self.seed)
        elif step == 0 and provq.stage > 1:
            if self.kind.from_latents or self.arm.from_latents:
                self._set_codes(provq.init_codebook, step, iters=0, start="random", seed=self.seed)
            else:
                self._refer()
        if step in self.recluster_steps:
            self._look(step)
            self._set_codes(provq.recluster, step, seed=fold(self.seed, step))
        if step % max(1, setting.steps // 6) == 0:
            self._look(step)

        x = self.images.batch(setting.batch_size, self.batches)
        z = self.model.encode(x)
        out = provq(z)
        y = self.model.decode(out.quantized)
        discriminator = self.discriminator if self._adversarial(step) else None
        loss = out.loss + generator_loss(x, y, discriminator=discriminator, disc_weight=DISC_WEIGHT,
                                         adaptive_layer=self.model.decoder.conv_out.weight).total
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss is {loss.item()} at step {step}")
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        if discriminator:
            self.disc_optimizer.zero_grad()
            discriminator_loss(discriminator, x, y, weight=1.0).total.backward()
            self.disc_optimizer.step()
        if self.restart and step + 1 < setting.steps:
            self.restart.step([self.optimizer])

    @torch.no_grad()
    def _latents(self, step: int) -> Tensor:
        """latents_per_code x K latents (N, D) of training images, drawn for this step alone."""
        setting = self.setting
        per_image = (setting.image_size // MODELS[setting.model].downsample) ** 2
        generator = torch.Generator().manual_seed(fold(self.seed, DRAWS, step))
        wanted = -(-setting.latents_per_code * setting.num_codes // per_image)
        parts = [tokens(self.model.encode(self.images.batch(min(CHUNK, wanted - done), generator)))
                 for done in range(0, wanted, CHUNK)]
        latents = torch.cat(parts)
        _require_finite(latents, step)
        return latents

    def _set_codes(self, place: Callable[..., object], step: int, **options: Any) -> None:
        """To k-means of latents as they are at this step, or what options say. Diverged: the latents are no good."""
        latents = self._latents(step)
        try:
            place(latents, optimizers=[self.optimizer], **options)
        except ValueError as error:  # such as of an encoder that has collapsed
            raise Diverged(f"step {step}: {error}") from error
        self._refer()

    # -------------------------------------------------------------------------------------------------- measuring

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.model.eval(), self.provq.eval()
        with torch.no_grad():
            yield
        self.model.train(), self.provq.train()

    def _forward(self, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Any]]:
        """Images, latents (B, D, h, w) and what ProVQ makes of them, in chunks, in eval(). Diverged: latents that are
        not finite."""
        with self._evaluating():
            for i in range(0, len(indices), CHUNK):
                x = self.images.floats(indices[i : i + CHUNK])
                z = self.model.encode(x)
                _require_finite(z, int(self.provq.step))
                yield x, z, self.provq(z)

    def _probe(self) -> dict[str, Any]:
        """PSNR of the probe, its latents (N, D) and the uses of each code (K,)."""
        quality, latents, counts = [], [], torch.zeros(self.setting.num_codes, dtype=torch.int64)
        for x, z, out in self._forward(self.images.probe):
            quality.append(psnr(self.model.decode(out.quantized).clamp(-1, 1), x, data_range=2.0))
            latents.append(self.provq.quantizer.latent(tokens(z)))
            if out.indices is not None:
                counts += torch.bincount(out.indices.flatten(), minlength=len(counts))
        return {"psnr": torch.cat(quality).mean().item(), "latents": torch.cat(latents), "counts": counts}

    def _codes(self) -> Tensor:
        return self.provq.codebook().detach().clone()

    def _refer(self) -> None:
        """From now on, traces say how far latents and codes moved since now."""
        self.reference = (self._probe()["latents"], self._codes())

    def _look(self, step: int) -> None:
        """Append a line to the trace: of the probe, in units of a latent channel."""
        probe = self._probe()
        line = {"step": step, "psnr": probe["psnr"],
                "latent_spread": spread(probe["latents"])}
        if self.provq.has_codebook:
            line |= {"codes_used": int((probe["counts"] > 0).sum()), **code_statistics(probe["counts"])}
        if self.reference and self.kind.table:
            codes = self._codes()
            line |= {"code_spread": spread(codes), "latents_moved": moved(self.reference[0], probe["latents"]),
                     "codes_moved": moved(self.reference[1], codes)}
        self.trace.append(_finite(line))

    def score(self) -> dict[str, float]:
        """Metrics of the held-out images. PSNR (dB), SSIM and MSE are means over images, of pixels in [-1, 1]; rfid is
        the Fréchet distance of the extractor's pooled features of reconstructions from those of the images. Latents
        that are all equal have no relative_error. Diverged: something is not finite."""
        quality: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "mse": []}
        features: tuple[list[Tensor], list[Tensor]] = ([], [])
        counts = torch.zeros(self.setting.num_codes, dtype=torch.int64)
        moments, error, count = torch.zeros(self.setting.dim + 1, self.setting.dim + 1, dtype=torch.float64), 0.0, 0
        for x, z, out in self._forward(self.images.held_out):
            y = self.model.decode(out.quantized).clamp(-1, 1)
            quality["psnr"].append(psnr(y, x, data_range=2.0))
            quality["ssim"].append(ssim(y, x, data_range=2.0))
            quality["mse"].append(mse(y, x))
            if self.extractor:
                for kept, pixels in zip(features, (x, y), strict=True):
                    kept.append(self.extractor(in_colour(to_uint8(pixels))).pooled)
            counts += torch.bincount(out.indices.flatten(), minlength=len(counts))
            latent = self.provq.quantizer.latent(tokens(z))
            moments += second_moments(latent)
            error += (tokens(out.quantized) - latent).square().sum(dtype=torch.float64).item()
            count += latent.numel()
        metrics = {name: torch.cat(values).mean().item() for name, values in quality.items()}
        metrics |= {"codes_used": int((counts > 0).sum()), **code_statistics(counts)}
        if self.extractor:
            metrics["rfid"] = frechet_distance(*(gaussian_statistics(torch.cat(kept)) for kept in features))
        mean = moments[0, 1:] / moments[0, 0]
        variance = max(0.0, (moments.diagonal()[1:] / moments[0, 0] - mean.square()).mean().item())  # but for rounding
        metrics |= {"effective_rank": effective_rank(moments), "latent_spread": math.sqrt(variance)}
        if self.kind.table:
            codes = self._codes()
            metrics |= {"code_spread": spread(codes), "code_distance": mean_pairwise_distance(codes)}
            if variance > 0:
                metrics["relative_error"] = error / count / variance  # of what a token's code leaves, to their variance
        return _finite(metrics)


def _finite(numbers: dict[str, float]) -> dict[str, float]:
    """numbers. Diverged, naming it: one is not finite."""
    for name, value in numbers.items():
        if not math.isfinite(value):
            raise Diverged(f"{name} is {value}")
    return numbers


def _require_finite(latents: Tensor, step: int) -> None:
    if not latents.isfinite().all():
        raise Diverged(f"the latents are not finite at step {step}")
