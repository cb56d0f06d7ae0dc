"""tokenizer/pixels.py against scikit-image's numbers (tests/golden) and against the definitions."""

import math

import numpy as np
import pytest
import torch
from places import GOLDEN

from tokenizer.pixels import from_uint8, mse, psnr, ssim, to_uint8

NUMBERS = GOLDEN / "misc_golden.npz"


@pytest.fixture(scope="module")
def golden():
    with np.load(NUMBERS) as data:
        return dict(data)


@pytest.fixture(scope="module")
def pair(golden):
    """The reconstruction and reference that the golden values belong to, (1, 3, 40, 40) in [0, 1]."""
    rec = torch.from_numpy(golden["rec_40"]).permute(2, 0, 1)[None].double() / 255
    ref = (torch.from_numpy(golden["norm_40"])[None].double() + 1) / 2
    return rec, ref


def random_batch(n=3, channels=3, height=19, width=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(n, channels, height, width, generator=g, dtype=torch.float64)
    noise = torch.randn(n, channels, height, width, generator=g, dtype=torch.float64)
    scale = torch.linspace(0.02, 0.3, n, dtype=torch.float64).view(n, 1, 1, 1)  # images of very different quality
    return x, (x + scale * noise).clamp(0, 1)


def test_psnr_matches_golden(golden, pair):
    torch.testing.assert_close(psnr(*pair, data_range=1.0).item(), golden["psnr"].item(), rtol=1e-6, atol=0)


def test_ssim_matches_golden_and_tells_the_data_range_apart(golden, pair):
    right, as_written = golden["ssim_correct_dr1"].item(), golden["ssim_as_written_dr2"].item()
    assert abs(right - as_written) > 1e-3
    assert ssim(*pair, data_range=1.0).item() == pytest.approx(right, abs=1e-6)
    assert ssim(*pair, data_range=2.0).item() == pytest.approx(as_written, abs=1e-6)


def test_ssim_matches_a_loop_over_windows():
    x, y = random_batch(n=1, channels=2, height=9, width=11)
    scores = []
    for c in range(2):
        for i in range(9 - 6):
            for j in range(11 - 6):
                a, b = (t[0, c, i : i + 7, j : j + 7].numpy().ravel() for t in (x, y))
                cov = np.cov(a, b)  # sample covariance
                luminance = (2 * a.mean() * b.mean() + 1e-4) / (a.mean() ** 2 + b.mean() ** 2 + 1e-4)
                scores.append(luminance * (2 * cov[0, 1] + 9e-4) / (cov[0, 0] + cov[1, 1] + 9e-4))
    assert ssim(x, y, 1.0).item() == pytest.approx(float(np.mean(scores)), abs=1e-12)


@pytest.mark.parametrize("metric", [lambda x, y: mse(x, y), lambda x, y: psnr(x, y, 1.0), lambda x, y: ssim(x, y, 1.0)])
def test_one_value_per_image_whatever_the_batch(metric):
    x, y = random_batch()
    together = metric(x, y)
    assert together.shape == (3,)
    assert together.dtype == torch.float64
    alone = torch.cat([metric(x[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_psnr_is_per_image_not_of_the_pooled_error():
    x, y = random_batch()
    values = psnr(x, y, 1.0)
    pooled = 10 * math.log10(1 / (x - y).square().mean().item())
    assert values.max() - values.min() > 5
    assert abs(values.mean().item() - pooled) > 1


def test_metrics_do_not_depend_on_the_pixel_scale():
    x, y = random_batch()
    bytes_x, bytes_y = (255 * x).round().to(torch.uint8), (255 * y).round().to(torch.uint8)
    unit_x, unit_y = bytes_x.double() / 255, bytes_y.double() / 255
    torch.testing.assert_close(psnr(bytes_x, bytes_y, 255), psnr(unit_x, unit_y, 1.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(ssim(bytes_x, bytes_y, 255), ssim(unit_x, unit_y, 1.0), rtol=1e-12, atol=0)
    torch.testing.assert_close(psnr(2 * unit_x - 1, 2 * unit_y - 1, 2.0), psnr(unit_x, unit_y, 1.0), rtol=1e-12, atol=0)


def test_identical_images():
    x, y = random_batch()
    y[1] = x[1]
    assert psnr(x, y, 1.0).isinf().tolist() == [False, True, False]
    assert ssim(x, y, 1.0)[1].item() == 1.0
    assert mse(x, y)[1].item() == 0.0


def test_to_uint8_matches_golden(golden):
    pix_in = torch.from_numpy(golden["pix_in"])
    assert np.array_equal(to_uint8(pix_in).numpy(), golden["pix_out"])


def test_to_uint8_inverts_normalised_bytes():
    every_byte = torch.arange(256, dtype=torch.uint8)
    normalised = every_byte.float() / 255 * 2 - 1
    assert torch.equal(to_uint8(normalised), every_byte)
    # Only the rounding of a bfloat16 input may show, not bfloat16 arithmetic on it.
    half = normalised.bfloat16()
    assert torch.equal(to_uint8(half), to_uint8(half.float()))
    with pytest.raises(ValueError, match=r"uint8"):
        to_uint8(every_byte)
    assert torch.equal(to_uint8(from_uint8(every_byte)), every_byte)
    with pytest.raises(ValueError, match=r"bytes of images, got torch.float32"):
        from_uint8(normalised)


@pytest.mark.parametrize("metric", [mse, lambda x, y: psnr(x, y, 1.0), lambda x, y: ssim(x, y, 1.0)])
def test_shapes_that_do_not_fit(metric):
    x = torch.zeros(2, 3, 8, 8)
    with pytest.raises(ValueError, match=r"\(2, 3, 8, 8\) and \(1, 3, 8, 8\)"):  # would broadcast
        metric(x, x[:1])
    with pytest.raises(ValueError, match=r"\(3, 8, 8\)"):
        metric(x[0], x[0])


def test_too_small_for_the_window():
    x = torch.zeros(1, 1, 6, 20)
    with pytest.raises(ValueError, match=r"7x7 pixels, got 6x20"):
        ssim(x, x, 1.0)
    assert ssim(torch.zeros(1, 1, 7, 7), torch.zeros(1, 1, 7, 7), 1.0).item() == 1.0


@pytest.mark.parametrize("metric", [psnr, ssim])
@pytest.mark.parametrize("data_range", [0.0, -1.0, math.nan])
def test_data_range_must_be_positive(metric, data_range):
    x = torch.zeros(1, 1, 8, 8)
    with pytest.raises(ValueError, match="data_range"):
        metric(x, x, data_range)
