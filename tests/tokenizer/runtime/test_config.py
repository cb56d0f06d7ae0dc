"""tokenizer/runtime/config.py: precedence, types, and the message for every mistake."""

import json
from dataclasses import FrozenInstanceError, dataclass

import pytest

from tokenizer.runtime import config
from tokenizer.runtime.config import REQUIRED, arg


@dataclass(frozen=True)
class Example:
    run_dir: str = arg(REQUIRED, "folder for the results")
    preset: str = arg("small", "which preset", choices=("small", "large"))
    learning_rate: float = arg(1e-4, "learning rate of Adam, 100% of it")
    batch_size: int = arg(8, "images per step")
    max_images: int | None = arg(None, "images per epoch; none for all")
    ema: bool = arg(True, "keep an average")
    compile: bool = arg(False, "use torch.compile")
    seeds: tuple[int, ...] = arg((0, 1), "seeds to run")

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"--batch-size {self.batch_size}: must be positive")


PRESETS = {"small": {}, "large": {"batch_size": 64, "learning_rate": 1e-3, "max_images": 10}}


def parse(*argv):
    return config.parse(
        Example,
        argv,
        presets=PRESETS,
        pick_preset=lambda given: given.get("preset", "small"),
        description="An example.",
        prog="example.py",
    )


def test_precedence_default_preset_file_flag(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"preset": "large", "batch_size": 32, "learning_rate": 1, "seeds": [5]}))
    cfg = parse("--run-dir", "r", "--config", str(file), "--batch-size", "16")
    assert cfg == Example(
        run_dir="r", preset="large", learning_rate=1.0, batch_size=16, max_images=10, seeds=(5,)
    )  # compile, ema: default; max_images: preset; learning_rate, seeds: file; batch_size: flag
    assert type(cfg.learning_rate) is float
    with pytest.raises(FrozenInstanceError):
        cfg.batch_size = 1


@pytest.mark.parametrize(("file", "words", "expected"), [
    ({"max_images": 7, "batch_size": 4}, [], (None, 4)),              # batch_size is last: what the other came from
    ({"max_images": 7, "batch_size": 4}, ["--max-images", "9"], (9, None)),
    ({"max_images": 7}, ["--batch-size", "3"], (None, 3)),
    ({"max_images": 7, "batch_size": 4}, ["--batch-size", "none"], (7, None)),
    ({"max_images": 7}, ["--max-images", "1", "--batch-size", "2"], (1, 2)),  # for the caller to refuse
])
def test_of_settings_that_exclude_each_other_the_command_line_goes_before_the_file(tmp_path, file, words, expected):
    @dataclass(frozen=True)
    class Lengths:
        max_images: int | None = config.arg(None, "images")
        batch_size: int | None = config.arg(None, "batches")

    (tmp_path / "c.json").write_text(json.dumps(file))
    cfg = config.parse(Lengths, ["--config", str(tmp_path / "c.json"), *words],
                       exclusive=("max_images", "batch_size"))
    assert (cfg.max_images, cfg.batch_size) == expected


def test_flag_spelling():
    cfg = parse("--run-dir=r", "--no-ema", "--compile", "--seeds", "3", "4", "--learning-rate", "-0.5")
    assert (cfg.ema, cfg.compile, cfg.seeds, cfg.learning_rate) == (False, True, (3, 4), -0.5)
    assert parse("--run-dir", "r", "--preset", "large", "--max-images", "none").max_images is None


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--run-dir", "r", "--lerning-rate", "1"], ["--lerning-rate", "did you mean --learning-rate?"]),
        (["--run-dir", "r", "--learning_rate=1"], ["--learning_rate", "did you mean --learning-rate?"]),
        (["--run-dir", "r", "--batch", "1"], ["unknown flag --batch", "--batch-size"]),  # no abbreviations
        (["--run-dir", "r", "--vq-ckpt", "1"], ["unknown flag --vq-ckpt\n"]),  # too far from any to guess
        (["--run-dir", "r", "--mearn-bate", "1"], ["unknown flag --mearn-bate\n"]),  # nor for two dashes and an ending
        (["--run-dir", "r", "stray"], ["unexpected 'stray'"]),
        (["--run-dir", "r", "--batch-size", "8.5"], ["--batch-size", "'8.5'", "an integer"]),
        (["--run-dir", "r", "--batch-size", "none"], ["--batch-size", "'none'", "an integer"]),
        (["--run-dir", "r", "--learning-rate", "nan"], ["--learning-rate", "nan", "a finite number"]),
        (["--run-dir", "r", "--preset", "larg"], ["--preset", "'larg'", "small, large", "did you mean large?"]),
        (["--run-dir", "r", "--batch-size", "0"], ["--batch-size 0: must be positive"]),
        (["--run-dir", "r", "--ema", "yes"], ["unexpected 'yes'"]),
        (["--batch-size", "1"], ["--run-dir is required"]),
        (["--config", "/nowhere/c.json"], ["/nowhere/c.json: no such file"]),
    ],
)
def test_mistakes_on_the_command_line(argv, words, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"batchsize": 1}', ["unknown key 'batchsize'", "did you mean batch_size?"]),
        ('{"batch_size": 1.0}', ["batch_size: 1.0 is not an integer"]),
        ('{"batch_size": true}', ["batch_size: True is not an integer"]),
        ('{"learning_rate": "1"}', ["learning_rate: '1' is not a finite number"]),
        ('{"learning_rate": NaN}', ["learning_rate: nan is not a finite number"]),
        ('{"batch_size": null}', ["batch_size: None is not an integer"]),
        ('{"ema": 1}', ["ema: 1 is not true or false"]),
        ('{"seeds": 3}', ["seeds: 3 is not a list"]),
        ('{"seeds": [1, "a"]}', ["seeds: 'a' is not an integer"]),
        ('{"preset": "tiny"}', ["preset: 'tiny' is not one of small, large"]),
        ('{"batch_size": 1,\n}', ["line 2: not JSON"]),
        ("[1]", ["holds a list"]),
    ],
)
def test_mistakes_in_the_file(text, words, tmp_path, capsys):
    file = tmp_path / "c.json"
    file.write_text(text)
    with pytest.raises(SystemExit) as stop:
        parse("--run-dir", "r", "--config", str(file))
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert str(file) in message
    assert all(word in message for word in words), message


def test_presets_are_checked(capsys):
    for presets, words in [
        ({"a": {"batch_siz": 1}}, "preset a: unknown key 'batch_siz'; did you mean batch_size?"),
        ({"b": {}}, "unknown preset 'a'; there are: b"),
    ]:
        with pytest.raises(SystemExit):
            config.parse(Example, ["--run-dir", "r"], presets=presets, pick_preset=lambda _: "a")
        assert words in capsys.readouterr().err


def test_help_has_one_line_per_flag_with_its_default(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    with pytest.raises(SystemExit) as stop:
        parse("--help")
    assert stop.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "An example." in lines
    for flag, parts in {
        "--run-dir": ["folder for the results", "(required)"],
        "--preset": ["{small,large}", "(default: small)"],
        "--learning-rate": ["100% of it", "(default: 0.0001)"],
        "--max-images": ["(default: none)"],
        "--ema": ["--no-ema", "keep an average", "(default: True)"],
        "--seeds": ["(default: 0 1)"],
        "--config": ["FILE.json"],
    }.items():
        [line] = [line for line in lines if line.strip().startswith(flag)]
        assert all(part in line for part in parts), line
    assert "  large: batch_size=64 learning_rate=0.001 max_images=10" in lines


def test_round_trip_and_diff(tmp_path):
    cfg = parse("--run-dir", "r", "--seeds", "7")
    config.save(cfg, tmp_path / "config.json")
    values = config.load(tmp_path / "config.json")
    assert values == config.to_dict(cfg)
    assert values["seeds"] == [7]
    assert config.from_dict(Example, values, "config.json") == cfg
    assert parse("--config", str(tmp_path / "config.json")) == cfg
    assert config.diff(values, values) == []
    assert config.diff({"a": 1, "gone": 2, "same": 3}, {"new": 4, "a": 0, "same": 3}) == [
        ("new", None, 4),
        ("a", 1, 0),
        ("gone", 2, None),
    ]


def test_from_dict_names_its_source():
    with pytest.raises(ValueError, match=r"last\.pt: unknown key 'sees'; did you mean seeds\?"):
        config.from_dict(Example, {"run_dir": "r", "sees": [1]}, "last.pt")
    with pytest.raises(ValueError, match=r"last\.pt: no value for run_dir"):
        config.from_dict(Example, {}, "last.pt")


def test_unsupported_field_is_a_type_error():
    @dataclass(frozen=True)
    class Bad:
        folder: bytes = arg(b"", "not a flag")

    with pytest.raises(TypeError, match="config field folder"):
        config.parse(Bad, [])


@pytest.mark.parametrize(("text", "message"), [
    ('{"a": ', r"^x.jsonl, line 3: not JSON \(Expecting value\)$"),
    ("[1]", r"^x.jsonl, line 3: holds a list, not an object \{\.\.\.\}$"),
])
def test_objects_in_lines(text, message):
    assert config.parse_object('{"a": [1]}', "x.jsonl, line 3") == {"a": [1]}
    with pytest.raises(ValueError, match=message):
        config.parse_object(text, "x.jsonl, line 3")
