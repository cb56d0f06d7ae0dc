"""One training run in one folder: its steps, logs, checkpoints, and exact resume.

The number of steps done is the only hidden state of a training loop: data order, augmentation and random numbers are
functions of it (see seeding.py), so a run that continues from a checkpoint repeats what an uninterrupted one would have
done.
"""

import json
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol

import torch
from torch import Tensor

from tokenizer.runtime import config, distributed, lock
from tokenizer.runtime.checkpoint import Checkpointer, load_file
from tokenizer.runtime.command import USER_ERRORS, CannotContinue, refusal
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.metrics import JsonlFile, MetricLogger, short
from tokenizer.runtime.parsing import brief, parsing
from tokenizer.runtime.run_config import length_sets_rate
from tokenizer.runtime.seeding import StepSampler, seed_step
from tokenizer.runtime.throughput import Throughput


class Stateful(Protocol):
    """What a checkpoint holds a part of; its state is tensors and primitives."""

    def state_dict(self) -> Any: ...
    def load_state_dict(self, state: Any, /) -> object: ...


class Run:
    """The folder of a training run, and what happens around each of its steps.

        run = Run(cfg, device, resumable=RESUMABLE, inputs={"data_fingerprint": ...})
        run.resume({"model": model, "optimizer": optimizer})  # from the newest checkpoint, if there is one
        for step in run.steps():       # seeds what the step draws; after its body a checkpoint, where one is due
            run.log(train_step(step))  # a row of metrics.jsonl, where one is due
            if run.due(cfg.val_every):
                run.record(validate())
        run.finish({"parameters": ...})

    RUN/config.json, metrics.jsonl, validation.jsonl, tensorboard/, checkpoints/ and, at the end, summary.json. Methods
    are collective: call them on every rank.

    cfg: a RunConfig, checked, with max_steps decided, that also has global_batch_size. Steps are optimizer updates.
    resumable: names of the settings that may differ when a run is resumed; max_steps only if no learning rate depends
        on it.
    inputs: what the run is fed with, such as fingerprints of data; must not differ either.
    describe: what else every checkpoint says, primitives by name.
    end: steps that are done when the run ends, if --stop-after has it end before max_steps.
    """

    def __init__(
        self, cfg: Any, device: torch.device, *, resumable: frozenset[str], inputs: Mapping[str, Any],
        describe: Mapping[str, Any] | None = None, end: int | None = None,
    ) -> None:
        self.cfg: Any = cfg
        self.device = device
        self.folder = Path(cfg.results_dir)
        self.checkpoints = Checkpointer(self.folder / "checkpoints", keep_last=cfg.keep_checkpoints)
        self.end: int = cfg.max_steps if end is None else end
        self.start = 0  # steps done when this process began
        self.done = 0   # steps done when the body of the current one ends
        self.best: float | None = None  # score of checkpoints/best.pt
        self.interrupted = False        # by Ctrl-C
        self.last_validation: dict[str, Any] = {}
        self.throughput: Throughput | None = None  # for the log rows; set it before `steps`
        self._resumable = resumable - {"max_steps"} if length_sets_rate(cfg) else resumable
        self._inputs, self._describe = dict(inputs), dict(describe or {})
        self._parts: Mapping[str, Stateful | None] = {}
        self._resumed_metrics: Mapping[str, Any] | None = None
        self._began = time.monotonic()

    # ---------------------------------------------------------------------------------------------------- state

    def identity(self) -> dict[str, Any]:
        """What a checkpoint records of the settings."""
        return config.to_dict(self.cfg) | self._inputs

    def state(self) -> dict[str, Any]:
        """All that the steps from `done` on depend on."""
        return {"step": self.done, **{name: part and part.state_dict() for name, part in self._parts.items()},
                "metrics": self.metrics.state_dict(), "last_validation": self.last_validation, "best": self.best,
                **self._describe, "config": self.identity()}

    def resume(self, parts: Mapping[str, Stateful | None]) -> None:
        """Load the newest checkpoint, if there is one, into parts, and set `start`. Writes nothing but a lock: the
        folder is this process's from here on (see lock.py), but for --dry-run.

        parts: name in checkpoints -> what saves and loads itself; None for one that this run does without.

        ValueError: the folder is in use by another process, or holds a run with other settings, one that is further
        than this one goes, or something else.
        """
        self._parts = parts
        if not self.cfg.dry_run:
            lock.own(self.folder, "--results-dir")
        main_only = [name for name, part in parts.items() if getattr(part, "from_main", False)]
        state = self.checkpoints.load_latest(main_only=main_only)  # on the CPU, as a copy on the GPU would not fit
        if state is None:
            if (self.folder / "metrics.jsonl").exists() and not (self.folder / "config.json").exists():
                raise ValueError(f"--results-dir {self.folder} holds the metrics.jsonl of something else; use another")
            self._require_nothing_lost()
            return
        self._require_whole(state)
        changed = self._changed(state["config"])
        if changed:
            what = "; ".join(f"{name}: {old!r} there, {new!r} now" for name, old, new in changed)
            fix = "Use its settings"
            if all(name in self._inputs for name, _, _ in changed):
                what, fix = f"its data have changed since; {what}", "Restore the data, or the version that read them,"
            why = ""
            if "max_steps" in (name for name, _, _ in changed):
                why = (f" With --lr-schedule {self.cfg.lr_schedule} the learning rate of every step depends on the "
                       "planned length, so that it cannot change; --lr-schedule constant, from the start, lets it.")
            raise ValueError(f"--results-dir {self.folder} holds a run with other settings ({what}).{why} {fix} to "
                             "resume it, or use another --results-dir")
        if state["step"] > self.end:
            ends = f"--max-steps {self.end}" if self.end == self.cfg.max_steps else f"step {self.end} of --stop-after"
            raise ValueError(f"--results-dir {self.folder} is at step {state['step']}, beyond {ends}")
        for name, part in parts.items():
            if part is not None:
                with parsing(f"--results-dir {self.folder}", f"the {name} of its newest checkpoint does not fit"):
                    part.load_state_dict(state[name])
                    _require_like_parameters(part)
        self.start = self.done = state["step"]
        self.best = state["best"] if math.isfinite(state["best"] or 0.0) else None  # before 0.3: infinite for none
        self.last_validation = state["last_validation"]
        self._resumed_metrics = state["metrics"]
        distributed.print0(f"resuming {self.folder} at step {self.start}")

    def _require_whole(self, state: Mapping[str, Any]) -> None:
        """ValueError: the checkpoint lacks an entry that `state` writes, or one is of another kind."""
        kinds: dict[str, tuple[type, ...]] = {"step": (int,), "metrics": (dict,), "last_validation": (dict,),
                                              "best": (int, float, type(None)), "config": (dict,)}
        newest = f"--results-dir {self.folder}: its newest checkpoint"
        parts = [name for name, part in self._parts.items() if part is not None]
        missing = [name for name in (*kinds, *parts) if name not in state]
        if missing:
            raise ValueError(f"{newest} has no {', '.join(missing)}: it is not one of this program; use another folder")
        for name, kind in kinds.items():
            if type(state[name]) not in kind or (name == "step" and state[name] < 0):
                raise ValueError(f"{newest} has {brief(state[name])} as its {name}: it is damaged; move it away to "
                                 "resume from an older one")

    def _changed(self, recorded: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
        """(name, value there, value now) of settings that must not differ. One that is newer than the checkpoint had
        its default there.
        """
        defaults = {f.name: list(f.default) if isinstance(f.default, tuple) else f.default  # as config.to_dict has them
                    for f in fields(self.cfg) if f.default is not MISSING}
        recorded = {**{name: value for name, value in defaults.items() if name not in recorded}, **recorded}
        return [entry for entry in config.diff(recorded, self.identity()) if entry[0] not in self._resumable]

    def _require_nothing_lost(self) -> None:
        """ValueError: there is no checkpoint to resume, but the run got further than to where starting over is right.

        A run that was killed before its first checkpoint starts over, and may well have validated by then.
        """
        best = self.checkpoints.folder / "best.pt"
        lost = [self.folder / "summary.json"] if (self.folder / "summary.json").exists() else []
        if best.exists():
            state = load_file(best)
            if type(state.get("config")) is not dict or type(state.get("step")) is not int:
                raise ValueError(f"{best} is not one of this program; move it away")
            if self._changed(state["config"]) or state["step"] > state["config"].get("ckpt_every", 0):
                lost.append(best)
        if lost:
            raise ValueError(f"--results-dir {self.folder} holds a run without a numbered checkpoint to resume, and "
                             f"starting over would replace its {' and '.join(path.name for path in lost)}. Use another "
                             "--results-dir, or move this folder away")

    # ----------------------------------------------------------------------------------------------------- loop

    def steps(self) -> Iterator[int]:
        """The steps that are left, from `start` to `end`. A signal ends them early, after a checkpoint."""
        cfg = self.cfg
        self._open_logs()
        self._began = time.monotonic()
        with _StopSignals() as signals:
            for step in range(self.start, self.end):
                seed_step(cfg.global_seed, distributed.rank(), step)  # what a step draws depends on the step alone
                self.done = step + 1
                yield step
                stopping = distributed.any_rank(signals.asked)
                if self.due(cfg.ckpt_every) or stopping:
                    with self.untimed():
                        self.checkpoints.save(self.done, self.state())
                if stopping:
                    self.interrupted = signals.interrupted_at is not None
                    if self.done < self.end:
                        distributed.print0(f"stopped by a signal at step {self.done}; the same command resumes")
                    break
        self.metrics.close()

    def _open_logs(self) -> None:
        """Rows of steps that will be done again go, and checkpoints that a kill left too many; sums since the last row
        come back.
        """
        try:
            if self.cfg.wandb and distributed.is_main():
                self._mirror()
            self.metrics = MetricLogger(self.folder, total_steps=self.end, device=self.device,
                                        resume_step=self.start, throughput=self.throughput)
            self.validations = JsonlFile(self.folder / "validation.jsonl", resume_step=self.start)
            if self._resumed_metrics is not None:
                with parsing(f"--results-dir {self.folder}", "the metrics of its newest checkpoint are damaged"):
                    self.metrics.load_state_dict(self._resumed_metrics)
            if distributed.is_main():
                config.save(self.cfg, self.folder / "config.json")
                self.checkpoints.prune(self.start)
                if self.start < self.end:
                    (self.folder / "summary.json").unlink(missing_ok=True)  # of a shorter run that is now extended
        except (ValueError, OSError) as error:  # a damaged log, a full disk
            raise CannotContinue(str(error)) from error

    def _mirror(self) -> None:
        """To Weights & Biases, until this process ends: a run of the folder's name, which a resumed one continues."""
        import wandb

        known = self.folder / "wandb_id.txt"
        if not known.exists():
            atomic_write_text(known, token_hex(8) + "\n")
        try:
            wandb.init(project=self.cfg.wandb, name=self.folder.name, id=known.read_text().strip(), resume="allow",
                       dir=str(self.folder), config=asdict(self.cfg), sync_tensorboard=True)
        except wandb.Error as error:
            raise CannotContinue(f"--wandb {self.cfg.wandb}: {' '.join(str(error).split())}") from error

    def due(self, every: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after this one."""
        return self.done % every == 0 or self.done == self.end

    def log(
        self, terms: Mapping[str, Tensor], labels: Mapping[str, Any] | None = None, *,
        derive: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None,
    ) -> None:
        """Sum the step's terms and, where a row is due, write it: means of terms, labels, what derive makes of them.

        See MetricLogger.add and .flush. Without a row it waits for no device.
        """
        self.metrics.add(terms)
        self.metrics.add_samples(self.cfg.global_batch_size // distributed.world_size())
        if self.due(self.cfg.log_every) or self.done == 1:  # the first at once: whoever starts a run waits for it
            self.metrics.flush(self.done, labels, derive=derive)

    def record(self, result: dict[str, Any], *, shown: Collection[str] | None = None, **labels: Any) -> None:
        """Append the validation of this step to validation.jsonl and print it (only what is `shown`).

        FloatingPointError: a number that is not finite.
        """
        self.validations.write({"step": self.done, **labels} | result)
        self.metrics.show(self.done, result, "validation")
        numbers = " ".join(f"{k} {short(v)}" for k, v in result.items() if shown is None or k in shown)
        distributed.print0(f"validation at step {self.done}: {numbers}")
        self.last_validation = result

    def keep_best(self, score: float, *, higher_is_better: bool) -> None:
        """Write checkpoints/best.pt, to use and not to resume, if no earlier score was as good."""
        if self.best is not None and not (score > self.best if higher_is_better else score < self.best):
            return
        self.best = score
        weights = {name: part and part.state_dict() for name, part in self._parts.items() if name in ("model", "ema")}
        self.checkpoints.save_named("best", {"step": self.done, **weights, **self._describe,
                                             "validation": self.last_validation, "config": self.identity()})

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """What happens inside does not count in samples_per_second, and its FloatingPointError names the step."""
        with self.metrics.untimed():
            try:
                yield
            except FloatingPointError as error:
                raise FloatingPointError(f"step {self.done}: {error}") from error

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write summary.json: step, inputs, summary, seconds, the last validation. Nothing after a signal's early end.

        Tables tell by the inputs which runs may be compared; a checkpoint has them too, but is large and may be gone.
        """
        if self.done < self.end:
            return
        summary = {"step": self.done, "inputs": self._inputs, **summary,
                   "seconds_since_start_or_resume": round(time.monotonic() - self._began, 1), **self.last_validation}
        if distributed.is_main():
            atomic_write_text(self.folder / "summary.json", json.dumps(summary, indent=1) + "\n")
        shown = " ".join(f"{k} {v:.4g}" for k, v in self.last_validation.items() if isinstance(v, (int, float)))
        distributed.print0(f"finished {self.folder} at step {self.done}: {shown}")

    # ----------------------------------------------------------------------------------------------------- data

    def sampler(self, num_samples: int, start: int, end: int) -> StepSampler:
        """This rank's micro-batches of steps [start, end) over a data set, as lists of (epoch, index)."""
        return StepSampler(
            num_samples, self.cfg.global_batch_size, seed=self.cfg.global_seed, start_step=start, end_step=end,
            rank=distributed.rank(), world=distributed.world_size(),
            micro_batches=self.cfg.gradient_accumulation_steps,
        )

    def micro_batch(self) -> int:
        """Samples of one forward on one rank."""
        return int(self.cfg.global_batch_size // (distributed.world_size() * self.cfg.gradient_accumulation_steps))


def _require_like_parameters(part: Any) -> None:
    """ValueError: an optimizer's averages have other shapes than its parameters, which torch notices in a step only."""
    optimizer = getattr(part, "optimizer", part)  # or what wraps one
    if isinstance(optimizer, torch.optim.Optimizer):
        for parameter, values in optimizer.state.items():
            for name, value in values.items():
                if isinstance(value, Tensor) and value.ndim and value.shape != parameter.shape:
                    raise ValueError(f"{name} {tuple(value.shape)} of a parameter {tuple(parameter.shape)}")


class _StopSignals:
    """SIGTERM (a scheduler's warning, torchrun's shutdown), SIGINT (Ctrl-C) and SIGHUP (a terminal that closes) ask for
    a checkpoint at the end of the step. Those that are ignored, as under nohup, stay so. Another Ctrl-C ends at once.
    """

    ECHO = 0.5  # seconds; torchrun sends its processes what a terminal may have sent them already

    def __init__(self) -> None:
        self.asked = False
        self.interrupted_at: float | None = None  # the first Ctrl-C, in seconds
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def __enter__(self) -> "_StopSignals":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            if signal.getsignal(number) in (self._note, signal.SIG_DFL):  # else a later run has taken over
                signal.signal(number, before or signal.SIG_DFL)

    def _note(self, number: int, *_: Any) -> None:
        if os.getpid() != self._process:  # one that loads data: it ends with this one, which needs it until then
            return
        now = time.monotonic()
        again = self.interrupted_at is not None and now - self.interrupted_at > self.ECHO
        if again and (number == signal.SIGINT or (number == signal.SIGTERM and distributed.launched())):
            signal.signal(number, signal.SIG_DFL)  # torchrun makes a SIGTERM of the second Ctrl-C
            os.kill(self._process, number)
        self.asked = True
        if number == signal.SIGHUP:
            self._leave_terminals()
        if number != signal.SIGINT or self.interrupted_at is not None:
            return
        self.interrupted_at = now
        if distributed.is_main():
            with suppress(OSError):  # not print, which may be what was interrupted
                os.write(2, b"\nstopping after this step, with a checkpoint; Ctrl-C again ends at once\n")
        if not distributed.launched():
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # needs no Python: also ends what hangs

    def _leave_terminals(self) -> None:
        """Writing to one that is gone would raise, before the checkpoint."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        for descriptor in self._terminals:
            os.dup2(nothing, descriptor)
        os.close(nothing)


class Trainer(Protocol):
    """What `launch` starts."""

    cfg: Any
    run: Run

    def train(self) -> None: ...


def launch(prog: str, parse: Callable[[], Any], build: Callable[[Any], Trainer]) -> None:
    """The main of a training script: parse the flags, build the trainer, then train, or with --dry-run print its
    configuration as JSON; what else there is to say goes to stderr then.

    USER_ERRORS while building are mistakes in flags, files or data: the first rank of each machine says so in one
    line, without a traceback, and all ranks exit with a failure. So are CannotContinue, divergence, a disk that fails
    or is full, and too little memory while training. Ctrl-C ends the process by SIGINT (130 in a shell), after a
    checkpoint once training has begun.
    """
    interrupted = False
    try:
        try:
            cfg = parse()
            with redirect_stdout(sys.stderr) if cfg.dry_run else nullcontext():
                trainer = build(cfg)
        except USER_ERRORS as error:
            raise SystemExit(refusal(prog, error)) from error
        if trainer.cfg.dry_run:
            distributed.print0(json.dumps(config.to_dict(trainer.cfg), indent=1))
        else:
            _train(prog, trainer)
            interrupted = trainer.run.interrupted
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        what = str(error).partition("\n")[0] or type(error).__name__
        raise SystemExit(f"{prog}: error: out of memory ({what}): give smaller sizes, or raise "
                         "--gradient-accumulation-steps") from error
    finally:
        lock.release()
    distributed.finalize()  # after an exception just exit: torchrun then ends the other ranks
    if interrupted:  # so that a script that called this one goes no further
        raise KeyboardInterrupt


def _train(prog: str, trainer: Trainer) -> None:
    try:
        trainer.train()
    except distributed.OtherRankFailed as error:
        raise SystemExit(2) from error
    except RuntimeError as error:
        if isinstance(error, CannotContinue):
            raise SystemExit(f"{prog}: error: {error}") from error
        if "gloo/transport" in str(error):  # a connection to a process that is no more
            raise SystemExit(f"{prog}: stopped, because another rank has ended") from error
        raise
    except OSError as error:
        if error.errno is None:  # not of the system
            raise
        raise SystemExit(f"{prog}: error: {error}; the same command resumes") from error
    except FloatingPointError as error:  # on all ranks at once
        fix = f"lower --lr (it is {trainer.cfg.lr}), in another --results-dir"
        raise SystemExit(f"{prog}: error: {error}: {fix}" if distributed.is_main() else 2) from error


def _is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "can't allocate memory" in str(error)
