"""Programs of scripts/gpu_check.py, each in a process of its own: `gpu_steps.py MODE OUT.json [words of a trainer]`.

search         codes found on the GPU and on the CPU, with TF32 asked for
images, gpt    a trainer's run whose steps raise where they wait for the device; how fast it was
profile        images, and what five steps of the last stage spend their time on
"""

import json
import re
import sys
import time
from pathlib import Path

import torch

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from autoregressive import train_c2i
from tokenizer import provq_triton
from tokenizer import train_provq as train_images
from tokenizer.provq import kmeans, nearest_code
from tokenizer.runtime.precision import set_tf32

SETTLED = 3  # steps of a stage that may compile, allocate, and wait
KINDS = (  # of kernels, by their names
    ("layout", r"nchwToNhwc|nhwcToNchw|transpose|permute"),
    ("norm", r"group_?norm|batch_?norm|bn_|RowwiseMoments"),
    ("conv", r"conv|wgrad|dgrad|fprop|xmma|cudnn"),
    ("matmul", r"gemm|cutlass|nvjet|addmm"),
    ("attention", r"flash|fmha|attention"),
    ("optimizer", r"multi_tensor|adam"),
    ("copies", r"copy|memcpy|memset|fill|CatArray"),
    ("compiled", r"triton"),
)


def search(device, codes=16384, tokens=65536):
    """Seconds, and tokens whose code on the device is farther than the one on the CPU by more than rounding."""
    set_tf32(convolutions=True, matmul=True)
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(tokens, 8, generator=generator), torch.randn(codes, 8, generator=generator)
    there = [x.to(device), table.to(device)]
    nearest_code(*there)  # loads the kernels
    began = _now(device)
    found = nearest_code(*there).cpu()
    seconds, sample = _now(device) - began, slice(0, min(tokens, 4096))
    right = nearest_code(x[sample], table)
    distance, least = ((x[sample] - table[index]).square().sum(1) for index in (found[sample], right))
    began = _now(device)
    clusters = kmeans(there[0], codes, iters=5)
    result = {"search_seconds": seconds, "wrong_codes": int((distance > least * (1 + 1e-4)).sum()),
              "kmeans_seconds": _now(device) - began, "inertia": clusters.inertia}
    if device.type == "cuda":  # the same as one kernel
        provq_triton.use_triton_search(1)
        nearest_code(*there)  # compiles
        began = _now(device)
        found = nearest_code(*there).cpu()
        result["triton_seconds"] = _now(device) - began
        distance = (x[sample] - table[found[sample]]).square().sum(1)
        result["wrong_codes"] += int((distance > least * (1 + 1e-4)).sum())
    return result


def _now(device):
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(trainer, main, words, device, profile=None):
    """Run a trainer -> seconds of k-means. Steps raise where they wait, but for the first SETTLED of each stage."""
    train_step, start_codebook = trainer.train_step, getattr(trainer, "start_codebook", None)
    seen, seconds = {}, [0.0]

    def watched(self, batches, step):
        stage = self.quantize.stage if start_codebook else 1
        seen[stage] = seen.get(stage, 0) + 1
        if profile is not None and stage == 3 and seen[stage] == SETTLED + 1:
            profile.start()
        settled = device.type == "cuda" and seen[stage] > SETTLED
        torch.cuda.set_sync_debug_mode("error" if settled else "default") if device.type == "cuda" else None
        try:
            return train_step(self, batches, step)
        finally:
            if device.type == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            if profile is not None and stage == 3 and seen[stage] == SETTLED + 5:
                _now(device)
                profile.stop()

    def timed(self, step):
        began = _now(device)
        start_codebook(self, step)
        if self.quantize.stage == 2:
            seconds[0] = max(seconds[0], _now(device) - began)

    trainer.train_step = watched
    if start_codebook:
        trainer.start_codebook = timed
    main(words)
    return seconds[0]


def shares(profile, device):
    """Of the device's time: kind of kernel -> share."""
    totals = {}
    for event in profile.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        kind = next((kind for kind, names in KINDS if re.search(names, event.key, re.IGNORECASE)), "other")
        totals[kind] = totals.get(kind, 0) + spent
    return {kind: spent / max(1, sum(totals.values())) for kind, spent in sorted(totals.items())}


def main(mode, out, *words):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if mode == "search":
        result = search(device, **({} if device.type == "cuda" else {"codes": 64, "tokens": 512}))
    elif mode == "gpt":
        watch(train_c2i.Trainer, train_c2i.main, words, device)
        result = {}
    else:
        activity = torch.profiler.ProfilerActivity
        kinds = [activity.CUDA] if device.type == "cuda" else [activity.CPU]
        profile = torch.profiler.profile(activities=kinds) if mode == "profile" else None
        result = {"kmeans_seconds": watch(train_images.Trainer, train_images.main, words, device, profile)}
        result |= {"shares": shares(profile, device)} if profile is not None else {}
    Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
