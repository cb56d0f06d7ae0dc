"""report.py on hand-made run folders: the tables' arithmetic, what may share one, damaged files, and the page."""

import json
import re
import shlex
import statistics
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from evaluations import report, report_figures
from evaluations.report_runs import group_settings, read_runs
from tokenizer import train_provq
from tokenizer.runtime import config
from tokenizer.runtime.over_seeds import clear_best, merge
from tokenizer.train_config import parse_config

PROTOCOL = {"task": "reconstruction", "reference": {"sha256": "ab", "count": 10}, "crop": "none"}


def make_run(folder, seed=0, psnr=20.0, *, rfid=None, protocol=None, finished=True, flags=(), **evaluation):
    """A run's folder as the trainer leaves it, of two validations."""
    (folder / "images").mkdir(parents=True)
    cfg = parse_config(["--preset", "digits", "--max-steps", "100", "--warmup-steps", "20", "--transition-steps", "30",
                        "--global-seed", str(seed), "--results-dir", str(folder), *flags])
    config.save(cfg, folder / "config.json")
    rows = [{"step": s, "psnr": psnr - 100 + s, "ssim": 0.5, "perplexity": 9.0, "usage": 0.5, "images": 297}
            for s in (50, 100)]
    (folder / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    losses = [{"step": s, "loss": 1 / s, "recon_loss": 1 / s, "alpha": 0.5, "omega": 0.5} for s in (10, 100)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in losses))
    if finished:
        (folder / "summary.json").write_text(json.dumps(rows[-1] | {"warmup_steps": cfg.warmup_steps}))
    Image.new("RGB", (20, 10)).save(folder / "images" / "0000100_stage3_final.png")
    if rfid is not None:
        (folder / "evaluation").mkdir()
        found = {"rfid": rfid, "psnr": psnr, "ssim": 0.5, "lpips": None, "perplexity": 9.0, "usage": 0.5,
                 "code_distance": 1.0, "unavailable": {"lpips": "no weights here"},
                 "protocol": protocol or PROTOCOL} | evaluation
        (folder / "evaluation" / "reconstruction.json").write_text(json.dumps(found))
    return folder


def write(tmp_path, *folders):
    report.main([*map(str, folders), "--out", str(tmp_path / "out" / "r.html")])
    return (tmp_path / "out" / "r.html").read_text(), (tmp_path / "out" / "r.md").read_text()


def rows_of(markdown, title):
    """Cells of the first table whose title starts like this, header first."""
    block = markdown[markdown.index(f"**{title}"):].split("\n\n")[1]
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]
    return [lines[0], *lines[2:]]


def test_seeds_are_one_row_with_mean_and_deviation(tmp_path):
    psnr = [20.0, 21.0, 25.0]
    runs = [make_run(tmp_path / f"s{i}", i, value, rfid=1.0) for i, value in enumerate(psnr)]
    other = [make_run(tmp_path / f"v{i}", i, 10.0 + i, rfid=3.0 + i, flags=["--warmup-steps", "0"]) for i in range(2)]
    _, markdown = write(tmp_path, *runs, *other)
    header, *rows = rows_of(markdown, "Table 1")
    table = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert table["ProVQ"]["Seeds"] == "3"
    assert table["ProVQ"]["PSNR↑"] == f"**22.00 ± {statistics.stdev(psnr):.2f}**"  # 12 dB above the other row
    assert table["Soft Transition"]["PSNR↑"] == "10.50 ± 0.71"
    assert table["ProVQ"]["rFID↓"] == "**1.00 ± 0.00**"
    assert table["ProVQ"]["SSIM↑"] == "0.500 ± 0.000"  # equal: nothing is bold
    assert "no weights here" in markdown


def test_bold_needs_a_spread_on_both_sides():
    clear, close, one = merge([10.0, 11.0]), merge([11.0, 12.0]), merge([99.0])
    assert clear_best([merge([1.0, 2.0]), clear], True) == 1
    assert clear_best([merge([1.0, 2.0]), clear], False) == 0
    assert clear_best([clear, close], True) is None
    assert clear_best([one, clear], True) is None
    assert clear_best([clear, None], True) is None
    assert merge([None]) is None


def test_protocols_never_share_a_table(tmp_path):
    same = make_run(tmp_path / "a", 0, rfid=7.25)
    other = make_run(tmp_path / "b", 1, rfid=2.0, protocol=PROTOCOL | {"crop": "center"})
    html, markdown = write(tmp_path, same, other)
    tables = [block for block in markdown.split("###") if "Table 1" in block]
    assert len(tables) == 3  # two protocols, and the trainer's validation as common ground
    assert ["7.25" in t for t in tables[:2]] == [True, False]
    assert "The protocols differ in: crop" in html


def test_table_5_and_6_name_the_curriculum(tmp_path):
    lengths = {"vanilla": (0, 0), "soft": (0, 30), "warmup": (20, 0), "provq": (20, 30)}
    runs = [make_run(tmp_path / name, flags=["--warmup-steps", str(w), "--transition-steps", str(t)], rfid=1.0)
            for name, (w, t) in lengths.items()]
    runs.append(make_run(tmp_path / "hard", flags=["--transition", "hard"], rfid=2.0))
    plain = ["--codebook-l2-norm", "--warmup-steps", "0", "--transition-steps", "0"]
    runs.append(make_run(tmp_path / "llama", flags=plain, rfid=2.0))
    _, markdown = write(tmp_path, *runs)
    _, *rows = rows_of(markdown, "Table 5")
    assert {(row[0], row[1]) for row in rows} == {
        ("Vanilla", "—"), ("Vanilla", "+ Soft Transition"), ("Vanilla", "+ Manifold Warmup"),
        ("Vanilla", "+ Both (ProVQ)"), ("Vanilla", "+ Both (ProVQ), hard"), ("LlamaGen (unit norm)", "—")}
    assert {row[1]: row[2] for row in rows if row[0] == "Vanilla"}["+ Soft Transition"] == "0 / 30 / 100"
    _, *rows = rows_of(markdown, "Table 6")
    assert sorted(row[1] for row in rows) == ["cosine", "cosine", "hard"]


def test_damaged_and_unfinished_runs_are_read_as_far_as_possible(tmp_path, capsys):
    run = make_run(tmp_path / "run", finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 110, "lo')
    (run / "images" / "0000050_stage2_end.png").write_bytes(b"\x89PNG\r\n\x1a\n torn")
    (run / "latents").mkdir()
    (run / "latents" / "0000020_stage1_end.npz").write_bytes(b"torn")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "generation.json").write_text("[]")
    html, _ = write(tmp_path, run)
    said = capsys.readouterr().out
    for note in ("unfinished: step 100 of 100", "metrics.jsonl: 1 line(s) torn", "0000050_stage2_end.png is torn",
                 "0000020_stage1_end.npz is damaged", "generation.json is no JSON object"):
        assert note in said
        assert note in html
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text("")
    write(tmp_path, bare)


@pytest.mark.parametrize(("key", "value"), [
    ("quantizer", ["vq"]), ("transition", 3), ("recluster", "yes"), ("recluster_at", 500),
    ("codebook_lr_scale", "10"), ("codebook_restart_below", [1]), ("global_seed", {}),
])
def test_settings_that_no_trainer_writes_are_unknown(tmp_path, key, value):
    run = make_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(config | {key: value}))
    html, markdown = write(tmp_path, run)
    assert f"config.json: {key} is " in html.replace("&quot;", '"')
    assert "train_provq.py" not in markdown  # no command of settings that are not known


def test_what_is_no_run_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for paths, said in (([tmp_path / "none"], "none is no folder"), ([tmp_path / "empty"], "empty is no run"),
                        ([run, run], "given twice")):
        with pytest.raises(SystemExit, match=said):
            write(tmp_path, *paths)
    with pytest.raises(SystemExit):
        report.main([str(run), "--out", str(tmp_path / "page.txt")])
    assert not (tmp_path / "out").exists()


def test_a_repeated_seed_is_no_second_sample(tmp_path):
    runs = read_runs([make_run(tmp_path / name, 5) for name in ("a", "b")])
    setting, = group_settings(runs, report.IGNORED)
    assert len(setting.seeds) == 1
    assert any("repeats seed 5" in note for run in runs for note in run.notes)


class Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.links, self.ids = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href"):
                self.links.append(value)
            if name == "id":
                self.ids.append(value)


def test_the_page_needs_nothing_else(tmp_path):
    runs = [make_run(tmp_path / name, i, rfid=1.0, protocol=PROTOCOL | {"crop": "<i>&"})
            for i, name in enumerate(["<script>&amp", "plain"])]
    html, markdown = write(tmp_path, *runs)
    page = Page()
    page.feed(html)
    assert "script" not in page.tags
    assert "<i>&" not in html
    assert "<i>" not in markdown
    assert all(link.startswith(("#", "data:")) for link in page.links)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links if link.startswith("#")} <= set(page.ids)
    assert "img" in page.tags
    assert "svg" in page.tags


def test_commands_give_the_configuration_back(tmp_path):
    run = make_run(tmp_path / "a b", 3, flags=["--ema", "--codebook-size", "64", "--lr", "0.5",
                                              "--recluster-at", "95", "98"])
    cfg = config.load(run / "config.json")
    words = re.sub(r"\\\n", " ", report.command_line(cfg)).replace("'", "\"")
    assert config.to_dict(parse_config(shlex.split(words)[2:])) == cfg


def test_snapshots_of_a_real_run(tmp_path):
    flags = ("--image-size 16 --codebook-size 32 --global-batch-size 16 --max-steps 6 --warmup-steps 2 --val-size 20 "
             "--transition-steps 2 --kmeans-batches 4 --log-every 2 --val-every 2 --device cpu").split()
    run = tmp_path / "run"
    train_provq.main([*flags, "--results-dir", str(run)])
    found = {p.name: dict(np.load(p)) for p in sorted((run / "latents").glob("*.npz"))}
    assert list(found) == ["0000002_codebook_initialised.npz", "0000002_stage1_end.npz", "0000004_stage2_end.npz",
                           "0000006_stage3_final.npz"]
    for name, snapshot in found.items():
        codes = 0 if "stage1" in name else 32
        assert snapshot["codes"].shape == (codes, snapshot["latents"].shape[1])
        assert snapshot["counts"].sum() == (20 * 16 if codes else 0)  # every token of the validation images
    html, markdown = write(tmp_path, run)
    assert "stage2 end, step 4" in html
    assert "python tokenizer/train_provq.py" in markdown


def test_the_warm_ups_scores_are_drawn_apart():
    """A continuous autoencoder's: hollow, and not on the line of the tokenizer. Runs before 0.3 wrote 0 codes."""
    for without in (None, 0.0):
        found = ((1, 30.0, without), (2, 31.0, without), (3, 20.0, 0.5))
        rows = [{"step": step, "psnr": psnr, "usage": usage} for step, psnr, usage in found]
        run = SimpleNamespace(metrics=[], validation=rows, stage_ends=[2])
        figure = Figure()
        axis = figure.subplots()
        assert report_figures.draw_curve(axis, run, "psnr", "red", validation=True, label="run")
        apart, line, _ = axis.lines
        assert (list(apart.get_xdata()), list(line.get_xdata())) == ([1, 2], [3])
        assert (apart.get_markerfacecolor(), line.get_label()) == ("none", "run")
