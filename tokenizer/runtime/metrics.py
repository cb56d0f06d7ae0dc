"""Training metrics: summed on the device, reduced once per flush, one strictly valid JSON line per flush.

Rows are forced to disk before `flush` returns, so a checkpoint saved at step s finds the row of step s on disk
already, and a resumed run only ever has to drop rows. Every field of a row but TIMING_FIELDS repeats bit for bit when a
killed run continues from its newest checkpoint.
"""

import json
import math
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.runtime import distributed
from tokenizer.runtime.files import atomic_write, located, sync_folder
from tokenizer.runtime.parsing import reason
from tokenizer.runtime.throughput import Throughput

# The only fields of a row that two equal runs may differ in.
TIMING_FIELDS = ("samples_per_second", *Throughput.FIELDS, "elapsed_seconds")
_BAR_FIELDS = ("stage", "alpha", "loss")  # what fits beside a progress bar
_RATES = {"tokens_per_second": "{:.0f} tokens/s", "mfu": "MFU {:.1%}", "peak_memory_gib": "{:.1f} GiB"}
_PADDING = 256  # numbers; see MetricLogger._message


class JsonlFile:
    """Append-only file of JSON objects with an integer "step". Only rank 0 touches the disk.

    resume_step: the step of the checkpoint that the run continues from. Rows of later steps and a torn last line are
    removed (the file is replaced atomically). At 0 there is no checkpoint and every row goes.

    Raises ValueError naming the file and line for a complete line that is not such an object.
    """

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        self.path = Path(path)
        if not distributed.is_main():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        kept = b"".join(self._rows_until(resume_step, content))
        if kept != content:
            atomic_write(self.path, lambda file: file.write(kept))

    def _rows_until(self, resume_step: int, content: bytes) -> list[bytes]:
        if resume_step == 0:
            return []
        kept = []
        for number, line in enumerate(content.split(b"\n")[:-1], 1):  # what follows the last newline is torn or empty
            try:
                row = json.loads(line)
            except Exception as error:  # RecursionError too, see parsing.py
                raise ValueError(f"{self.path}, line {number}: not a JSON object with a step ({reason(error)}); "
                                 "repair it") from error
            step = row.get("step") if isinstance(row, dict) else None
            if type(step) is not int:
                raise ValueError(f"{self.path}, line {number}: not a JSON object with a step; repair it")
            if step <= resume_step:
                kept.append(line + b"\n")
        return kept

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one row and wait until it is on disk.

        Raises FloatingPointError naming the entry and the step for NaN or infinity, TypeError for an entry that
        JSON has no word for; nothing is written then. OSError names the file, and the free space when there is none.
        """
        _check_row(row)
        if not distributed.is_main():
            return
        created = not self.path.exists()
        with located(self.path), open(self.path, "ab") as file:
            file.write(json.dumps(row, allow_nan=False).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        if created:
            sync_folder(self.path.parent)


def _extend(row: dict[str, Any], part: Mapping[str, Any]) -> None:
    assert not row.keys() & part.keys(), f"given twice: {sorted(row.keys() & part.keys())}"
    row.update(part)


def _check_row(row: Mapping[str, Any]) -> None:
    assert type(row.get("step")) is int, f"a row needs an integer step, got {row.get('step')!r}"
    for name, value in row.items():
        _check_value(name, value, row["step"])


def _check_value(name: str, value: object, step: int) -> None:
    if isinstance(value, float):
        if not math.isfinite(value):
            raise FloatingPointError(f"{name} is {value} at step {step}: the run has diverged")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check_value(f"{name}.{key}", item, step)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_value(f"{name}[{index}]", item, step)
    elif not (value is None or isinstance(value, (bool, int, str))):
        raise TypeError(f"{name} at step {step} is a {type(value).__name__}: rows hold Python numbers and strings")


class MetricLogger:
    """Means over the samples and ranks since the last flush, to metrics.jsonl, TensorBoard and the console.

    run_dir:      folder of metrics.jsonl and tensorboard/
    total_steps:  steps of the whole run, for the ETA
    device:       where the metrics are computed; sums are float64 there
    progress:     True for a progress bar, False for one line per flush, None for a bar on a terminal
    resume_step:  step of the checkpoint that the run continues from; see JsonlFile
    throughput:   what turns samples per second into more entries

    `flush`, `state_dict` and `load_state_dict` are collective: call them on every rank.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        total_steps: int,
        device: torch.device,
        tensorboard: bool = True,
        progress: bool | None = None,
        resume_step: int = 0,
        throughput: Throughput | None = None,
    ) -> None:
        run_dir = Path(run_dir)
        self._file = JsonlFile(run_dir / "metrics.jsonl", resume_step)
        self._device, self._throughput = device, throughput
        self._board: Any = None
        self._console: _Console | None = None
        if distributed.is_main():
            self._console = _Console(total_steps, resume_step, progress)
            if tensorboard:
                from torch.utils.tensorboard.writer import SummaryWriter  # slow to import, needed on rank 0 only

                # Hides the events of steps that are about to be done again, as JsonlFile removes their rows.
                purge_step = resume_step + 1 if resume_step else 0
                threading.excepthook = _said_elsewhere(threading.excepthook)
                with located(run_dir / "tensorboard"):
                    self._board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=purge_step)
        now = time.perf_counter()
        self._run_start = now  # of the whole run, as if it had never been interrupted
        self._reset(window_start=now)

    def _reset(self, window_start: float) -> None:
        self._window_start = window_start
        self._samples = 0
        self._weights: dict[str, float] = {}  # summed weight of each scalar and count, in the order of first use
        self._sums: dict[str, Tensor] = {}  # weighted sum of each, (1,) or (K,) on the device

    def add_samples(self, count: int) -> None:
        """Count samples that this rank has processed."""
        self._samples += count

    def add(self, values: Mapping[str, Tensor], weight: float = 1.0) -> None:
        """Accumulate one step's metrics without waiting for the device.

        values: name -> tensor of one number, which enters the mean with `weight` (> 0); or, for a name that ends in
        "_counts", tensor (K,), which is summed as it is. Every rank adds the same names in the same order.
        """
        if not weight > 0:
            raise ValueError(f"weight of {', '.join(values)} is {weight}: a mean needs positive weights")
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise TypeError(f"metric {name} is a {type(value).__name__}: add takes tensors, flush(extra=) numbers")
            counts = name.endswith("_counts")
            if (value.dim() != 1) if counts else (value.numel() != 1):
                expected = "(K,), as for every name in _counts" if counts else "of one number, or named ..._counts"
                raise ValueError(f"metric {name} has shape {tuple(value.shape)}: it has to be {expected}")
            value = value.detach().reshape(-1)
            if name not in self._sums:
                self._sums[name] = torch.zeros(value.numel(), dtype=torch.float64, device=self._device)
                self._weights[name] = 0.0
            self._sums[name].add_(value, alpha=1 if counts else weight)
            self._weights[name] += weight

    def flush(
        self,
        step: int,
        extra: Mapping[str, Any] | None = None,
        *,
        derive: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Reduce over ranks, write the row of `step` (the number of steps done) and start over.

        extra:   entries known on the host and equal on every rank, such as stage and learning rate
        derive:  more entries, from the reduced metrics; what turns code_counts into a perplexity in the row

        Returns, on every rank, the row and the reduced "_counts" as float64 (K,) on the CPU. The row has step, extra,
        the means, the derived entries, samples_per_second and what throughput makes of it (when add_samples was called)
        and elapsed_seconds.

        Raises FloatingPointError on every rank, naming metric and step, for NaN or infinity; no row is written.
        """
        message = self._message()
        distributed.all_reduce_(message)
        total, squares = int(message[0]), int(message[1])
        if distributed.world_size() * squares != total**2:  # see _message
            raise RuntimeError(f"ranks added different metrics before step {step}; this rank: {self._layout()}")
        samples, weights, sums = self._unpack(message[2:])

        means = {name: float(sums[name].item() / weights[name]) for name in sums if not name.endswith("_counts")}
        counts = {name: tensor for name, tensor in sums.items() if name.endswith("_counts")}
        row: dict[str, Any] = {"step": step}
        _extend(row, extra or {})
        _extend(row, means)
        _check_row(row)
        if derive is not None:
            _extend(row, derive({**row, **counts}))
        now = time.perf_counter()
        if samples:
            row["samples_per_second"] = samples / (now - self._window_start)
            if self._throughput is not None:
                _extend(row, self._throughput.entries(row["samples_per_second"]))
        row["elapsed_seconds"] = now - self._run_start
        self.write(row)
        if self._console is not None:
            self._console.show(row)
        self._reset(window_start=now)
        return {**row, **counts}

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row to metrics.jsonl and TensorBoard. Errors as in JsonlFile.write."""
        self._file.write(row)
        self.show(row["step"], {name: value for name, value in row.items() if name != "step"})

    def show(self, step: int, values: Mapping[str, Any], group: str = "") -> None:
        """Numbers to TensorBoard alone, under group/. OSError names the folder."""
        if self._board is None:
            return
        with located(self._board.log_dir):
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self._board.add_scalar(f"{group}/{name}" if group else name, value, step)
            self._board.flush()

    def show_histogram(self, step: int, name: str, values: Tensor) -> None:
        """Of numbers (n,), to TensorBoard. OSError names the folder."""
        if self._board is not None:
            with located(self._board.log_dir):
                self._board.add_histogram(name, values.cpu(), step)
                self._board.flush()

    def show_picture(self, step: int, name: str, picture: Tensor) -> None:
        """(3, H, W) in [0, 1] to TensorBoard. OSError names the folder."""
        if self._board is not None:
            with located(self._board.log_dir):
                self._board.add_image(name, picture, step)
                self._board.flush()

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside, such as a validation, does not count in samples_per_second."""
        began = time.perf_counter()
        yield
        self._window_start += time.perf_counter() - began

    def close(self) -> None:
        """End the progress bar and the TensorBoard file. Rows are on disk already."""
        if self._board is not None:
            self._board.close()
        if self._console is not None:
            self._console.close()

    def _layout(self) -> list[tuple[str, int]]:
        return [(name, tensor.numel()) for name, tensor in self._sums.items()]

    def _message(self) -> Tensor:
        """This rank's accumulators, float64 (n,) on the CPU: [h, h^2, samples, weights, sums, padding].

        A metric that only some ranks added would make the ranks reduce tensors of different sizes, which can hang.
        Padding makes such messages equally long in practice, and h, a 20-bit hash of the layout, exposes them: by
        Cauchy-Schwarz world * sum(h^2) = (sum h)^2 exactly when every rank sent the same h.
        """
        layout_hash = zlib.crc32(repr(self._layout()).encode()) & 0xFFFFF
        host = torch.tensor([layout_hash, layout_hash**2, self._samples, *self._weights.values()], dtype=torch.float64)
        sums = torch.cat([*self._sums.values(), torch.zeros(0, dtype=torch.float64, device=self._device)])
        packed = torch.cat([host, sums.cpu().double()])  # the one wait for the device
        return torch.nn.functional.pad(packed, (0, -len(packed) % _PADDING))

    def _unpack(self, packed: Tensor) -> tuple[int, dict[str, float], dict[str, Tensor]]:
        """Images, weights and sums from a message without its first two numbers."""
        names, sizes = list(self._sums), [tensor.numel() for tensor in self._sums.values()]
        samples, weights, sums = torch.split(packed[: 1 + len(names) + sum(sizes)], [1, len(names), sum(sizes)])
        return (
            int(samples.item()),
            dict(zip(names, weights.tolist(), strict=True)),
            dict(zip(names, torch.split(sums, sizes), strict=True)),
        )

    def state_dict(self) -> dict[str, Any]:
        """What has been added since the last flush, of every rank: accumulators float64 (W, n). Identical on all.

        FloatingPointError when something of it is not finite: a diverged run must not replace its good checkpoints.
        """
        messages = distributed.gather_stack(self._message())  # (W, n)
        if not bool(messages.isfinite().all()):
            names = [name for name, total in self._sums.items() if not bool(total.isfinite().all())]
            raise FloatingPointError(f"{', '.join(names) or 'another rank'} not finite: the run has diverged")
        if (messages[:, 0] != messages[0, 0]).any():
            raise RuntimeError(f"ranks added different metrics; this rank: {self._layout()}")
        now = time.perf_counter()
        return {
            "layout": [list(entry) for entry in self._layout()],
            "accumulators": messages[:, 2:],
            "window_seconds": now - self._window_start,
            "elapsed_seconds": now - self._run_start,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue between two flushes: rank by rank on as many ranks as saved it, else with the sum on rank 0."""
        packed = state["accumulators"].double()  # (W, n)
        if len(packed) == distributed.world_size():
            mine = packed[distributed.rank()]
        else:
            mine = packed.sum(0) if distributed.is_main() else torch.zeros_like(packed[0])
        now = time.perf_counter()
        self._run_start = now - state["elapsed_seconds"]
        self._reset(window_start=now - state["window_seconds"])
        self._sums = {name: torch.zeros(size, dtype=torch.float64, device=self._device)
                      for name, size in state["layout"]}
        self._samples, self._weights, sums = self._unpack(mine)
        for name, tensor in sums.items():
            self._sums[name].copy_(tensor)


def _said_elsewhere(hook: Callable[[threading.ExceptHookArgs], object]) -> Callable[[threading.ExceptHookArgs], object]:
    """hook, but silent for TensorBoard's thread: it keeps a full disk's OSError and raises it at the next call here."""
    def quiet(args: threading.ExceptHookArgs) -> object:
        known = isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard.")
        return None if known else hook(args)

    return quiet


class _Console:
    """Rank 0's view of a run: a tqdm bar, or one line per flush."""

    def __init__(self, total_steps: int, resume_step: int, progress: bool | None) -> None:
        self._total = total_steps
        self._first = resume_step
        self._start = time.perf_counter()
        self._bar: Any = None
        if sys.stderr.isatty() if progress is None else progress:
            from tqdm import tqdm

            self._bar = tqdm(total=total_steps, initial=resume_step, unit="step", dynamic_ncols=True)

    def show(self, row: Mapping[str, Any]) -> None:
        step, rate = row["step"], row.get("samples_per_second")
        words = [f"{rate:.0f} samples/s"] if rate is not None else []
        words += [shown.format(row[name]) for name, shown in _RATES.items() if name in row]
        if self._bar is not None:
            words = [f"{name} {short(row[name])}" for name in _BAR_FIELDS if name in row] + words
            self._bar.set_postfix_str(" ".join(words), refresh=False)
            self._bar.update(step - self._bar.n)
            self._bar.refresh()
            return
        words = [f"{name} {short(row[name])}" for name in row if name not in ("step", *TIMING_FIELDS)] + words
        seconds_per_step = (time.perf_counter() - self._start) / max(step - self._first, 1)
        remaining = timedelta(seconds=round(max(self._total - step, 0) * seconds_per_step))
        print(" ".join([f"step {step}/{self._total}", *words, f"eta {remaining}"]), flush=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def short(value: object) -> str:
    """As the console shows it."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
