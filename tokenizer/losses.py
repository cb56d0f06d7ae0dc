"""Losses of the image tokenizer (VQGAN, Esser et al. 2021) as pure functions; the caller owns modules and optimizers.

    active = disc_active(step, config.disc_start)
    g = generator_loss(x, x_hat, discriminator=discriminator if active else None, ...)
    (g.total + out.loss).backward()           # out.loss: the quantizer's own, already weighted by the curriculum
    if active:
        d = discriminator_loss(discriminator, x, x_hat.detach(), kind="hinge", weight=0.8)

Every value is float32, whatever the autocast state and the dtype of x_hat. Images are (B, C, H, W) in [-1, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tokenizer.choices import ADVERSARIAL_LOSSES, RECONSTRUCTION_LOSSES
from tokenizer.discriminator import NLayerDiscriminator


def _hinge_d(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1.0 - real).mean() + F.relu(1.0 + fake).mean())


def _cross_entropy_d(real: Tensor, fake: Tensor) -> Tensor:
    # -log sigmoid(real) - log(1 - sigmoid(fake)). LlamaGen's "non-saturating" option hands BCE (target, logits) in the
    # wrong order, which leaves the fakes without a gradient; done right it is its "vanilla" option.
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def _hinge_g(fake: Tensor) -> Tensor:
    return -fake.mean()


def _non_saturating_g(fake: Tensor) -> Tensor:
    return F.softplus(-fake).mean()  # -log sigmoid(fake)


_RECONSTRUCTION = dict(zip(RECONSTRUCTION_LOSSES, (F.l1_loss, F.mse_loss), strict=True))
_DISCRIMINATOR = dict(zip(ADVERSARIAL_LOSSES, (_hinge_d, _cross_entropy_d, _cross_entropy_d), strict=True))
# VQGAN pairs the vanilla discriminator with -mean(D).
_GENERATOR = dict(zip(ADVERSARIAL_LOSSES, (_hinge_g, _hinge_g, _non_saturating_g), strict=True))


def disc_active(step: int, start: int) -> bool:
    """Whether the discriminator takes part in optimizer step `step`; before, nothing of it needs to be computed.

    step counts from 0, like ProVQ.set_step: the steps < step are done. start counts from 1, like LlamaGen's
    --disc-start: it is the number of the first step with a discriminator. So start = 20000 is active from step 19999
    on, and start 0 and 1 both mean always.
    """
    return step + 1 >= start


def reconstruction_loss(x: Tensor, x_hat: Tensor, kind: str = "l2") -> Tensor:
    """Mean squared ("l2") or mean absolute ("l1") error over all elements -> float32 []; ValueError: unknown kind."""
    return _pick(_RECONSTRUCTION, kind, "reconstruction")(x_hat.float(), x.float())


def generator_adversarial_loss(logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """How far the discriminator is from calling reconstructions real, any shape -> float32 []; ValueError: kind."""
    return _pick(_GENERATOR, kind, "generator")(logits_fake.float())


def discriminator_adversarial_loss(logits_real: Tensor, logits_fake: Tensor, kind: str = "hinge") -> Tensor:
    """Half the sum of the real and the fake term, any shapes -> float32 []; ValueError: unknown kind."""
    return _pick(_DISCRIMINATOR, kind, "discriminator")(logits_real.float(), logits_fake.float())


def adaptive_weight(reconstruction: Tensor, adversarial: Tensor, last_layer: Tensor) -> Tensor:
    """|d reconstruction / d last_layer| / (|d adversarial / d last_layer| + 1e-4) in [0, 1e4], detached float32 [].

    Balances the adversarial term against the reconstruction terms (VQGAN, Eq. 7). Both graphs stay alive for backward.
    Under several processes each uses the gradients of its own images, as VQGAN does.
    """
    norms = [torch.autograd.grad(loss, last_layer, retain_graph=True)[0].float().norm()
             for loss in (reconstruction, adversarial)]
    return (norms[0] / (norms[1] + 1e-4)).clamp(0.0, 1e4).detach()


class GeneratorLoss(NamedTuple):
    total: Tensor             # float32 [] with gradient; the quantizer's loss is not in it
    terms: dict[str, Tensor]  # float32 [] each, unweighted and detached, for logging


def generator_loss(
    x: Tensor,
    x_hat: Tensor,
    *,
    reconstruction: str = "l2",
    reconstruction_weight: float = 1.0,
    perceptual: nn.Module | None = None,                # perceptual.LPIPS; None: no perceptual term
    perceptual_weight: float = 1.0,
    discriminator: NLayerDiscriminator | None = None,   # unwrapped; None: no adversarial term (see disc_active)
    adversarial: str = "hinge",
    disc_weight: float = 0.5,
    adaptive_layer: Tensor | None = None,               # VQModel.last_layer: scale disc_weight by adaptive_weight
) -> GeneratorLoss:
    """Weighted sum of reconstruction, perceptual and adversarial terms for originals x and reconstructions x_hat.

    The discriminator gets no gradient and keeps its running statistics (NLayerDiscriminator.generator_pass).
    ValueError: unknown kind, or images that a network cannot take.
    """
    terms = {"reconstruction": reconstruction_loss(x, x_hat, reconstruction)}
    total = reconstruction_weight * terms["reconstruction"]
    if perceptual is not None:
        terms["perceptual"] = perceptual(x, x_hat).mean()
        total = total + perceptual_weight * terms["perceptual"]
    if discriminator is not None:
        with discriminator.generator_pass():
            terms["adversarial"] = generator_adversarial_loss(discriminator(x_hat), adversarial)
        weight: Tensor | float = disc_weight
        if adaptive_layer is not None:
            terms["adaptive_weight"] = adaptive_weight(total, terms["adversarial"], adaptive_layer)
            weight = disc_weight * terms["adaptive_weight"]
        total = total + weight * terms["adversarial"]
    return GeneratorLoss(total, {name: value.detach() for name, value in terms.items()})


class DiscriminatorLoss(NamedTuple):
    total: Tensor             # float32 [] with gradient
    terms: dict[str, Tensor]  # float32 [], detached: unweighted loss, mean logits


def discriminator_loss(
    discriminator: nn.Module, x: Tensor, x_hat: Tensor, *, kind: str = "hinge", weight: float = 0.5
) -> DiscriminatorLoss:
    """Loss of telling originals x from reconstructions x_hat; x_hat is detached here. discriminator may be DDP-wrapped.

    Real and fake batches go through one after the other, so BatchNorm sees each distribution by itself, as in LlamaGen.
    ValueError: unknown kind.
    """
    logits_real, logits_fake = discriminator(x), discriminator(x_hat.detach())
    loss = discriminator_adversarial_loss(logits_real, logits_fake, kind)
    means = {"logits_real": logits_real.float().mean(), "logits_fake": logits_fake.float().mean()}
    terms = {"discriminator": loss, **means}
    return DiscriminatorLoss(weight * loss, {name: value.detach() for name, value in terms.items()})


def _pick(table: dict[str, Callable], kind: str, what: str) -> Callable[..., Tensor]:
    if kind not in table:
        raise ValueError(f"unknown {what} loss {kind!r}; choose one of {', '.join(table)}")
    return table[kind]
