"""One frozen dataclass <-> command line <-> JSON.

    @dataclass(frozen=True)
    class TrainConfig:
        run_dir: str = arg(REQUIRED, "folder for checkpoints and metrics")
        quantizer: str = arg("vq", "nearest-code rule", choices=("vq", "simvq"))
        lr: float = arg(1e-4, "learning rate of Adam")
        compile: bool = arg(False, "use torch.compile")
        max_images: int | None = arg(None, "images per epoch; none for all")

    cfg = parse(TrainConfig)   # --run-dir runs/a --lr 2e-4 --compile --max-images none

A field is a bool, int, float or str, one of these or None, or a tuple[int, ...] (a flag with several words). The
JSON keys are the field names; the flags are the field names with hyphens.
"""

import argparse
import dataclasses
import difflib
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from tokenizer.runtime.files import atomic_write_text
from tokenizer.runtime.parsing import brief, from_json, read_json

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

REQUIRED: Final = object()  # the default of a field that the user has to give

_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a string"}
_INTEGER = re.compile(r"\s*[+-]?[\d_]+\s*")


def arg(default: Any, help: str, *, choices: Sequence[Any] | None = None, fraction: bool = False) -> Any:
    """A dataclass field with its help text and, optionally, the values that it may take.

    fraction: an int that may be given as a float between 0 and 1 as well, a share of what only the program knows. It
    is a float then until the program replaces it.
    """
    metadata = {"help": help, "choices": tuple(choices) if choices is not None else None, "fraction": fraction}
    if default is REQUIRED:
        return dataclasses.field(kw_only=True, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Given:
    """What a user said, as against what presets and defaults add."""

    values: Mapping[str, Any]                  # of the command line and of --config FILE.json, by field name
    unsaid: Mapping[str, tuple[Any, ...]]      # of every field: its default, and the preset's value if that has one
    said_in: Mapping[str, str]                 # field name -> the file that says it, where the command line does not

    def shown(self, name: str) -> str:
        """One of the values as it was given: --flag value, and the file that it is in."""
        value, flag = self.values[name], flag_name(name)
        if isinstance(value, bool):
            words = flag if value else f"--no-{flag[2:]}"
        else:
            words = f"{flag} {' '.join(map(str, value)) if isinstance(value, tuple) else value}"
        return f"{self.said_in[name]}: {words}" if name in self.said_in else words


def parse(cls: type[Config], argv: Sequence[str] | None = None, **options: Any) -> Config:
    """The configuration alone of `parse_given`, whose options these are."""
    return parse_given(cls, argv, **options)[0]


def parse_given(
    cls: type[Config],
    argv: Sequence[str] | None = None,
    *,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
    pick_preset: Callable[[dict[str, Any]], str] | None = None,
    exclusive: Sequence[str] = (),
    refuse: Callable[[Any, Given], object] | None = None,
    description: str = "",
    prog: str | None = None,
) -> tuple[Config, Given]:
    """The configuration that a command line asks for: field defaults < preset < --config FILE.json < explicit flags;
    and what of it was said by the user.

    argv:         words after the program's name; None for those of this process
    presets:      name -> {field: value}
    pick_preset:  gets what the user gave explicitly (file and flags) and returns the name of the preset to apply
    exclusive:    fields that say one thing in different ways, such as max_steps and epochs: one that the user gives
                  takes the place of the preset's, one of the command line that of the file's; of several in a file
                  the last of these names counts, as a run records also what it derived from it
    refuse:       gets what is returned here, and raises ValueError for what makes no sense in it

    User mistakes end the program with status 2 and a message that names the flag or key, the value, and the nearest
    valid name. So does a ValueError from the dataclass's __post_init__ or from refuse.
    """
    assert (presets is None) == (pick_preset is None), "presets and pick_preset come together"
    flags = _flags(cls)
    parser = _build_parser(flags, presets or {}, description, prog)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        parser.error(_unknown_words(unknown, flags))
    given = dict(vars(namespace))
    path = given.pop("config", None)
    given = {name: tuple(value) if flags[name].several else value for name, value in given.items()}
    try:
        from_file = _checked(flags, load(path), str(path)) if path is not None else {}
        explicit = {**from_file, **given}
        several = [field for field in exclusive if explicit.get(field) is not None]
        kept = [field for field in several if field in given] or several[-1:]
        explicit = {name: value for name, value in explicit.items() if name not in several or name in kept}
        preset: dict[str, Any] = {}
        if presets is not None and pick_preset is not None:
            name = pick_preset(dict(explicit))
            if name not in presets:
                raise ValueError(f"unknown preset {name!r}{_nearest(name, presets)}; there are: {', '.join(presets)}")
            preset = _checked(flags, presets[name], f"preset {name}")
            if any(explicit.get(field) is not None for field in exclusive):
                preset = {field: value for field, value in preset.items() if field not in exclusive}
        values = {**preset, **explicit}
        for name, flag in flags.items():
            if flag.default is REQUIRED and name not in values:
                raise ValueError(f"{flag.option} is required: {flag.help}")
        unsaid = {name: (flag.default, preset.get(name, flag.default)) for name, flag in flags.items()}
        cfg = cls(**values)
        said = Given(explicit, unsaid, {name: str(path) for name in from_file if name not in given})
        if refuse is not None:
            refuse(cfg, said)
        return cfg, said
    except ValueError as error:
        parser.error(str(error))


def require_at_least(cfg: object, low: float, names: str) -> None:
    """ValueError, naming flag and value, for a setting among names (separated by spaces) below low. None passes.

    So it is for a number that is not finite, and an integer beyond 64 bits. Of several values every one is checked.
    """
    _require(cfg, names, lambda value: value >= low, f"at least {low}")


def require_positive(cfg: object, names: str) -> None:
    """The same for settings that must be above 0."""
    _require(cfg, names, lambda value: value > 0, "positive")


def _require(cfg: object, names: str, good: Callable[[float], bool], what: str) -> None:
    for name in names.split():
        values = getattr(cfg, name)
        for value in values if isinstance(values, (list, tuple)) else [values]:
            if value is None:
                continue
            too_large = value >= (2**63 if isinstance(value, int) else math.inf)
            if too_large or not good(value):
                limit = "" if not too_large else " and below 2^63" if isinstance(value, int) else " and finite"
                raise ValueError(f"{flag_name(name)} is {value}; it must be {what}{limit}")


def require_fraction(cfg: "DataclassInstance", names: str) -> None:
    """ValueError, naming flag and value, for a setting among names (separated by spaces) outside [0, 1)."""
    for name in names.split():
        if not 0 <= getattr(cfg, name) < 1:
            raise ValueError(f"{flag_name(name)} is {getattr(cfg, name)}; it must lie in [0, 1)")


def require_at_most(cfg: "DataclassInstance", high: float, names: str) -> None:
    """ValueError, naming flag and value, for a setting among names above high, where memory ends. None passes."""
    for name in names.split():
        value = getattr(cfg, name)
        if value is not None and value > high:
            raise ValueError(f"{flag_name(name)} is {value}; it must be at most {high}")


def flag_name(field: str) -> str:
    """max_steps -> --max-steps"""
    return "--" + field.replace("_", "-")


def from_dict(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Rebuild a configuration, such as a run's. ValueError, starting with source, for a wrong key or value."""
    flags = _flags(cls)
    checked = _checked(flags, _mapping(values, source), source)
    missing = [name for name, flag in flags.items() if flag.default is REQUIRED and name not in checked]
    if missing:
        raise ValueError(f"{source}: no value for {', '.join(missing)}")
    return _built(cls, checked, source)


def pick(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    """Rebuild a configuration out of a larger one, by all fields of this class, which need no arg().

    ValueError, starting with source: a wrong value, or none; a default could differ from what weights were made with.
    """
    flags = _flags(cls, described=False)
    missing = [name for name in flags if name not in _mapping(values, source)]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}")
    return _built(cls, _checked(flags, {name: values[name] for name in flags}, source), source)


def _mapping(values: Any, source: str) -> Mapping[str, Any]:
    if not isinstance(values, Mapping):
        raise ValueError(f"{source} is a {type(values).__name__}, not values by name")
    return values


def _built(cls: type[Config], values: Mapping[str, Any], source: str) -> Config:
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def to_dict(cfg: "DataclassInstance") -> dict[str, Any]:
    """Field name -> primitive (tuples become lists), as in the JSON file and in checkpoints."""
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def save(cfg: "DataclassInstance", path: str | Path) -> None:
    """Write the configuration as JSON, atomically; `--config` and `load` read it back."""
    atomic_write_text(path, json.dumps(to_dict(cfg), indent=2, allow_nan=False) + "\n")


def load(path: str | Path) -> dict[str, Any]:
    """Read a JSON object. ValueError naming the file, and the line where it is not JSON."""
    try:
        values = read_json(path)
    except FileNotFoundError as error:
        raise ValueError(str(error)) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, a configuration is an object {{...}}")
    return values


def parse_object(text: str, where: str) -> dict[str, Any]:
    """A JSON object, such as a line of a JSONL file. ValueError, starting with where: something else."""
    value = from_json(text, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where}: holds a {type(value).__name__}, not an object {{...}}")
    return value


def diff(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) where they differ, in the order of new; an absent key counts as None."""
    keys = [*new, *(key for key in old if key not in new)]
    return [(key, old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)]


@dataclasses.dataclass(frozen=True)
class _Flag:
    """What one dataclass field accepts, from text and from JSON."""

    name: str
    kind: type  # bool, int, float or str
    optional: bool  # may be None
    several: bool  # is a tuple of `kind`
    choices: tuple[Any, ...] | None
    default: Any
    help: str
    fraction: bool = False  # an int, or a float between 0 and 1

    @property
    def option(self) -> str:
        return flag_name(self.name)

    def check(self, value: Any) -> Any:
        """The value as the field's type. ValueError saying what was expected."""
        if not self.several:
            return self._check_one(value)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{brief(value)} is not a list")
        return tuple(self._check_one(item) for item in value)

    def _check_one(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if self.kind is float and type(value) is int and abs(value) < 2**53:  # larger ones are no float exactly
            value = float(value)
        if self.fraction and isinstance(value, float):
            if not 0 < value < 1:
                raise ValueError(f"{brief(value)} is neither {_WORDS[int]} nor a fraction between 0 and 1")
            return value
        if type(value) is not self.kind or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{brief(value)} is not {_WORDS[self.kind]}")
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError(f"{brief(value)} does not fit into 64 bits")
        if value == "":  # as a path it would mean the current folder
            raise ValueError("the text is empty; leave the setting out, or for the current folder write a dot")
        if self.choices is not None and value not in self.choices:
            valid = ", ".join(map(str, self.choices))
            raise ValueError(f"{brief(value)} is not one of {valid}{_nearest(str(value), map(str, self.choices))}")
        return value

    def read(self, text: str) -> Any:
        """One word of the command line. argparse puts the flag's name in front of the message."""
        try:
            if self.optional and text.lower() == "none":
                return None
            try:
                value = float(text) if self.fraction and not _INTEGER.fullmatch(text) else self.kind(text)
            except ValueError as error:
                what = f"neither {_WORDS[int]} nor a fraction" if self.fraction else f"not {_WORDS[self.kind]}"
                raise ValueError(f"{text!r} is {what}") from error
            return self._check_one(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error


def _flags(cls: type["DataclassInstance"], *, described: bool = True) -> dict[str, _Flag]:
    """By field name. described: every field must have its help, for a command line."""
    hints = typing.get_type_hints(cls)
    return {field.name: _flag(field, hints[field.name], described) for field in dataclasses.fields(cls)}


def _flag(field: "dataclasses.Field[Any]", hint: Any, described: bool) -> _Flag:
    optional = several = False
    kind = hint
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        members = [member for member in typing.get_args(kind) if member is not type(None)]
        optional = len(members) < len(typing.get_args(kind))
        kind = members[0] if len(members) == 1 else None
    elif typing.get_origin(kind) is tuple and typing.get_args(kind)[1:] == (...,):
        several, kind = True, typing.get_args(kind)[0]
    unfit = kind not in _WORDS or (several and kind is bool) or field.name == "config"
    if unfit or (described and "help" not in field.metadata):
        raise TypeError(f"config field {field.name}: {hint} without arg(), of an unsupported type, or called config")
    return _Flag(
        name=field.name,
        kind=kind,
        optional=optional,
        several=several,
        choices=field.metadata.get("choices"),
        default=REQUIRED if field.default is dataclasses.MISSING else field.default,
        help=field.metadata.get("help", ""),
        fraction=field.metadata.get("fraction", False),
    )


def _checked(flags: Mapping[str, _Flag], values: Mapping[str, Any], source: str) -> dict[str, Any]:
    checked = {}
    for name, value in values.items():
        if name not in flags:
            raise ValueError(f"{source}: unknown key {brief(name)}{_nearest(str(name)[:100], flags)}")
        try:
            checked[name] = flags[name].check(value)
        except ValueError as error:
            raise ValueError(f"{source}: {name}: {error}") from error
    return checked


def _build_parser(
    flags: Mapping[str, _Flag], presets: Mapping[str, Mapping[str, Any]], description: str, prog: str | None
) -> argparse.ArgumentParser:
    lines = [f"  {name}: {' '.join(f'{k}={v}' for k, v in values.items())}" for name, values in presets.items()]
    parser = argparse.ArgumentParser(
        prog=prog,
        usage="%(prog)s [--config FILE.json] [--flag value ...]   (--help lists the flags)",
        description=description,
        epilog="\n".join(["presets:", *lines]) if presets else None,
        # One line per flag, however long: the terminal wraps it, and grep finds flag, help and default together.
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=48, width=1000),
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # only what the user gave explicitly ends up in the namespace
    )
    parser.add_argument("--config", metavar="FILE.json", help="values by field name; explicit flags override them")
    for flag in flags.values():
        help_text = f"{flag.help} ({_default_text(flag)})".replace("%", "%%")
        if flag.kind is bool:
            action = parser.add_argument(flag.option, dest=flag.name, action=argparse.BooleanOptionalAction)
            action.help = help_text  # set afterwards: some Python versions append a default of their own
            continue
        metavar = "{" + ",".join(map(str, flag.choices)) + "}" if flag.choices is not None else flag.kind.__name__
        metavar += "|fraction" if flag.fraction else ""
        parser.add_argument(
            flag.option,
            dest=flag.name,
            type=flag.read,
            nargs="+" if flag.several else None,
            metavar=metavar.upper() if flag.choices is None else metavar,
            help=help_text,
        )
    return parser


def _default_text(flag: _Flag) -> str:
    if flag.default is REQUIRED:
        return "required"
    if flag.default is None:
        return "default: none"
    if flag.several:
        return f"default: {' '.join(map(str, flag.default))}"
    return f"default: {flag.default if flag.default != '' else repr('')}"


def _unknown_words(words: Sequence[str], flags: Mapping[str, _Flag]) -> str:
    valid = ["--config", "--help", *(flag.option for flag in flags.values())]
    valid += [f"--no-{flag.option[2:]}" for flag in flags.values() if flag.kind is bool]
    for word in words:
        if word.startswith("--"):
            name = word.partition("=")[0]
            return f"unknown flag {name}{_nearest(name, valid)}"
    return f"unexpected {words[0]!r}: every value follows its --flag"


def _nearest(name: str, valid: Iterable[str]) -> str:
    words = {word.lstrip("-"): word for word in valid}  # the dashes of a flag are no likeness
    name = name.lstrip("-")
    match = [word for word in words if len(name) > 2 and word.startswith(name)]
    match = match or difflib.get_close_matches(name, words, n=1, cutoff=0.7)  # below: mere likeness, not a slip
    return f"; did you mean {words[match[0]]}?" if match else ""
