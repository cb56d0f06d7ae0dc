"""Deadlock meters: what premature discretization (section 3 of the paper) does to latents and codes, in numbers.

They take anybody's latents, of any tokenizer: N tokens, D channels, K codes, tensors of any float dtype and device;
they compute in float64 and return Python floats. `tokenizer.code_meter` has the meters that a training run of a
tokenizer logs too: `drift` of codes and latents, `second_moments` + `effective_rank`; `tokenizer.provq`
`code_statistics`.

The deadlock reads: the gap is closed by the latents (contraction > pursuit), codes hardly drift, edges bend inwards.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from tokenizer.provq import nearest_code

TINY = 1e-30  # keeps 0 / 0 at 0: a ratio of sums of squares


@torch.no_grad()
def quantization_gap(latents: Tensor, codebook: Tensor) -> float:
    """Sum_n |z_n - e_n|^2 / sum_n |z_n - mean z|^2, e_n the nearest code: share of the latents' variance that is lost.

    latents (N, D), codebook (K, D). 0: every latent sits on its code. 1: codes say no more than the mean latent does.
    Above 1: worse than that, as when codes start as a speck beside the latents. 0 if all latents are one point.
    """
    z = latents.double()
    lost = (z - codebook.double()[nearest_code(latents, codebook)]).square().sum()
    return (lost / (z - z.mean(0)).square().sum().clamp_min(TINY)).item()


class Closing(NamedTuple):
    """Who closes the gap between latents and codes; see `closing`."""

    contraction: float  # share of the way to its code that a latent goes
    pursuit: float  # share of the way to its latents that a code goes


@torch.no_grad()
def closing(latents: Tensor, codebook: Tensor, latents_after: Tensor, codebook_after: Tensor) -> Closing:
    """Shares of the gap that latents and codes close during an interval of training.

    latents and latents_after (N, D) are the same inputs before and after, codebook and codebook_after (K, D) likewise.
    With e_n the nearest code of z_n before, and ' for after,

        contraction = sum_n <z'_n - z_n, e_n - z_n> / sum_n |e_n - z_n|^2
        pursuit     = sum_n <e'_n - e_n, z_n - e_n> / sum_n |e_n - z_n|^2

    Contraction 1: latents jumped onto their codes; 0: they moved, if at all, at right angles; negative: away. Pursuit
    is the same for codes: one k-means iteration is the largest that still shortens the gap by all that codes can.
    Motion that latents and codes share (the latent space drifts or grows) enters with opposite signs. Both are 0
    where there was no gap.
    """
    index = nearest_code(latents, codebook)
    z, e = latents.double(), codebook.double()[index]
    gap = e - z
    size = gap.square().sum().clamp_min(TINY)
    return Closing(
        contraction=(((latents_after.double() - z) * gap).sum() / size).item(),
        pursuit=(((e - codebook_after.double()[index]) * gap).sum() / size).item(),
    )


class Bending(NamedTuple):
    """What is left of straight edges; see `edge_bending`."""

    inward: float  # in edge lengths; positive: towards the centre
    kept: float  # in [0, 1]


@torch.no_grad()
def edge_bending(edges: Tensor) -> Bending:
    """How the latent image of a polygon's outline bends: the inward-warped edges of Figure 3 (section 5.1.1).

    edges (E, P, D): the encoder's images of P >= 2 points in order along each of E straight edges, corners included.
    The chord of an edge joins the images of its corners; c is the mean of all points. With h(p) the component of p's
    offset from its chord along the unit normal that points to c,

        inward = mean over points of h / mean chord length
        kept   = sum of chord lengths / sum of arc lengths

    An affine map, however it shears, gives (0, 1). inward: 2/3 of the depth of a shallow parabolic dent, negative for
    bulges. kept falls with every detour, to whichever side; it is 0 if the corners coincide. ValueError: shape.
    """
    if edges.ndim != 3 or edges.shape[1] < 2:
        raise ValueError(f"edges must be (edges, points >= 2, D), got {tuple(edges.shape)}")
    p = edges.double()
    start, chord = p[:, :1], p[:, -1:] - p[:, :1]  # (E, 1, D)
    length = chord.norm(dim=2, keepdim=True)  # (E, 1, 1)
    along = chord / length.clamp_min(TINY)
    mean_length = length.mean().clamp_min(TINY)

    def off_chord(v: Tensor) -> Tensor:
        return v - (v * along).sum(2, keepdim=True) * along

    normal = off_chord(p.mean((0, 1)) - start)
    normal = normal / normal.norm(dim=2, keepdim=True).clamp_min(TINY)
    inward = (off_chord(p - start) * normal).sum(2).mean() / mean_length
    arc = (p[:, 1:] - p[:, :-1]).norm(dim=2).sum()
    return Bending(inward.item(), (length.sum() / arc.clamp_min(TINY)).item())


@torch.no_grad()
def spread(points: Tensor) -> float:
    """RMS distance of points (N, D) to their mean, in the units of the latent space."""
    p = points.double()
    return (p - p.mean(0)).square().sum(1).mean().sqrt().item()
