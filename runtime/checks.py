"""A user's mistakes, each told in one line: the checks that annotations declare, and the errors of other libraries."""

import contextlib
import difflib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from numbers import Integral, Real
from types import NoneType
from typing import Annotated, Any, Literal, NamedTuple, get_args, get_origin


def require(holds: object, message: str, error: type[Exception] = ValueError) -> None:
    """Raise a user's mistake, one line of field, value and remedy, unless the condition holds."""
    if not holds:
        raise error(message)


@contextlib.contextmanager
def explained(
    problem: str, *errors: type[Exception], remedy: str = "", raised: type[Exception] = ValueError
) -> Iterator[None]:
    """Turn the errors of another library into one line of ours: the problem, what the library says, the remedy."""
    try:
        yield
    except errors as error:
        raise raised(f"{problem} ({one_line(error)}){'; ' if remedy else ''}{remedy}") from None


def one_line(error: Exception) -> str:
    """Quote an error's type and text on one line, without the Hub's token, whoever put it there."""
    hub = sys.modules.get("huggingface_hub")  # which nobody else imports to answer --help
    text, token = f"{type(error).__name__}: {error}", hub and hub.get_token()
    return " ".join((text.replace(token, "<token>") if token else text).split())[:300]


def parse_json(text: bytes, place: str) -> dict[str, Any]:
    """Read the fields of a JSON object that anybody may have written, at a place that an error names."""
    with explained(f"{place}: not JSON", ValueError, RecursionError):
        fields = json.loads(text)
    require(isinstance(fields, dict), f"{place}: holds {type(fields).__name__}, not an object of fields")
    return fields


def near(word: object, known: Iterable[str]) -> str:
    """Ask whether the nearest of the known words was meant; say nothing where none is near."""
    found = difflib.get_close_matches(str(word), list(known), n=1)
    return f"did you mean {found[0]}? " if found else ""


# ---- the checks of a field, which its annotation names ----


def _rise(values: tuple) -> bool:
    return all(a < b for a, b in itertools.pairwise(values))


class Check(NamedTuple):
    """What a value must satisfy, and what to give where it does not."""

    holds: Callable[[Any], object]
    remedy: str


_device = re.compile(r"auto|(cpu|cuda)(:(0|[1-9][0-9]?))?")
_project = re.compile(r"[^/\\#?%:]{,128}")
Name = Annotated[str, Check(lambda s: s.strip() and "\0" not in s, "give a name")]
Project = Annotated[Name, Check(_project.fullmatch, "give at most 128 characters, none of /\\#?%:")]
Device = Annotated[str, Check(_device.fullmatch, 'give "auto", "cpu", "cuda" or "cuda:1"')]
Natural = Annotated[int, Check(lambda n: n >= 0, "give 0 or more")]
Positive = Annotated[int, Check(lambda n: n > 0, "give a number above 0")]
AtLeastTwo = Annotated[int, Check(lambda n: n >= 2, "give at least 2")]
NonNegative = Annotated[float, Check(lambda x: x >= 0, "give 0 or more")]
PositiveReal = Annotated[float, Check(lambda x: x > 0, "give a number above 0")]
Decay = Annotated[float, Check(lambda x: 0 <= x < 1, "give a number in [0, 1)")]
Share = Annotated[float, Check(lambda x: 0 <= x <= 1, "give a share between 0 and 1")]
Layers = Annotated[
    tuple[int, ...], Check(lambda n: n and n[0] >= 0 and _rise(n), "give 0 or more, several in rising order")
]
Shares = Annotated[
    tuple[float, ...],
    Check(lambda s: s and s[-1] == 1 and _rise((0, *s)), "give shares that rise from 0 to 1"),
]


def kind_of(hint: Any) -> tuple[Any, list[Check], bool]:
    """Take an annotation apart: the type, its checks, and whether None is allowed."""
    optional = NoneType in get_args(hint)
    option = get_args(hint)[0] if optional else hint
    kind, *checks = get_args(option) if get_origin(option) is Annotated else (option,)
    return kind, checks, optional


def choices(hint: Any) -> tuple[str, ...]:
    """List the values that an annotation allows, if it names them."""
    kind, _, _ = kind_of(hint)
    return ("True", "False") if kind is bool else get_args(kind) if get_origin(kind) is Literal else ()


def checked(field: str, value: Any, hint: Any) -> Any:
    """Return the value as a plain Python one, once it is what the annotation of its field says.

    Raises ValueError, one line with the field, the value and the remedy.
    """
    kind, checks, optional = kind_of(hint)
    if optional and value is None:
        return None
    said = f"{field} = {value!r}: "
    if get_origin(kind) is Literal:
        allowed = get_args(kind)
        known = isinstance(value, str) and value in allowed
        require(known, f"{said}{near(value, allowed)}give one of {', '.join(allowed)}")
        return value
    several = get_origin(kind) is tuple
    number = get_args(kind)[0] if several else kind
    values = value if several and isinstance(value, tuple | list) else [value]
    abstract = {int: Integral, float: Real}.get(number, number)
    fits = all(isinstance(v, abstract) and isinstance(v, bool) == (number is bool) for v in values)
    require(fits, f"{said}give {'a list of ' * several}{number.__name__}{' or None' * optional}")
    if number in (int, float):
        require(all(isinstance(v, float) or abs(v) < 2**63 for v in values), f"{said}give less than 2**63")
        values = [number(v) for v in values]
        require(all(map(math.isfinite, values)), f"{said}give a finite number")
    value = tuple(values) if several else values[0]
    for check in checks:
        require(check.holds(value), f"{said}{check.remedy}")
    return value
