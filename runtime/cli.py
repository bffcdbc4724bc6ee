"""Turn the words of the command line into Configs, or into a text that is printed instead of a run.

Options, their help and their values come from Config. No torch is imported: --help and mistakes are answered at once.
"""

import argparse
import contextlib
import itertools
import re
import textwrap
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, get_args, get_origin

import shtab
import yaml
from docstring_parser import parse_from_object

from config import GROUPS, HINTS, SITES, SWEEPS, Config, number_of, unused_by
from runtime.checks import choices, explained, kind_of, near, require

DEFAULT_SWEEP, CACHE = "tiny", "cache"
HELP = {param.arg_name: param.description for group in GROUPS for param in parse_from_object(group).params}
WIDTH, INDENTED = 80, dict(initial_indent="    ", subsequent_indent="    ")
DESCRIPTION = """Train sparse dictionaries on a transformer's activations.

  python main.py                        the tiny sweep: minutes, no network
  python main.py gpt2 --target-l0 8 16  another sweep, one field at two values
  python main.py list                   the sweeps that have names
  python main.py cache --output-dir a   record a sweep's activations in a folder
  python main.py --activations a        train on those
  nn-decompositions completion          a script that completes all this in bash

A run trains every Config of the sweep with every combination of the values
given. Defaults below are those of the sweep {sweep}."""


class Options(NamedTuple):
    """What the command line asks for: a sweep to train, to estimate or to record activations of, or one to resume."""

    name: str  # of the sweep, or of its model where none is named: its folder begins with it
    cfgs: list[Config]
    resume: str | None = None
    dry_run: bool = False
    is_cache: bool = False


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(words: list[str]) -> Options:
    """Read the words. Raises ValueError at an option, a sweep, a file or a value that does not exist."""
    is_cache = words[:1] == [CACHE]
    require(CACHE not in words[1:], f"{CACHE}: give it first, and once")
    dashed = [
        re.sub("^--[^=]*", lambda option: option[0].replace("_", "-"), word) for word in words[is_cache:]
    ]  # W&B: --target_l0=16
    known, unknown = _parser(DEFAULT_SWEEP).parse_known_args(dashed)
    wrong = " ".join("".join(unknown[:1]).split())  # the error is one line, whatever the word
    meant = near(wrong.split("=")[0], OPTIONS)
    require(not unknown, f"{wrong}: no such option; {meant}python main.py --help lists them")
    asked = vars(known)
    given = {name: tuple(asked[name]) for name in HINTS if name in asked}
    for name, values in given.items():
        require(values, f"{_option(name)}: no value; give one or several after it")
    whole = not is_cache or not asked.keys() & {"resume", "dry_run"}
    require(whole, "cache: takes neither --resume nor --dry-run; the same command goes on where it stopped")
    if "resume" in asked:
        alone = asked["resume"] and len(asked) == 1
        require(alone, "--resume: give it one folder and no other option; the Configs are in the folder")
        return Options(DEFAULT_SWEEP, [], asked["resume"])
    sweep, names = asked.get("sweep", DEFAULT_SWEEP), (*SWEEPS, *TEXTS, CACHE)
    require(sweep not in TEXTS, f"{sweep}: give it no other word")
    require(sweep in SWEEPS, f"sweep = {sweep!r}: {near(sweep, names)}give one of {', '.join(names)}")
    if "overrides" in asked:
        given = read_overrides(Path(asked["overrides"])) | given
    given = {name: tuple(_value(value, HINTS[name]) for value in values) for name, values in given.items()}
    cfgs = override(SWEEPS[sweep](), given)
    new = f"output_dir = {cfgs[0].output_dir!r}: give a folder for the activations"
    require(not is_cache or cfgs[0].output_dir != Config.output_dir, new)
    name = asked.get("sweep") or re.sub(r"[^\w.-]", "-", Path(cfgs[0].model_name).name) or "model"
    return Options(name, cfgs, dry_run="dry_run" in asked, is_cache=is_cache)


def answer(words: list[str]) -> str | None:
    """Write the text that the words ask for in place of a run, if they do: help, the sweeps, completion."""
    if {"-h", "--help"} & set(words):
        first = next((word for word in words if word not in (CACHE, "-h", "--help")), DEFAULT_SWEEP)
        return _parser(first if first in SWEEPS else DEFAULT_SWEEP).format_help().rstrip()
    return TEXTS[words[0]]() if len(words) == 1 and words[0] in TEXTS else None


def sweeps() -> str:
    """List the sweeps that have names: how many SAEs, on how many activations, and what they are."""
    lines = []
    for name, make in SWEEPS.items():
        tokens = [cfg.num_tokens for cfg in make()]
        activations = " to ".join(f"{end:,}" for end in sorted({min(tokens), max(tokens)}))
        lines.append(f"{name}: {number_of(make())} on {activations} activations")
        lines += textwrap.wrap((make.__doc__ or "").strip().split("\n")[0], WIDTH, **INDENTED)
    return "\n".join(lines)


def completion() -> str:
    """Write a script for bash that completes options, their values where they are few, and the names of sweeps."""
    parser = _parser(DEFAULT_SWEEP)
    values = {"sweep": (*SWEEPS, *TEXTS, CACHE)} | {name: choices(hint) for name, hint in HINTS.items()}
    values |= dict.fromkeys(("site", "target_site"), tuple(SITES))  # and any other hook
    for action in parser._actions:
        action.choices = values.get(action.dest) or None
    return shtab.complete(parser, "bash").rstrip()


TEXTS = {"list": sweeps, "completion": completion}


def read_overrides(file: Path) -> dict[str, tuple]:
    """Read a file of fields of Config, each with a value or a list of those that it is swept over: YAML, so JSON too.

    One value of a field of several numbers is a list. Raises ValueError when the file does not hold that.
    """
    said, such = f"--overrides: {file}", "give lines such as target_l0: [16, 32]"
    require(file.is_file(), f"{said}: no such file; give a YAML or JSON file of Config's fields")
    with explained(f"{said}: not YAML or JSON", Exception, remedy=such):  # PyYAML meets a wrong tag with any error
        loader = yaml.SafeLoader(file.read_bytes().replace(b"\t", b" "))  # JSON alone may be indented with tabs
        node = loader.get_single_node()
        pairs = loader.construct_pairs(node, deep=True) if isinstance(node, yaml.MappingNode) else []
    require(pairs, f"{said}: no fields and values; {such}")
    given: dict[str, tuple] = {}
    for name, value in pairs:
        known = isinstance(name, str) and name in HINTS
        require(known, f"{said}: {name!r} is no field of Config; {near(name, HINTS)}--help lists them")
        require(name not in given, f"{said}: {name} is given twice; give one list of its values")
        require(value != [], f"{said}: {name} = []: no value; give one or several")
        several = value if isinstance(value, list) else [value]
        takes_list = isinstance(getattr(Config(), name), tuple)  # layer, mostly one number, is swept over a list
        given[name] = (value,) if takes_list and not isinstance(several[0], list) else tuple(several)
    return given


def override(cfgs: list[Config], given: dict[str, tuple]) -> list[Config]:
    """Give the sweep other values: each Config times every combination of them, without repeats."""
    given = dict(given)
    if types := given.pop("sae_type", ()):
        known = [cfg for cfg in cfgs if cfg.sae_type in types]
        cfgs = known + [replace(cfgs[0], sae_type=t) for t in types if t not in [cfg.sae_type for cfg in known]]
    combined = [replace(cfg, **dict(zip(given, row))) for cfg in cfgs for row in itertools.product(*given.values())]
    return list({cfg.name: cfg for cfg in combined}.values())


def _parser(sweep: str) -> Parser:
    """Make the parser, whose help shows the defaults of a sweep."""
    parser = Parser(
        prog="nn-decompositions", usage="python main.py [SWEEP] [--OPTION VALUE ...]", allow_abbrev=False,
        description=DESCRIPTION.format(sweep=sweep), formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, add_help=False,
    )  # fmt: skip
    add = parser.add_argument_group("the sweep").add_argument
    add("sweep", nargs="?", metavar="SWEEP", help=f"One of {', '.join(SWEEPS)} (default: {DEFAULT_SWEEP}).")
    overrides = "YAML or JSON file of the options below, such as target_l0: [16, 32]. The command line wins over it."
    add("--overrides", metavar="FILE", help=overrides)
    add("--dry-run", action="store_true", help="Print Configs, parameters and memory; train and write nothing.")
    add("--resume", metavar="FOLDER", help="Go on with a sweep that was stopped. Takes no other option.")
    add("-h", "--help", action="store_true", help="Show this text.")
    cfgs = SWEEPS[sweep]()
    for group in GROUPS:
        add = parser.add_argument_group(group.__doc__).add_argument
        for name in group.__annotations__:
            used = [cfg for cfg in cfgs if name not in unused_by(cfg.sae_type)] or cfgs
            default = ", ".join(dict.fromkeys(written(getattr(cfg, name)) for cfg in used))
            text = f"{HELP[name]} (default: {default})".replace("%", "%%")
            add(_option(name), nargs="*", metavar=_metavar(name), help=text)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


OPTIONS = ("--help", "--resume", "--overrides", "--dry-run", *map(_option, HINTS))


def _metavar(name: str) -> str:
    if allowed := choices(HINTS[name]):
        return f"{{{','.join(allowed)}}}"
    kind, _, optional = kind_of(HINTS[name])
    one, *more = get_args(kind) or (kind,)
    return one.__name__.upper() + ",..." * bool(more) + "|None" * optional


def written(value: Any) -> str:
    """Write a field's value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


def _value(word: Any, hint: Any) -> Any:
    """Read a word, or a value of a file, as its field takes it; leave what it does not take for Config to refuse."""
    kind, _, optional = kind_of(hint)
    if word == "None" and optional:
        return None
    if get_origin(kind) is tuple:
        return tuple(_value(part, get_args(kind)[0]) for part in written(word).split(","))
    if kind is bool:
        return {"true": True, "false": False}.get(str(word).lower(), word)
    for read in (int, float) if kind in (int, float) else ():
        with contextlib.suppress(ValueError):
            number = read(str(word))
            return int(number) if kind is int and number % 1 == 0 else number  # 1e6 is an int too, and a word in YAML
    return word
