"""The command line: words -> Configs, and the texts that are printed instead of a run.

Of ours it imports config alone, and no torch: --help and mistakes are answered at once.
"""

import argparse
import contextlib
import difflib
import functools
import itertools
import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from config import NOT_USED_BY, SITES, SWEEPS, Config, field_docs, field_groups

DEFAULT_SWEEP = "tiny"
TEXTS = ("list", "completion")
WIDTH = 80
HINTS = get_type_hints(Config)
DESCRIPTION = """Train sparse autoencoders on a transformer's activations.

  python main.py                        the tiny sweep: minutes, no network
  python main.py gpt2 --top-k 8 16 32   another, a field swept over three values
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
    sweep: str = DEFAULT_SWEEP
    given: dict[str, tuple] = field(default_factory=dict)
    """Fields of Config and the values that each is swept over, from the words and the file of --overrides."""
    resume: str | None = None
    dry_run: bool = False

    def configs(self) -> list[Config]:
        """The Configs of the sweep. Raises ValueError at a value that is none."""
        return override(SWEEPS[self.sweep](), self.given)


class Parser(argparse.ArgumentParser):
    """One whose errors are a line, like all of ours."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(words: list[str]) -> Options:
    """The command line's options. Raises ValueError at a word that is none, OSError when a file cannot be read."""
    known, unknown = _parser(DEFAULT_SWEEP).parse_known_args([_dashed(word) for word in words])
    if unknown:
        options = [_option(name) for name in (*HINTS, "resume", "overrides", "dry_run")]
        near = _near(unknown[0].split("=")[0], options)
        word = next(word for word in words if _dashed(word) == unknown[0])
        raise ValueError(f"{word}: no such option; {near}python main.py --help lists them")
    given = {name: tuple(values) for name in HINTS if (values := getattr(known, name)) is not None}
    for name, values in given.items():
        if not values:
            raise ValueError(f"{_option(name)}: no value; give one or several after it")
    if known.resume is not None:
        others = {name for name, value in vars(known).items() if value not in (None, False)} - {"resume"}
        if others or len(known.resume) != 1:
            raise ValueError("--resume: give it one folder and no other option; the Configs are in the folder")
        return Options(resume=known.resume[0])
    sweep = DEFAULT_SWEEP if known.sweep is None else known.sweep
    if sweep in TEXTS:
        raise ValueError(f"{sweep}: give it no other word")
    if sweep not in SWEEPS:
        near = _near(sweep, (*SWEEPS, *TEXTS))
        raise ValueError(f"sweep = {sweep!r}: {near}give one of {', '.join((*SWEEPS, *TEXTS))}")
    if known.overrides is not None:
        if len(known.overrides) != 1:
            raise ValueError("--overrides: give it one YAML or JSON file")
        given = read_overrides(Path(known.overrides[0])) | given
    given = {name: tuple(_value(value, name) for value in values) for name, values in given.items()}
    return Options(sweep, given, dry_run=known.dry_run)


def answer(words: list[str]) -> str | None:
    """The text that the words ask for in place of a run: help, the sweeps, completion."""
    if {"-h", "--help"} & set(words):
        first = next((word for word in words if word not in ("-h", "--help")), DEFAULT_SWEEP)
        return _parser(first if first in SWEEPS else DEFAULT_SWEEP).format_help().rstrip()
    texts = {("list",): sweeps, ("completion",): completion}
    return texts[tuple(words)]() if tuple(words) in texts else None


def sweeps() -> str:
    """The sweeps that have names: SAEs, activations that each is trained on, what they are."""
    table = [("sweep", "SAEs", "activations", "")]
    for name, make in SWEEPS.items():
        cfgs = make()
        tokens = sorted({cfg.num_tokens for cfg in cfgs})
        what = (make.__doc__ or "").strip().split("\n")[0]
        table.append(
            (name, str(len(cfgs)), " to ".join(f"{n:,}" for n in dict.fromkeys((tokens[0], tokens[-1]))), what)
        )
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    lines = []
    for name, count, tokens, what in table:
        start = f"{name:<{widths[0]}}  {count:>{widths[1]}}  {tokens:>{widths[2]}}  "
        lines.append(textwrap.fill(what, WIDTH, initial_indent=start, subsequent_indent=" " * len(start)) or start)
    return "\n".join(line.rstrip() for line in lines)


def completion() -> str:
    """A script for bash that completes options, their values where they are few, and the names of sweeps."""
    cases = [
        f'            {_option(name)}) words="{" ".join(values)}" ;;' for name in HINTS if (values := _choices(name))
    ]
    options = ["--help", "--resume", "--overrides", "--dry-run", *map(_option, HINTS)]
    return COMPLETION.format(options=" ".join(options), first=" ".join((*SWEEPS, *TEXTS)), cases="\n".join(cases))


def read_overrides(file: Path) -> dict[str, tuple]:
    """Fields of Config and the values that each is swept over, from a YAML or JSON file: a value or a list of them.

    Raises ValueError when there is no such file, it is neither, or it names a field that is none, or one twice.
    """
    if not file.is_file():
        raise ValueError(f"--overrides: {file}: no such file; give a YAML or JSON file of Config's fields")
    kind = "JSON" if file.suffix == ".json" else "YAML"
    try:
        pairs = _pairs_of_json(file.read_bytes()) if kind == "JSON" else _pairs_of_yaml(file.read_bytes())
    except Exception as error:  # of the parsers: PyYAML meets a wrong tag with any
        raise ValueError(f"--overrides: {file}: not {kind} ({error}); give lines such as top_k: [16, 32]") from None
    if pairs is None:
        raise ValueError(f"--overrides: {file}: no fields and values; give lines such as top_k: [16, 32]")
    given: dict[str, tuple] = {}
    for name, values in pairs:
        if not isinstance(name, str) or name not in HINTS:
            near = _near(str(name), HINTS)
            raise ValueError(f"--overrides: {file}: {name!r} is no field of Config; {near}--help lists them")
        if name in given:
            raise ValueError(f"--overrides: {file}: {name} stands there twice; give one list of its values")
        if values == []:
            raise ValueError(f"--overrides: {file}: {name} = []: no value; give one or several")
        given[name] = tuple(values) if isinstance(values, list) else (values,)
    return given


def _pairs_of_yaml(text: bytes) -> list[tuple[object, object]] | None:
    loader = yaml.SafeLoader(text)
    node = loader.get_single_node()
    return loader.construct_pairs(node, deep=True) if isinstance(node, yaml.MappingNode) else None


def _pairs_of_json(text: bytes) -> tuple[tuple[str, object], ...] | None:
    found = json.loads(text, object_pairs_hook=tuple)
    return found if isinstance(found, tuple) else None


def override(cfgs: list[Config], given: dict[str, tuple]) -> list[Config]:
    """The sweep with the values given: each Config times every combination of them, without repeats."""
    given = dict(given)
    if types := given.pop("sae_type", ()):
        known = [cfg for cfg in cfgs if cfg.sae_type in types]
        cfgs = known + [replace(cfgs[0], sae_type=t) for t in types if t not in [cfg.sae_type for cfg in known]]
    combined = [
        replace(cfg, **dict(zip(given, values))) for cfg in cfgs for values in itertools.product(*given.values())
    ]
    return list({cfg.name: cfg for cfg in combined}.values())


@functools.cache
def _parser(sweep: str) -> Parser:
    """The options, each with what the sweep has as its default."""
    parser = Parser(
        prog="main.py",
        usage="python main.py [SWEEP] [--OPTION VALUE ...]",
        description=DESCRIPTION.format(sweep=sweep),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    run = parser.add_argument_group("the run")
    run.add_argument("sweep", nargs="?", metavar="SWEEP", help=f"one of {', '.join(SWEEPS)} (default: {DEFAULT_SWEEP})")
    run.add_argument(
        "--overrides", nargs="*", metavar="FILE",
        help="YAML or JSON file of the options below, as in top_k: [16, 32]. Those on the command line win over it.",
    )  # fmt: skip
    run.add_argument(
        "--dry-run", action="store_true",
        help="Print the Configs and estimates of parameters, memory and time; train and write nothing.",
    )  # fmt: skip
    run.add_argument(
        "--resume", nargs="*", metavar="FOLDER",
        help="Go on with a sweep that was stopped to the end it would have come to. Takes no other option.",
    )  # fmt: skip
    run.add_argument("-h", "--help", action="store_true", help="Show this text.")
    cfgs, docs = SWEEPS[sweep](), field_docs()
    for title, names in field_groups().items():
        group = parser.add_argument_group(title)
        for name in names:
            used = [cfg for cfg in cfgs if name not in NOT_USED_BY[cfg.sae_type]] or cfgs
            default = ", ".join(dict.fromkeys(str(getattr(cfg, name)) for cfg in used))
            text = f"{docs[name]} (default: {default})".replace("%", "%%")
            group.add_argument(_option(name), nargs="*", metavar=_metavar(name), help=text)
    return parser


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _dashed(word: str) -> str:
    """The word with its option spelt as we do: W&B's agents write --top_k=16."""
    option, *value = word.split("=", maxsplit=1)
    return "=".join([option.replace("_", "-"), *value]) if word.startswith("--") else word


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(known), n=1)
    return f"did you mean {near[0]}? " if near else ""


def _kinds(name: str) -> tuple[type, ...]:
    hint = HINTS[name]
    return (str,) if get_origin(hint) is Literal else get_args(hint) or (hint,)


def _choices(name: str) -> tuple[str, ...]:
    """All values of a field, where they are few."""
    if get_origin(HINTS[name]) is Literal:
        return get_args(HINTS[name])
    return ("True", "False") if HINTS[name] is bool else tuple(SITES) if name == "site" else ()


def _metavar(name: str) -> str:
    if choices := _choices(name):
        return f"{{{','.join(choices)}}}"
    return "|".join("None" if kind is NoneType else kind.__name__.upper() for kind in _kinds(name))


def _value(word: object, name: str) -> object:
    """A word as a value of the field, or as it is for Config to refuse in one line. YAML 1.1 has 1e-3 as a word too."""
    kinds = _kinds(name)
    for value, words in {None: ("None",), True: ("True", "true"), False: ("False", "false")}.items():
        if word in words and type(value) in kinds:
            return value
    for kind in (int, float):
        if isinstance(word, str) and {int, float} & set(kinds):
            with contextlib.suppress(ValueError):
                word = kind(word)
    return int(word) if isinstance(word, float) and word.is_integer() and int in kinds else word


assert {name for names in field_groups().values() for name in names} == {f.name for f in fields(Config)}
