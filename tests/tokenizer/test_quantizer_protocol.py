"""What ProVQ asks of a quantizer: quantizers of somebody else, with the required methods only and with all of them."""

import pytest
import torch

from tokenizer import provq
from tokenizer.provq import Curriculum, ProVQ


def _normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Minimal(torch.nn.Module):
    """A quantizer with no more than ProVQ.REQUIRED and a forward."""

    def __init__(self, num_codes: int = 16, dim: int = 4):
        super().__init__()
        self.num_codes, self.dim = num_codes, dim
        self.codes = torch.nn.Parameter(_normal(num_codes, dim))

    def codebook(self):
        return self.codes

    def set_codebook_(self, centroids, counts):
        assert int(counts.sum()) == 40
        self.codes.copy_(centroids)

    def latent(self, x):
        return x

    def lookup(self, indices):
        return self.codes[indices]

    def forward(self, x):
        indices = provq.nearest_code(x, self.codes)
        commit = (x - self.codes[indices]).square().mean()
        return provq.Quantized(self.codes[indices] + x - x.detach(), indices, {"commit": commit})


def test_a_quantizer_of_somebody_else_needs_the_required_names_only():
    for name in ProVQ.REQUIRED:
        lacking = type("Lacking", (torch.nn.Module,), {n: None for n in ProVQ.REQUIRED if n != name})()
        with pytest.raises(TypeError, match=f"Lacking lacks {name}, which ProVQ needs"):
            ProVQ(lacking, Curriculum(0, 0))
    model = ProVQ(Minimal(), Curriculum(1, 1), channel_dim=-1)
    optimizer = torch.optim.Adam(model.parameters())
    model(_normal(40, 4)).loss.backward()
    optimizer.step()
    for step in range(1, 4):
        model.set_step(step)  # it has no update_
        if model.needs_init:
            info = model.init_codebook(_normal(40, 4), seed=2, optimizers=[optimizer])
            expected = provq.kmeans(_normal(40, 4), 16, seed=2)
            assert torch.equal(model.codebook(), expected.centroids)
            assert info == expected.info()
            assert not optimizer.state
        out = model(_normal(40, 4, seed=step))
        out.loss.backward()
    assert torch.equal(model.encode(_normal(40, 4, seed=step)), out.indices)


def test_hooks_of_a_quantizer_come_before_the_defaults():
    class Hooked(Minimal):
        def output(self, latent):
            return -latent

        def fit_codebook_(self, x, **options):
            return {"tokens": len(x), **options}

        def codebook_parameters(self):
            return []

        def update_(self):
            self.updates = getattr(self, "updates", 0) + 1

    model = ProVQ(Hooked(), Curriculum(1, 1), channel_dim=-1)
    optimizer = torch.optim.Adam(model.parameters())
    x = _normal(40, 4)
    out = model(x)
    assert torch.equal(out.quantized, -x)
    out.loss.backward()
    optimizer.step()
    model.set_step(1)
    info = model.init_codebook(x, iters=7, optimizers=optimizer)
    assert info == {"tokens": 40, "iters": 7, "start": "kmeans++", "seed": 0, "order": None}
    assert len(optimizer.state) == 1
    model.set_step(2)
    model.set_step(3)
    assert model.quantizer.updates == 2
    assert isinstance(model.quantizer.codebook_parameters(), list)


def test_an_incomplete_quantizer_of_the_protocol_is_refused_by_name():
    class Incomplete(torch.nn.Module, provq.Quantizer):
        def codebook(self):
            return torch.zeros(2, 2)

    with pytest.raises(TypeError, match=r"abstract.*latent.*lookup.*set_codebook_"):
        Incomplete()


def test_codes_of_a_quantizer_on_the_sphere_are_clustered_there():
    class Spherical(Minimal):
        l2_norm = True

        def latent(self, x):
            return torch.nn.functional.normalize(x, dim=1)

    model = ProVQ(Spherical(), Curriculum(0, 1), channel_dim=-1)
    model.init_codebook(_normal(40, 4), seed=2)
    latents = model.quantizer.latent(_normal(40, 4))
    assert torch.equal(model.codebook(), provq.kmeans(latents, 16, seed=2, spherical=True).centroids)
    assert not torch.equal(model.codebook(), provq.kmeans(latents, 16, seed=2).centroids)
