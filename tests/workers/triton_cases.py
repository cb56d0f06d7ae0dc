"""Runs provq_triton.nearest under Triton's interpreter on random shapes, against float64. A program of its own, for
TRITON_INTERPRET must be set before Triton is imported:

    TRITON_INTERPRET=1 python tests/workers/triton_cases.py CASES    # one line: how many cases, how many tokens
"""

import random
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from tokenizer import provq, provq_triton

EDGES = [(1, 1, 1), (1, 128, 8), (1, 129, 256), (32, 127, 16), (33, 2048, 17), (65, 2049, 8), (2, 6000, 8)]


def exact(x, codes):
    """Distances (N, K) float64 less |x|^2."""
    return codes.double().square().sum(1) - 2 * x.double() @ codes.double().t()


def check(tokens, num_codes, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    x, codes = (torch.randn(n, channels, generator=generator) for n in (tokens, num_codes))
    codes[num_codes // 2 :: 7] = codes[num_codes // 3].clone()  # equal codes, far from each other,
    x[::2] = codes[num_codes // 2] + 0.01 * x[::2]              # that half of the tokens choose
    value, index = provq_triton.nearest(x, codes, codes.square().sum(1))
    assert value.shape == index.shape == (tokens,)
    assert index.dtype == torch.int64
    assert value.dtype == torch.float32
    wanted = exact(x, codes)
    found = wanted.gather(1, index[:, None])[:, 0]
    error = 1e-5 * (1 + codes.square().sum(1).max().item() + x.square().sum(1))
    assert bool((found <= wanted.amin(1) + error).all()), "not the nearest"
    assert bool(((value - found).abs() <= error).all()), "not its distance"
    if channels <= provq_triton.FEW_CHANNELS:  # summed in one order for every code, so that equals stay equal
        equal = (codes[None] == codes[index][:, None]).all(2).int().argmax(1)  # the first that equals the one found
        assert torch.equal(equal, index), "of equals not the first"


def check_equals(tokens, num_codes, channels, seed):
    """Of equals the first, where float32 is exact: with many channels the interpreter's product is the CPU's, whose
    rounding may depend on the place of a column."""
    generator = torch.Generator().manual_seed(seed)
    x, codes = (torch.randint(-64, 65, (n, channels), generator=generator) / 16 for n in (tokens, num_codes))
    codes[num_codes // 2 :: 7] = codes[num_codes // 3].clone()  # equal codes, far from each other,
    x[::2] = codes[num_codes // 2] + x[::2].sign() / 16         # that half of the tokens choose
    value, index = provq_triton.nearest(x, codes, codes.square().sum(1))
    wanted = exact(x, codes)
    assert torch.equal(value.double(), wanted.amin(1)), "not the least distance, to the digit"
    equal = wanted == wanted.amin(1, keepdim=True)
    assert torch.equal(index, equal.int().argmax(1)), "of equals not the first"


def check_shares():
    """Codes in several shares give what one gives, equals over the borders of shares included."""
    x, codes = (torch.randint(-640, 641, (n, 8)) / 16 for n in (40, 9000))  # exact, as in check_equals
    codes[5000:] = codes[:4000].clone()
    whole = provq_triton.nearest(x, codes, codes.square().sum(1), shares=1)
    assert whole[1].max() < 5000
    for shares in (2, 3, 70, 1000):
        value, index = provq_triton.nearest(x, codes, codes.square().sum(1), shares=shares)
        assert torch.equal(value, whole[0])
        assert torch.equal(index, whole[1])


def check_unknown():
    """NaN of a token and of codes: seen, and at the first code that has it."""
    x, codes = torch.randn(70, 6), torch.randn(400, 6)
    x[3, 2] = float("nan")
    value, index = provq_triton.nearest(x, codes, codes.square().sum(1))
    assert value.isnan().nonzero().tolist() == [[3]]
    assert index[3] == 0
    codes[270, 1] = codes[150, 2] = float("nan")
    value, index = provq_triton.nearest(x[4:], codes, codes.square().sum(1))
    assert bool(value.isnan().all())
    assert bool((index == 150).all())


def check_entrance():
    """nearest_code with the kernel in place finds the same codes as without, far from the origin too."""
    x, codes = torch.randn(300, 8) + 1000, torch.randn(700, 8) + 1000
    before = provq.nearest_code(x, codes)
    calls = []
    provq.fused_search = lambda *args: calls.append(1) or provq_triton.nearest(*args)
    assert torch.equal(provq.nearest_code(x, codes), before)
    assert calls
    provq.fused_search = lambda *_: None
    assert torch.equal(provq.nearest_code(x, codes), before)


if __name__ == "__main__":
    draw = random.Random(0)
    shapes = EDGES + [(draw.randint(1, 100), draw.randint(1, draw.choice((20, 300, 1500))),
                       draw.choice((1, 2, 3, 4, 5, 8, 15, 16, 17, 31, 32, 33, 64, 100, 255, 256)))
                      for _ in range(int(sys.argv[1]) - len(EDGES))]
    for seed, shape in enumerate(shapes):
        try:
            check(*shape, seed)
            if seed < len(EDGES) or seed % 4 == 0:
                check_equals(*shape, seed)
        except AssertionError as error:
            sys.exit(f"N, K, D = {shape}: {error}")
    torch.manual_seed(0)
    check_shares()
    check_unknown()
    check_entrance()
    print(len(shapes), sum(shape[0] for shape in shapes))  # noqa: T201
