"""One page about training runs: the paper's tables for them, curves, code usage, latents, pictures, how to repeat them.

    python evaluations/report.py runs/provq-s0 runs/provq-s1 runs/vanilla-s0 runs/vanilla-s1 --out report.html

Writes a self-contained HTML file (no network, no script; light, dark and print) and its tables in Markdown beside it.
Runs that differ only in --global-seed are one row, mean ± standard deviation. Numbers come from RUN/evaluation/
reconstruction.json and generation.json, which the entries of these names write, else from the trainer's last
validation; numbers of different protocols never share a table.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from tokenizer.runtime.command import command, make_parser, refuse_early, require_out_file

PROG = "evaluations/report.py"


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = make_parser(PROG, __doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument("--out", type=Path, default=Path("report.html"),
                        help="page to write, .html; the tables go to the same name with .md (default: report.html)")
    args = parser.parse_args(argv)
    if args.out.suffix not in (".html", ".htm"):
        parser.error(f"--out is {args.out}; it must end in .html")
    return args


if __name__ == "__main__":
    refuse_early(PROG, parse_args)

from evaluations import report_figures as figures
from evaluations.protocol import differences, protocol_id
from evaluations.report_health import Scored, complaints, health, verdict
from evaluations.report_runs import Run, Setting, differing, flatten, group_settings, missing_reason, number, read_runs
from tokenizer.curriculum_config import pace_flag
from tokenizer.runtime import config, page, ranks
from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.over_seeds import clear_best, merge
from tokenizer.runtime.page import Cell, Table
from tokenizer.train_config import PRESETS, RESUMABLE, TrainConfig
from tokenizer.vq_config import ARCHITECTURES

# What does not make another setting. Paths of data stay: a run's folder does not say whether two hold the same images.
IGNORED = (RESUMABLE - {"data_path", "val_path"}) | {"global_seed"}
STAGES = ("warmup_steps", "transition_steps", "transition", "loss_lambda", "codebook_init", "kmeans_batches",
          "adaptive_warmup_patience", "adaptive_warmup_min_steps")
QUANTIZER = ("quantizer", "codebook_l2_norm", "rotation", "codebook_follow")
OPTIONS = {"recluster": "k-means again", "recluster_at": "k-means again at", "codebook_lr_scale": "codes' lr x",
           "codebook_restart_below": "dead codes restart below"}  # ours, or others', never the paper's
UNKNOWN = "unknown"
BASES = {"vq": "Vanilla", "simvq": "SimVQ", "aminoaseed": "AminoAseed", "ema": "EMA"}
MAX_SAMPLES = 12            # pictures of RUN/samples on the page, per run
MAX_PICTURE_BYTES = 8 << 20


class Metric(NamedTuple):
    key: str
    heading: str
    higher_is_better: bool
    form: str  # of str.format
    meaning: str


RECONSTRUCTION = {m.key: m for m in (
    Metric("rfid", "rFID↓", False, "{:.2f}", "Fréchet distance between reconstructions and the images that the "
           "tokenizer saw, in the features that the protocol names"),
    Metric("psnr", "PSNR↑", True, "{:.2f}", "dB, mean over images, peak 1; the reconstruction is rounded to bytes, the "
           "original is not"),
    Metric("ssim", "SSIM↑", True, "{:.3f}", "scikit-image's definition with data range 1, mean over images"),
    Metric("lpips", "LPIPS↓", False, "{:.3f}", "VGG-16, mean over images"),
    Metric("perplexity", "Perplexity↑", True, "{:.1f}", "exponential of the entropy of the codes' frequencies over all "
           "images; at most K"),
    Metric("usage", "Usage↑", True, "{:.3f}", "fraction of the K codes that any image uses"),
    Metric("code_distance", "Code dist.↑", True, "{:.2f}", "mean Euclidean distance between two codes; it grows with "
           "the scale of the latents, so it compares runs of one normalization only"),
)}
GENERATION = {m.key: m for m in (
    Metric("fid", "gFID↓", False, "{:.2f}", "Fréchet distance between samples and the reference"),
    Metric("sfid", "sFID↓", False, "{:.2f}", "the same on spatial features"),
    Metric("inception_score", "IS↑", True, "{:.1f}", "Inception Score"),
    Metric("precision", "Precision↑", True, "{:.3f}", "samples within the reference's manifold"),
    Metric("recall", "Recall↑", True, "{:.3f}", "references within the samples' manifold"),
    Metric("kid", "KID↓", False, "{:.4f}", "kernel distance"),
)}
TABLE_5 = ("rfid", "psnr", "ssim", "perplexity")  # the columns of the paper's Tables 5 and 6
BOLD_RULE = ("Mean ± standard deviation (n - 1) over seeds; bold: better than every other row by more than both "
             "standard deviations together, which takes two seeds on either side.")


# ------------------------------------------------------------------------------------------------- names of settings

def base_model(cfg: Mapping[str, Any]) -> str:
    """What is wrapped by the curriculum, as in the column "Base Model" of Table 5."""
    if "quantizer" not in cfg:
        return UNKNOWN
    name = BASES.get(cfg["quantizer"], str(cfg["quantizer"]))
    if cfg.get("codebook_l2_norm"):
        name = "LlamaGen (unit norm)" if name == "Vanilla" else f"{name}, unit norm"
    name += ", rotation trick" if cfg.get("rotation") else ""
    return name + (", following codes" if cfg.get("codebook_follow") else "")


def enhancement(setting: Setting, schedule: bool = True) -> str:
    """The column "Enhancement" of Table 5, from the lengths of the stages; a schedule unlike the paper's is named."""
    lengths = setting.runs[0].lengths
    if lengths is None:
        return UNKNOWN
    name = {(False, False): "—", (False, True): "+ Soft Transition", (True, False): "+ Manifold Warmup",
            (True, True): "+ Both (ProVQ)"}[lengths[0] > 0, lengths[1] > 0]
    if schedule and lengths[1] and setting.config.get("transition", "cosine") != "cosine":
        name += f", {setting.config['transition']}"
    if lengths[0] and setting.config.get("adaptive_warmup_patience"):
        name += ", adaptive"
    for key, words in OPTIONS.items():
        value = setting.config.get(key) or None
        if value is not None and (key, value) != ("codebook_lr_scale", 1.0):
            values = " ".join(map(str, value)) if isinstance(value, list) else f"{value:g}"
            name += f", {words}" if value is True else f", {words} {values}"
    if not all(run.summary for run in setting.runs):
        name += f" [unfinished, step {setting.step}]"
    return name


def name_settings(settings: Sequence[Setting]) -> None:
    """Set the names, unique, and details. What tells settings of one method apart is said by key or, if that is much,
    by folder."""
    bases = {base_model(s.config) for s in settings}
    for setting in settings:
        base, extra = base_model(setting.config), enhancement(setting)
        if UNKNOWN in (base, extra):
            setting.name = setting.runs[0].name
        elif extra.startswith("—"):
            setting.name = base + extra[1:]
        else:
            extra = extra.replace("Both (ProVQ)", "ProVQ")
            setting.name = extra.removeprefix("+ ") if len(bases) == 1 else f"{base} {extra}"
    for method in {s.name for s in settings}:
        alike = [s for s in settings if s.name == method]
        keys = differing([s.config for s in alike])
        for setting in alike if len(alike) > 1 else []:
            details = [f"{key} {setting.config.get(key)}" for key in keys]
            details += [f"{setting.step} steps"] if len({s.step for s in alike}) > 1 else []
            setting.detail = ", ".join(details) if 0 < len(details) <= 3 else setting.runs[0].name
            setting.name = f"{method} ({setting.detail})"


# ---------------------------------------------------------------------------------------------------------- protocols

@dataclass
class Group:
    """Results that may share a table: what was measured for each run, by one protocol."""

    protocol: dict[str, Any]
    results: dict[Path, Mapping[str, Any]]  # run's path -> report


def validation_protocol(run: Run) -> dict[str, Any]:
    """What is known of the trainer's own validation. Which images were held out depends on the seed."""
    cfg = run.config
    images = cfg.get("val_path") or f"held out of {cfg.get('data_path') or 'scikit-learn digits'} by --global-seed"
    return {"task": "the trainer's validation", "images": images, "count": run.result.get("images"),
            "crop": "center", "image_size": cfg.get("image_size"), "channels": cfg.get("image_channels")}


def group_results(runs: Sequence[Run], kind: str) -> list[Group]:
    """By protocol, in the order of the runs. Of reconstruction, the trainer's validation stands in where reports lack,
    and as common ground where the reports have different protocols."""
    found = [(run, run.reports[kind]["protocol"], run.reports[kind]) for run in runs if kind in run.reports]
    if kind == "reconstruction" and (len(found) < len(runs) or len({protocol_id(p) for _, p, _ in found}) > 1):
        common = len({protocol_id(p) for _, p, _ in found}) > 1
        found += [(run, validation_protocol(run), run.result) for run in runs
                  if run.result and (common or kind not in run.reports)]
    groups: dict[str, Group] = {}
    for run, protocol, report in found:
        groups.setdefault(protocol_id(protocol), Group(protocol, {})).results[run.path] = report
    return list(groups.values())


# ------------------------------------------------------------------------------------------------------------- tables

def metric_cells(rows: Sequence[Setting], group: Group, metrics: Sequence[Metric]) -> list[list[Cell]]:
    """Per row of the table the cells of the metrics."""
    columns = []
    for metric in metrics:
        measured = [[number(group.results[r.path].get(metric.key)) for r in _seeds(s, group)] for s in rows]
        column = [merge(values) for values in measured]
        best = clear_best(column, metric.higher_is_better)
        cells = []
        for i, (setting, value) in enumerate(zip(rows, column, strict=True)):
            runs = _seeds(setting, group)
            reasons = [missing_reason(group.results[run.path], metric.key)
                       for run, v in zip(runs, measured[i], strict=True) if v is None]
            why = "; ".join(dict.fromkeys(reasons))
            if value is None:
                cells.append(Cell("not measured", footnote=why, missing=True))
                continue
            text = metric.form.format(value.mean)
            text += "" if value.deviation is None else f" ± {metric.form.format(value.deviation)}"
            text += f" (n = {value.seeds})" if value.seeds < len(runs) else ""
            cells.append(Cell(text, bold=i == best, footnote=why))
        columns.append(cells)
    return [list(row) for row in zip(*columns, strict=True)]


def _seeds(setting: Setting, group: Group) -> list[Run]:
    return [run for run in setting.seeds if run.path in group.results]


def _seed_cell(setting: Setting, group: Group) -> Cell:
    return Cell(str(len(_seeds(setting, group))))


def table_1(rows: Sequence[Setting], group: Group) -> Table:
    """Reconstruction. rows: settings that this group has results of."""
    table = Table("Table 1, reconstruction.", BOLD_RULE,
                  ["Tokenizer", "Latent", "K", "Seeds", *(m.heading for m in RECONSTRUCTION.values())])
    ordered = sorted(rows, key=lambda s: latent_side(s.config) or 0)
    for setting, numbers in zip(ordered, metric_cells(ordered, group, list(RECONSTRUCTION.values())), strict=True):
        side = latent_side(setting.config)
        codes = setting.config.get("codebook_size")
        table.rows.append([Cell(setting.name), Cell(f"{side}x{side}" if side else "—"),
                           Cell(f"{codes:,}" if isinstance(codes, int) else "—"), _seed_cell(setting, group), *numbers])
    if len({latent_side(s.config) for s in rows}) > 1:
        table.notes.append("Rows of different latent resolutions have different numbers of tokens per image.")
    return table


def latent_side(cfg: Mapping[str, Any]) -> int | None:
    size, architecture = number(cfg.get("image_size")), ARCHITECTURES.get(str(cfg.get("vq_model")))
    return int(size) // architecture.downsample if size and architecture else None


def stages(run: Run) -> tuple[int, int]:
    """Steps of warm-up and transition, of a run with a curriculum."""
    assert run.lengths is not None, run.path
    return run.lengths


def table_5(rows: Sequence[Setting], group: Group) -> Table | None:
    """What the curriculum's parts add to a base model. None: no two rows have other parts, so Table 1 says it all."""
    chosen = [s for s in rows if base_model(s.config) != UNKNOWN and s.runs[0].lengths is not None]
    if len({tuple(n > 0 for n in stages(s.runs[0])) for s in chosen}) < 2:
        return None
    chosen.sort(key=lambda s: (base_model(s.config), *(n > 0 for n in stages(s.runs[0])), enhancement(s)))
    table = Table("Table 5, soft transition and manifold warm-up.", "Steps: warm-up / transition / all.",
                  ["Base model", "Enhancement", "Steps", "Seeds", *(RECONSTRUCTION[k].heading for k in TABLE_5)],
                  left=2)
    for setting, numbers in zip(chosen, metric_cells(chosen, group, _table_5_metrics()), strict=True):
        # An adaptive warm-up may end elsewhere for every seed.
        warmups = sorted({stages(run)[0] for run in setting.runs})
        steps = f"{' to '.join(map(str, dict.fromkeys((warmups[0], warmups[-1]))))} / {stages(setting.runs[0])[1]}"
        extra = enhancement(setting) + (f" ({setting.detail})" if setting.detail else "")
        table.rows.append([Cell(base_model(setting.config)), Cell(extra),
                           Cell(f"{steps} / {setting.step}"), _seed_cell(setting, group), *numbers])
    table.notes += _also_differ(chosen, (*STAGES, *QUANTIZER, *OPTIONS))
    return table


def table_6(rows: Sequence[Setting], group: Group) -> Table | None:
    """Schedules of the transition. None: there are no two to compare."""
    chosen = [s for s in rows if s.runs[0].lengths and s.runs[0].lengths[1] and "transition" in s.config]
    if len({s.config["transition"] for s in chosen}) < 2:
        return None
    chosen.sort(key=lambda s: (base_model(s.config), enhancement(s, schedule=False), s.config["transition"]))
    table = Table("Table 6, scheduler of the soft transition.",
                  "hard: alpha stays 1 during the transition, then 0; cosine: it falls along half a cosine.",
                  ["Base model", "Scheduler", "Steps", "Seeds", *(RECONSTRUCTION[k].heading for k in TABLE_5)], left=2)
    for setting, numbers in zip(chosen, metric_cells(chosen, group, _table_5_metrics()), strict=True):
        warmup, transition = stages(setting.runs[0])
        table.rows.append([Cell(f"{base_model(setting.config)} {enhancement(setting, schedule=False)}"),
                           Cell(setting.config["transition"]), Cell(f"{warmup} / {transition} / {setting.step}"),
                           _seed_cell(setting, group), *numbers])
    table.notes += _also_differ(chosen, ("transition", "warmup_steps", "transition_steps", *QUANTIZER))
    return table


def table_2(rows: Sequence[Setting], group: Group) -> Table:
    """Generation."""
    table = Table("Table 2, generation.", BOLD_RULE,
                  ["Tokenizer", "Seeds", "Samples", *(m.heading for m in GENERATION.values())])
    for setting, numbers in zip(rows, metric_cells(rows, group, list(GENERATION.values())), strict=True):
        counts = {group.results[run.path].get("num_samples") for run in _seeds(setting, group)}
        table.rows.append([Cell(setting.name), _seed_cell(setting, group), Cell(", ".join(map(str, counts))), *numbers])
    return table


def _table_5_metrics() -> list[Metric]:
    return [RECONSTRUCTION[key] for key in TABLE_5]


def _also_differ(settings: Sequence[Setting], expected: Sequence[str]) -> list[str]:
    keys = differing([s.config for s in settings], expected)
    keys += ["the number of steps"] if len({s.step for s in settings}) > 1 else []
    return [f"No clean ablation: the rows also differ in {', '.join(keys)}."] if keys else []


# -------------------------------------------------------------------------------------------------------- commands

def command_line(cfg: Mapping[str, Any]) -> str:
    """The command line of tokenizer/train_provq.py that gives this configuration.

    ValueError: the configuration is not one of this version's trainer.
    """
    values = config.to_dict(config.from_dict(TrainConfig, cfg, "config.json"))
    if values["epochs"] is not None:
        values["max_steps"] = None  # the trainer derives it, and takes one of the two
    given = config.to_dict(TrainConfig()) | PRESETS.get(values["preset"], {})
    if values["epochs"] is not None or values["max_steps"] != given["max_steps"]:
        given |= {"epochs": None, "max_steps": None}  # what a flag for one of them does to both
    words = ["python tokenizer/train_provq.py", f"--preset {values['preset']}"]
    for key, value in values.items():
        flag = config.flag_name(key)
        if key == "preset" or value == given[key]:
            continue
        listed = value if isinstance(value, list) else ["none" if value is None else value]
        words.append((flag if value else f"--no-{flag[2:]}") if isinstance(value, bool) else
                     " ".join([flag, *(shlex.quote(str(item)) for item in listed)]))
    lines = words[:1]
    for word in words[1:]:
        fits = len(lines[-1]) + len(word) <= 108
        lines = [*lines[:-1], f"{lines[-1]} {word}"] if fits else [*lines, f"    {word}"]
    return " \\\n".join(lines)


# --------------------------------------------------------------------------------------------------------- sections

class Report:
    """The two files. runs: what read_runs gives."""

    def __init__(self, runs: Sequence[Run]):
        self.runs = list(runs)
        self.settings = group_settings(runs, IGNORED)
        name_settings(self.settings)
        self.names = {s.name: s for s in self.settings}
        self.colors = {name: figures.color(i) for i, name in enumerate(self.names)}
        self.color_of = {run.path: self.colors[name] for name, s in self.names.items() for run in s.runs}
        self.groups = {kind: group_results(runs, kind) for kind in ("reconstruction", "generation")}
        letters = iter("ABCDEFGHIJKLMNOPQRSTUVWXYZ" * 9)
        self.letters = {id(group): next(letters) for groups in self.groups.values() for group in groups}
        self.markdown: list[str] = []

    def title(self) -> str:
        parents = {run.path.parent.name for run in self.runs}
        return f"Tokenizer runs: {self.runs[0].name if len(self.runs) == 1 else ', '.join(sorted(parents))}"

    def subtitle(self) -> str:
        days = sorted({run.written for run in self.runs})
        written = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
        plural = {n: "" if n == 1 else "s" for n in (len(self.runs), len(self.settings))}
        return (f"{len(self.runs)} run{plural[len(self.runs)]} of {len(self.settings)} "
                f"setting{plural[len(self.settings)]}, written {written}")

    def html(self) -> str:
        """Also fills `markdown`."""
        return page.page(self.title(), self.subtitle(), {
            "In short": self.in_short(),
            "Runs": self.overview(),
            "Results": self.results(),
            "Training curves": self.training(),
            "Code usage": self.usage(),
            "Latents and codes": self.latents(),
            "Pictures": self.pictures(),
            "Settings": self.configuration(),
            "Commands": self.commands(),
            "Protocols": self.protocols(),
        })

    def _table(self, table: Table) -> str:
        self.markdown.append(page.markdown_table(table))
        return page.html_table(table)

    def _note(self, title: str, items: Sequence[str], good: bool = False) -> str:
        self.markdown.append("".join([f"**{page.markdown(title)}**\n\n", *(f"- {page.markdown(i)}\n" for i in items)]))
        return page.note(title, items, good)

    def in_short(self) -> str:
        """A verdict by each protocol that has settings which none before had, and the health of the codebooks."""
        self.markdown.append("## In short\n")
        out, judged = "", set[str]()
        for group in self.groups["reconstruction"]:
            scored: list[Scored] = []
            for name, setting in self.names.items():
                found = [group.results[run.path] for run in _seeds(setting, group)]
                psnr, usage = (merge([number(result.get(key)) for result in found]) for key in ("psnr", "usage"))
                if psnr is not None:
                    scored.append(Scored(name, psnr.mean, psnr.deviation, usage.mean if usage else None))
            if {s.name for s in scored} - judged:
                judged |= {s.name for s in scored}
                said = f"{verdict(scored, 'PSNR', ' dB')} Protocol {self.letters[id(group)]}."
                self.markdown.append(page.markdown(said) + "\n")
                out += f'<p class="verdict">{page.escape(said)}</p>\n'
        lines, well = health(
            {name: [(run.name, complaints(run.metrics, run.validation, run.last_kmeans), number(
                run.result.get("usage"))) for run in setting.runs] for name, setting in self.names.items()},
            {name: cure for name, setting in self.names.items() if (cure := _cure(setting.runs[0]))},
            [name for name, setting in self.names.items() if setting.runs[0].last_kmeans is None])
        return out + self._note("Codebook health", lines, good=well)

    def overview(self) -> str:
        self.markdown.append("## Runs\n")
        table = Table("", "Runs of one setting differ in their seed only.",
                      ["Run", "Setting", "Seed", "Steps", "Parameters", "Training images", "Written"], left=2)
        for name, setting in self.names.items():
            for run in setting.runs:
                planned = run.config.get("max_steps")
                steps = f"{run.step}" if run.summary else f"{run.step} of {planned or '?'}"
                sizes = [run.summary.get(key) for key in ("parameters", "training_images")]
                table.rows.append([Cell(run.name), Cell(name), Cell("—" if run.seed is None else str(run.seed)),
                                   Cell(steps), *(Cell(f"{n:,}" if isinstance(n, int) else "—") for n in sizes),
                                   Cell(run.written)])
        out = self._table(table)
        return out + "".join(self._note(f"{run.name}:", run.notes) for run in self.runs if run.notes)

    def results(self) -> str:
        self.markdown.append("## Results\n")
        out = ""
        for kind, groups in self.groups.items():
            for group in groups:
                rows = [s for s in self.settings if _seeds(s, group)]
                letter, task = self.letters[id(group)], group.protocol.get("task", kind)
                heading = f"Protocol {letter}: {task}"
                self.markdown.append(f"### {page.markdown(heading)}\n")
                out += f"<h3>{page.escape(heading)}</h3>\n"
                if group is not groups[0]:
                    other = self.letters[id(groups[0])]
                    keys = ", ".join(differences(groups[0].protocol, group.protocol))
                    out += self._note(f"Not comparable with protocol {other}.", [f"The protocols differ in: {keys}"])
                warnings = group.protocol.get("warnings")
                if isinstance(warnings, list) and warnings:
                    out += self._note("Before quoting these numbers:", [str(w) for w in warnings])
                builders: list[Callable[..., Table | None]] = (
                    [table_1, table_5, table_6] if kind == "reconstruction" else [table_2])
                for build in builders:
                    table = build(rows, group)
                    out += self._table(table) if table else ""
        return out or page.note("No results.", ["No run has a validation or an evaluation report yet."])

    def training(self) -> str:
        svg = figures.curves([(run, self.color_of[run.path]) for run in self.runs], "curves")
        if not svg:
            return ""
        return page.legend((self.colors[name], name) for name in self.names) + page.figure(
            svg, "One line per run, one colour per setting; dotted lines: ends of stage 1 and stage 2. Loss, alpha and "
            "omega are those of training, the rest of validation. Drift: how far codes, and latents of 64 fixed "
            "images, moved since the validation before. Spread, and moved since the row before: of a channel of the "
            "same latents and of the codes, from k-means on, while training.")

    def usage(self) -> str:
        shown = [(run.snapshots[-1], self.color_of[run.path]) for run in self.runs
                 if run.snapshots and run.snapshots[-1].counts.any()]
        if not shown:
            return ""
        names = [name for name, s in self.names.items() if any(r.snapshots and r.snapshots[-1].counts.any()
                                                               for r in s.runs)]
        return page.legend((self.colors[name], name) for name in names) + page.figure(
            figures.code_usage([(snapshot.counts, hue) for snapshot, hue in shown], "usage"),
            "How often the validation images use each code at the end of training. Lines end at the dot, the last code "
            "in use; dotted: all K codes used alike.")

    def _first_and_others(self, draw: Callable[[Run], str]) -> str:
        """Each setting's first seed open, the others folded away."""
        out = ""
        for name, setting in self.names.items():
            drawn = [(run, html) for run in setting.runs if (html := draw(run))]
            for i, (run, html) in enumerate(drawn):
                heading = f"<h3>{page.escape(name)} <span class=\"soft\">· {page.escape(run.name)}</span></h3>\n{html}"
                if i == 1:
                    out += f"<details><summary>{page.escape(name)}: {len(drawn) - 1} more</summary>\n"
                out += heading
            out += "</details>\n" if len(drawn) > 1 else ""
        return out

    def latents(self) -> str:
        def draw(run: Run) -> str:
            dim = {s.latents.shape[1] for s in run.snapshots}
            if len(dim) != 1 or len(run.snapshots[-1].latents) < 2:
                return ""
            return page.figure(figures.latents(run.snapshots, f"latents-{self.runs.index(run)}"),
                               "Latents of fixed validation images, and codes, at the ends of the stages.")
        body = self._first_and_others(draw)
        if not body:
            return ""
        text = ("Every panel of a run has the same axes: the two main components of the latents at its end. Codes that "
                "no validation image uses are crosses.")
        return f"<p>{text}</p>" + page.legend([(figures.LATENT, "latents"), (figures.CODE, "codes in use"),
                                               (figures.DEAD, "codes not in use (crosses)")], dot=True) + body

    def pictures(self) -> str:
        def draw(run: Run) -> str:
            chosen = [*run.images, *run.samples[:MAX_SAMPLES]]
            small = [p for p in chosen if p.stat().st_size <= MAX_PICTURE_BYTES]
            out = "".join(page.image(p, figures.caption(p, p in run.images)) for p in small)
            left = [f"{p.relative_to(run.path)} is larger than {MAX_PICTURE_BYTES >> 20} MiB" for p in chosen
                    if p not in small]
            if len(run.samples) > MAX_SAMPLES:
                left.append(f"{len(run.samples) - MAX_SAMPLES} more in samples/")
            return (f'<div class="grid">{out}</div>' if out else "") + (page.note("Left out:", left) if left else "")
        return self._first_and_others(draw)

    def configuration(self) -> str:
        self.markdown.append("## Settings\n")
        known = [(name, s) for name, s in self.names.items() if s.config]
        keys = differing([s.config for _, s in known])
        table = Table("", "Settings that differ between the rows of the tables; all others are equal." if keys else
                      "No setting differs.", ["Setting", *keys, "steps", "seeds"])
        for name, setting in known:
            cells = [Cell("—" if setting.config.get(key) is None else str(setting.config[key])) for key in keys]
            seeds = ", ".join(str(run.seed) for run in setting.runs)
            table.rows.append([Cell(name), *cells, Cell(str(setting.step)), Cell(seeds)])
        out = self._table(table) if known else ""
        for run in self.runs:
            if run.config:
                text = page.escape(json.dumps(run.config, indent=1, ensure_ascii=False))
                out += f"<details><summary>{page.escape(run.name)}: config.json</summary><pre>{text}</pre></details>\n"
        return out

    def commands(self) -> str:
        self.markdown.append("## Commands\n")
        text = ("From the repository's root; under torchrun any number of processes that divides the batch gives the "
                "same run up to rounding. Bit for bit a run repeats on one kind of machine, torch version and number "
                "of threads.")
        self.markdown.append(page.markdown(text) + "\n")
        out = f"<p>{page.escape(text)}</p>"
        for run in self.runs:
            if not run.config:
                continue
            try:
                line = command_line(run.config)
            except ValueError as error:
                reason = f"not a configuration of this version's tokenizer trainer: {error}"
                out += self._note(f"{run.name}: no command.", [reason])
                continue
            self.markdown.append(f"{page.markdown(run.name)}:\n\n```bash\n{line}\n```\n")
            out += f"<h3>{page.escape(run.name)}</h3><pre>{page.escape(line)}</pre>\n"
        return out

    def protocols(self) -> str:
        self.markdown.append("## Protocols\n")
        out = ""
        for groups in self.groups.values():
            for group in groups:
                entries = {"id": protocol_id(group.protocol)} | flatten(
                    {k: v for k, v in group.protocol.items() if k not in ("id", "warnings")})
                shown = {k: ", ".join(map(str, v)) if isinstance(v, list) else v for k, v in entries.items()}
                shown = {k: "not recorded" if v is None else "none" if v == "" else v for k, v in shown.items()}
                heading = f"Protocol {self.letters[id(group)]}"
                names = ", ".join(run.name for run in self.runs if run.path in group.results)
                self.markdown.append(f"{heading} ({page.markdown(names)}):\n\n" + "".join(
                    f"- {page.markdown(k)}: {page.markdown(v)}\n" for k, v in shown.items()))
                out += f"<h3>{heading}</h3>" + page.definitions(shown | {"runs": names})
        meanings = {m.heading[:-1]: m.meaning for ms, groups in ((RECONSTRUCTION, "reconstruction"),
                                                                 (GENERATION, "generation"))
                    if self.groups[groups] for m in ms.values()}
        self.markdown.append("".join(f"- {page.markdown(k)}: {page.markdown(v)}\n" for k, v in meanings.items()))
        return out + "<h3>Columns</h3>" + page.definitions(meanings) if out else ""


def _cure(run: Run) -> str | None:
    """What the trainer advises if codes fall behind; None: the run's settings do not say."""
    try:
        return pace_flag(argparse.Namespace(**run.config | {"warmup_steps": (run.lengths or [None])[0]}))
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):  # a damaged file's, or an older version's
        return None


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with command(PROG, one_process=True):
        tables = args.out.with_suffix(".md")
        for path in (args.out, tables):
            require_out_file(path)
        runs = read_runs(args.runs)
        report = Report(runs)
        text = report.html()
        args.out.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(args.out, text)
        header = f"# {page.markdown(report.title())}\n\n{page.markdown(report.subtitle())}\n"
        atomic_write_text(tables, "\n".join([header, *report.markdown]))
        for run in runs:
            for note in run.notes:
                ranks.print0(f"note: {run.name}: {note}")
        ranks.print0(f"wrote {args.out} and {tables}")


if __name__ == "__main__":
    main()
