"""Turn the words of the command line into Configs, or into a text that is printed instead of a run.

Options, their help texts and their values come from Config. No torch is imported, so that --help and mistakes are
answered at once.
"""

import argparse
import contextlib
import functools
import itertools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

import docstring_parser
import yaml

from config import GROUPS, HINTS, SWEEPS, Config, unused_by
from runtime.checks import choices, explained, kind_of, near, require

DEFAULT_SWEEP = "tiny"
TEXTS = ("list", "completion")
WIDTH = 80
DESCRIPTION = """Train sparse dictionaries on a transformer's activations.

  python main.py                        the tiny sweep: minutes, no network
  python main.py gpt2 --top-k 8 16 32   another sweep, one field at three values
  python main.py list                   the sweeps that have names
  python main.py completion             a script that completes all this in bash

A run trains every Config of the sweep times every combination of the values
given. Defaults below are those of the sweep {sweep}."""
COMPLETION = """\
# Completes main.py's options, their values and the sweeps, after python, torchrun or alone.
_main_py() {{
    local word option= start= words= cur=${{COMP_WORDS[COMP_CWORD]}} i
    for ((i = 0; i < COMP_CWORD; i++)); do
        word=${{COMP_WORDS[i]}}
        case $word in
            main.py | */main.py) start=$i option= ;;
            --*) option=${{word//_/-}} ;;
        esac
    done
    COMPREPLY=()
    [ -n "$start" ] || return 0
    [ "$cur" != = ] || cur=
    case $cur in
        -*) words="{options}" ;;
        *) case $option in
            "") [ $COMP_CWORD -gt $((start + 1)) ] || words="{first}" ;;
{cases}
        esac ;;
    esac
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _main_py main.py python python3 torchrun"""


@dataclass(frozen=True)
class Options:
    """What the command line asks for: a sweep to train or to estimate, or one to resume."""

    sweep: str = DEFAULT_SWEEP
    given: dict[str, tuple] = field(default_factory=dict)
    """Fields of Config and the values that each is swept over, from the words and the file of --overrides."""
    resume: str | None = None
    dry_run: bool = False

    def configs(self) -> list[Config]:
        """Make the Configs of the sweep. Raises ValueError at a value that its field does not take."""
        return override(SWEEPS[self.sweep](), self.given)


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(words: list[str]) -> Options:
    """Read the words. Raises ValueError at an option, a sweep or a file that does not exist."""
    known, unknown = _parser(DEFAULT_SWEEP).parse_known_args([_dashed(word) for word in words])
    wrong = next((word for word in words if _dashed(word) in unknown), "")
    meant = near(wrong.split("=")[0], ["--resume", "--overrides", "--dry-run", *map(_option, HINTS)])
    require(not unknown, f"{wrong}: no such option; {meant}python main.py --help lists them")
    given = {name: tuple(values) for name in HINTS if (values := getattr(known, name)) is not None}
    for name, values in given.items():
        require(values, f"{_option(name)}: no value; give one or several after it")
    if known.resume is not None:
        alone = known.sweep is None and known.overrides is None and not known.dry_run and not given
        require(alone, "--resume: give it one folder and no other option; the Configs are in the folder")
        return Options(resume=known.resume)
    sweep = DEFAULT_SWEEP if known.sweep is None else known.sweep
    require(sweep not in TEXTS, f"{sweep}: give it no other word")
    names = (*SWEEPS, *TEXTS)
    require(sweep in SWEEPS, f"sweep = {sweep!r}: {near(sweep, names)}give one of {', '.join(names)}")
    if known.overrides is not None:
        given = read_overrides(Path(known.overrides)) | given
    given = {name: tuple(_value(value, name) for value in values) for name, values in given.items()}
    return Options(sweep, given, dry_run=known.dry_run)


def answer(words: list[str]) -> str | None:
    """Write the text that the words ask for in place of a run, if they do: help, the sweeps, completion."""
    if {"-h", "--help"} & set(words):
        first = next((word for word in words if word not in ("-h", "--help")), DEFAULT_SWEEP)
        return _parser(first if first in SWEEPS else DEFAULT_SWEEP).format_help().rstrip()
    texts = {("list",): sweeps, ("completion",): completion}
    return texts[tuple(words)]() if tuple(words) in texts else None


def sweeps() -> str:
    """List the sweeps that have names: how many SAEs, on how many activations, and what they are."""
    lines = []
    for name, make in SWEEPS.items():
        tokens = sorted(cfg.num_tokens for cfg in make())
        activations = " to ".join(dict.fromkeys(f"{end:,}" for end in (tokens[0], tokens[-1])))
        lines.append(f"{name}: {len(tokens)} SAEs on {activations} activations")
        what, indent = (make.__doc__ or "").strip().split("\n")[0], "    "
        lines.append(textwrap.fill(what, WIDTH, initial_indent=indent, subsequent_indent=indent))
    return "\n".join(lines)


def completion() -> str:
    """Write a script for bash that completes options, their values where they are few, and the names of sweeps."""
    few = {name: " ".join(values) for name, hint in HINTS.items() if (values := choices(hint))}
    cases = [f'            {_option(name)}) words="{values}" ;;' for name, values in few.items()]
    options = ["--help", "--resume", "--overrides", "--dry-run", *map(_option, HINTS)]
    return COMPLETION.format(options=" ".join(options), first=" ".join((*SWEEPS, *TEXTS)), cases="\n".join(cases))


def read_overrides(file: Path) -> dict[str, tuple]:
    """Read a YAML or JSON file of fields of Config, each with a value or with a list of those that it is swept over.

    Raises ValueError when there is no such file, it is neither, or it names an unknown field, or one twice.
    """
    said, such = f"--overrides: {file}", "give lines such as top_k: [16, 32]"
    require(file.is_file(), f"{said}: no such file; give a YAML or JSON file of Config's fields")
    kind = "JSON" if file.suffix == ".json" else "YAML"
    with explained(f"{said}: not {kind}", Exception, remedy=such):  # PyYAML meets a wrong tag with any error
        pairs = _pairs(file.read_bytes(), kind)
    require(pairs, f"{said}: no fields and values; {such}")
    given: dict[str, tuple] = {}
    for name, values in pairs:
        known = isinstance(name, str) and name in HINTS
        require(known, f"{said}: {name!r} is no field of Config; {near(name, HINTS)}--help lists them")
        require(name not in given, f"{said}: {name} stands there twice; give one list of its values")
        require(values != [], f"{said}: {name} = []: no value; give one or several")
        given[name] = tuple(values) if isinstance(values, list) else (values,)
    return given


def _pairs(text: bytes, kind: str) -> Sequence[tuple[Any, Any]]:
    """Read the fields of a file as pairs, which show a field that stands there twice; none where it holds no fields."""
    if kind == "JSON":
        found = json.loads(text, object_pairs_hook=tuple)
        return found if isinstance(found, tuple) else ()
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    return loader.construct_pairs(node, deep=True) if isinstance(node, yaml.MappingNode) else ()


def override(cfgs: list[Config], given: dict[str, tuple]) -> list[Config]:
    """Give the sweep other values: each Config times every combination of them, without repeats."""
    given = dict(given)
    if types := given.pop("sae_type", ()):
        known = [cfg for cfg in cfgs if cfg.sae_type in types]
        cfgs = known + [replace(cfgs[0], sae_type=t) for t in types if t not in [cfg.sae_type for cfg in known]]
    combined = [replace(cfg, **dict(zip(given, row))) for cfg in cfgs for row in itertools.product(*given.values())]
    return list({cfg.name: cfg for cfg in combined}.values())


@functools.cache
def _parser(sweep: str) -> Parser:
    """Make the parser, whose help shows the defaults of a sweep."""
    parser = Parser(
        prog="main.py", usage="python main.py [SWEEP] [--OPTION VALUE ...]", allow_abbrev=False, add_help=False,
        description=DESCRIPTION.format(sweep=sweep), formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument_group("the sweep").add_argument
    add("sweep", nargs="?", metavar="SWEEP", help=f"One of {', '.join(SWEEPS)} (default: {DEFAULT_SWEEP}).")
    overrides = "YAML or JSON file of the options below, such as top_k: [16, 32]. The command line wins over it."
    add("--overrides", metavar="FILE", help=overrides)
    add("--dry-run", action="store_true", help="Print Configs, parameters and memory; train and write nothing.")
    add("--resume", metavar="FOLDER", help="Go on with a sweep that was stopped. Takes no other option.")
    add("-h", "--help", action="store_true", help="Show this text.")
    cfgs = SWEEPS[sweep]()
    for group in GROUPS:
        add = parser.add_argument_group(group.__doc__).add_argument
        for param in docstring_parser.parse_from_object(group).params:
            name = param.arg_name
            used = [cfg for cfg in cfgs if name not in unused_by(cfg.sae_type)] or cfgs
            default = ", ".join(dict.fromkeys(written(getattr(cfg, name)) for cfg in used))
            text = f"{param.description} (default: {default})".replace("%", "%%")
            add(_option(name), nargs="*", metavar=_metavar(name), help=text)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(word: str) -> str:
    """Spell the option in a word with dashes: W&B's agents write --top_k=16."""
    option, *value = word.split("=", maxsplit=1)
    return "=".join([option.replace("_", "-"), *value]) if word.startswith("--") else word


def _metavar(name: str) -> str:
    if allowed := choices(HINTS[name]):
        return f"{{{','.join(allowed)}}}"
    kind, _, optional = kind_of(HINTS[name])
    one, *more = get_args(kind) or (kind,)
    return one.__name__.upper() + ",..." * bool(more) + "|None" * optional


def written(value: Any) -> str:
    """Write a field's value as it is written on the command line."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _value(word: Any, name: str) -> Any:
    """Read a word as a value of its field, or leave it as it is for Config to refuse."""
    kind, _, optional = kind_of(HINTS[name])
    if isinstance(word, str) and kind is bool:
        return {"True": True, "true": True, "False": False, "false": False}.get(word, word)
    if isinstance(word, str) and get_origin(kind) is tuple:
        return tuple(_number(part, get_args(kind)[0]) for part in word.split(","))
    return None if word == "None" and optional else _number(word, kind)


def _number(word: Any, kind: type) -> Any:
    """Read a word as a number where one is wanted: 1e6 is an int too, and to YAML 1.1 a word."""
    for number in (int, float) if kind in (int, float) else ():
        if isinstance(word, str):
            with contextlib.suppress(ValueError):
                word = number(word)
    return int(word) if kind is int and isinstance(word, float) and word.is_integer() else word
