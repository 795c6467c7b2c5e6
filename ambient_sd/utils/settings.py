"""Settings stated once: a dataclass field carries its flag, help, bounds and rivals, and every command line is built from the fields.

    @dataclass
    class Settings:
        steps: int = option(50, "steps of the sampler", low=1)
        output_dir: Path = option(REQUIRED, "folder for everything", alias="out")

        def __post_init__(self) -> None:
            check(self)

    parser = Parser(prog="mine")
    add_flags(parser, Settings)
    settings = from_flags(Settings, parser.parse_args())

Types: str, int, float, bool (`--name` and `--no-name`), Path, `list[X]` and `tuple[X, ...]` of them, `Literal[...]` (its words are the choices), each
also `| None`, which means "not given"; `float | Literal["auto"]` is a number or that word. Values of a command line stay texts until `check`
converts them, so that flags, YAML files and Python callers obey one rule and get one message. Imports no torch: `--help` must come at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import functools
import math
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from ambient_sd.utils.errors import UserError

REQUIRED = dataclasses.MISSING
T = TypeVar("T")
# A value from a file may be of any size: YAML's anchors make lists of lists of lists that never end in print.
_SHORT = reprlib.Repr()
_SHORT.maxlevel, _SHORT.maxstring, _SHORT.maxlong, _SHORT.maxother = 2, 200, 60, 200
_KINDS: dict[Any, str] = {int: "integer", float: "number", Path: "path"}


def option(
    default: Any,
    text: str,
    *,
    group: str = "",
    choices: Sequence[Any] = (),
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    multiple: int | None = None,
    alias: str | Sequence[str] = (),
    metavar: str = "",
    words: Sequence[str] = (),
    bare: Any = None,
    positional: bool = False,
    secret: bool = False,
    rival: str = "",
    needs: str | Sequence[str] = (),
    because: str = "",
) -> Any:
    """Declare a setting: its default, its help text and the rule that its value must obey.

    Args:
        default: its value if it is not given; `REQUIRED`: it must be given.
        text: for `--help`, which adds the default.
        group: heading in `--help`.
        choices: all values that there are; those of a `Literal` annotation need not be repeated.
        low, high: inclusive bounds; `above` and `below` are exclusive ones.
        multiple: the value must be a multiple of this.
        alias: other spellings of the flag.
        metavar: what stands for the value in `--help`; otherwise its choices or its type.
        words: values besides those of its type, such as auto.
        bare: the value of the flag without one.
        positional: an argument without a flag.
        secret: never printed nor written.
        rival: a setting that answers the same question: on the command line, one of them replaces the other of a file.
        needs: modes of which one must be on, or the setting may not be given: `lora` (given and not false), `not lora`,
            `objective=plain,gap` (one of these values).
        because: why it is refused where no mode that it needs is on; otherwise it is said to have no effect.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = option(50, "steps of the sampler", low=1)
        >>> Settings().steps
        50
    """
    meta = {
        "text": text, "group": group, "choices": tuple(choices), "low": low, "above": above, "high": high, "below": below, "multiple": multiple,
        "alias": (alias,) if isinstance(alias, str) else tuple(alias), "metavar": metavar, "words": tuple(words), "bare": bare,
        "positional": positional, "secret": secret, "rival": rival, "needs": (needs,) if isinstance(needs, str) else tuple(needs),
        "because": because,
    }  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=default.copy, metadata=meta, repr=not secret)
    return dataclasses.field(default=default, metadata=meta, repr=not secret)


def same(owner: type, name: str, **changes: Any) -> Any:
    """Declare a setting that the class `owner` declares too, with `changes` of the arguments of `option`.

    Its group, rival and modes are the owner's and stay there.

    Example:
        >>> @dataclasses.dataclass
        ... class Sampling:
        ...     steps: int = option(50, "steps of the sampler", low=1)
        >>> @dataclasses.dataclass
        ... class Comparison:
        ...     steps: int = same(Sampling, "steps", default=20)
        >>> Comparison().steps, Comparison.__dataclass_fields__["steps"].metadata["low"]
        (20, 1)
    """
    item = next(item for item in _options(owner) if item.name == name)
    inherited = {
        name: value for name, value in item.metadata.items() if name not in ("group", "rival", "needs", "because")
    }
    return option(**{"default": _default(item), **inherited, **changes})


def check(instance: Any) -> None:
    """Convert every setting of a dataclass to its type, or end in one line.

    Raises:
        UserError: a value has the wrong type or breaks its rule; names the setting, the value, the rule and the remedy.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = option(50, "steps of the sampler", low=1)
        >>> check(Settings(steps=0))
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: steps is 0; it must be at least 1; the default is 50
    """
    for item in _options(type(instance)):
        value = checked(type(instance), item.name, getattr(instance, item.name))
        object.__setattr__(instance, item.name, value)  # frozen classes too


def check_modes(instance: Any) -> None:
    """Refuse every setting that is given while no mode that it needs is on.

    Raises:
        UserError: names the setting and the mode.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     lora: bool = option(False, "train an adapter")
        ...     rank: int = option(4, "rank of the adapter", needs="lora")
        >>> check_modes(Settings(rank=8))
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: rank is given; it has no effect here: lora is off; add --lora, or leave it out
    """
    values = {item.name: getattr(instance, item.name) for item in _options(type(instance))}
    for item in _options(type(instance)):
        if is_given(type(instance), item.name, values[item.name]) and not is_on(type(instance), item.name, values):
            raise _switched_off(item, values)


def is_on(owner: type, name: str, values: Mapping[str, Any]) -> bool:
    """Return whether a mode that the setting `name` needs is on; `values` lacks what has its default.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     lora: bool = option(False, "train an adapter")
        ...     rank: int = option(4, "rank of the adapter", needs="lora")
        >>> is_on(Settings, "rank", {"lora": True}), is_on(Settings, "rank", {})
        (True, False)
    """
    needs = _field(owner, name).metadata["needs"]
    return not needs or any(_holds(owner, term, values) for term in needs)


def is_given(owner: type, name: str, value: Any) -> bool:
    """Return whether a value differs from the setting's default.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = option(50, "steps of the sampler")
        >>> is_given(Settings, "steps", 20), is_given(Settings, "steps", 50)
        (True, False)
    """
    return bool(value != _default(_field(owner, name)))


def add_flags(
    parser: argparse.ArgumentParser,
    owner: type,
    *,
    skip: Sequence[str] = (),
    groups: Mapping[str, str] | None = None,
    proposed: Sequence[str] = (),
) -> None:
    """Give a command the flags of a settings class; only what the user gives ends up in the namespace, as texts.

    Args:
        parser: the command's parser, best a `Parser`.
        owner: the dataclass; fields that `option` did not make are left out.
        skip: names of settings that the command does not take from its user.
        groups: heading -> the sentence under it in `--help`.
        proposed: names of settings that the command proposes from what it sees, in place of their default.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = option(50, "steps of the sampler", alias="n")
        >>> parser = Parser(prog="mine")
        >>> add_flags(parser, Settings)
        >>> parser.parse_args(["--n", "20"])
        Namespace(steps='20')
    """
    for item in _options(owner):
        if item.name not in skip:
            place = _group(parser, item.metadata["group"], (groups or {}).get(item.metadata["group"]))
            _add(place, item, _hints(owner)[item.name], proposed=item.name in proposed)


def from_flags(owner: Callable[..., T], namespace: argparse.Namespace, **fixed: Any) -> T:
    """Build a settings class from what `add_flags` has parsed; `fixed` values stand before those of the command line.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = option(50, "steps of the sampler", low=1)
        ...     def __post_init__(self):
        ...         check(self)
        >>> parser = Parser(prog="mine")
        >>> add_flags(parser, Settings)
        >>> from_flags(Settings, parser.parse_args(["--steps", "20"]))
        Settings(steps=20)
    """
    names = [item.name for item in _options(typing.cast(type, owner))]
    values = {name: getattr(namespace, name) for name in names if hasattr(namespace, name)}
    return owner(**{**values, **fixed})


def load_yaml(
    path: str | Path, owner: type, elsewhere: Mapping[str, tuple[str, str]] = types.MappingProxyType({})
) -> dict[str, Any]:
    """Read settings from a YAML file whose keys are the fields of `owner`; `elsewhere` is that of `Parser`.

    Raises:
        UserError: the file is missing, is no YAML mapping, or has an unknown key or one key twice.

    Example:
        >>> import tempfile
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = option(50, "steps of the sampler")
        >>> file = Path(tempfile.mkdtemp()) / "mine.yaml"
        >>> _ = file.write_text("steps: 20")
        >>> load_yaml(file, Settings)
        {'steps': 20}
    """
    import yaml

    class Loader(yaml.SafeLoader):
        """Safe YAML that refuses a key given twice, of which PyYAML would keep the last without a word."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise yaml.constructor.ConstructorError(None, None, f"{twice[0]} is given twice", node.start_mark)
            return super().construct_mapping(node, deep)

    def fault(rule: str, remedy: str = "write one `key: value` a line") -> UserError:
        return UserError(f"config is {path}", rule=rule, remedy=remedy)

    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader)
    except OSError as error:
        raise fault(f"the file cannot be read ({error.strerror})", "check the path") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: no UTF-8, the 30th of February
        raise fault(f"it is no valid YAML: {error}") from None
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise fault(f"it holds a {type(values).__name__}, not keys with values")
    names = [item.name for item in _options(owner)]
    for key in values:
        if key not in names:
            if foreign := _foreign(str(key), elsewhere):
                raise foreign
            raise UserError(f"unknown key {key!r} in {path}", rule=nearest(str(key), names), remedy="--help lists all keys")  # fmt: skip
    return dict(values)


def over_file(owner: type, flags: Mapping[str, Any], file: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Lay the settings of a command line over those of a file.

    The command line wins, setting by setting. Of two rivals it replaces the file's one by the one that it gives. A setting of the file
    whose mode the command line switches off is dropped; one that the command line itself gives never is.

    Returns:
        The settings, and the names of what was dropped because its mode is off now.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     lora: bool = option(False, "train an adapter")
        ...     rank: int = option(4, "rank of the adapter", needs="lora")
        >>> over_file(Settings, flags={"lora": False}, file={"lora": True, "rank": 8})
        ({'lora': False}, ['rank'])
    """
    rivals = {name for item in _options(owner) for name in _rivals(owner, item.name) if item.name in flags}
    kept = {key: value for key, value in file.items() if key in flags or key not in rivals}
    dropped: list[str] = []
    while True:
        both = {key: checked(owner, key, value) for key, value in {**kept, **flags}.items()}
        alone = {key: checked(owner, key, value) for key, value in file.items()}
        off = [key for key in kept if key not in flags and is_given(owner, key, both[key])
               and not is_on(owner, key, both) and is_on(owner, key, alone)]  # fmt: skip
        if not off:
            return {**kept, **flags}, dropped
        dropped += off
        kept = {key: value for key, value in kept.items() if key not in off}


class Help(argparse.HelpFormatter):
    """Format `--help` widely, with the value after the last spelling of a flag and only what is required in the usage line.

    Example:
        >>> parser = argparse.ArgumentParser("mine", formatter_class=Help)
        >>> _ = parser.add_argument("--steps", metavar="INTEGER"), parser.add_argument("--seed", required=True)
        >>> parser.format_usage().strip()
        'usage: mine --seed SEED [options]'
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)

    def _format_usage(self, usage: Any, actions: Any, groups: Any, prefix: Any) -> str:
        # Fifty flags in one usage block teach nothing; the groups below do.
        if usage is None:
            words = [self._prog]
            words += [self._format_args(a, a.metavar or a.dest.upper()) for a in actions if not a.option_strings]
            words += [f"{a.option_strings[0]} {self._format_args(a, a.dest.upper())}" for a in actions if a.option_strings and a.required]  # fmt: skip
            usage = " ".join([*words, "[options]"])
        return f"usage: {usage}\n\n"

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        # Lists (of policies) keep their lines; a paragraph is filled.
        if "\n" in text:
            return "".join(indent + line for line in text.splitlines(keepends=True))
        return super()._fill_text(text, width, indent)


class Parser(argparse.ArgumentParser):
    """Parse a command line; a mistake ends in one line, and an unknown flag or verb names the nearest one of this command.

    A flag may be spelled with hyphens or underscores.

    Args:
        elsewhere: flags of other programs that users carry over: why each is not here, and what does its work.
        **settings: of `argparse.ArgumentParser`.

    Raises:
        UserError: an unknown or a missing argument.

    Example:
        >>> parser = Parser(prog="mine")
        >>> _ = parser.add_argument("--seed")
        >>> parser.parse_args(["--sede", "1"])
        Traceback (most recent call last):
        ambient_sd.utils.errors.UserError: unknown argument --sede; the nearest known one is --seed; see mine --help
    """

    def __init__(self, *, elsewhere: Mapping[str, tuple[str, str]] | None = None, **settings: Any) -> None:
        self.elsewhere = elsewhere or {}
        defaults = {"argument_default": argparse.SUPPRESS, "allow_abbrev": False, "formatter_class": Help}
        super().__init__(**{**defaults, **settings})
        self.titled: dict[str, Any] = {}

    def error(self, message: str) -> NoReturn:
        raise UserError(message, remedy=f"see {self.prog} --help")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        known = self._option_string_actions
        spelled = {name.replace("-", "_"): name for name in known}
        for i, word in enumerate(words[: words.index("--")] if "--" in words else words):
            flag, equals, value = word.partition("=")
            # As argparse has it, a word with a space is no flag. Looked at first: a misspelt flag is not one that is missing.
            if flag.startswith("--") and flag not in known and " " not in word:
                if (right := spelled.get(flag.replace("-", "_"))) is None:
                    self._unknown(flag, [name for name in known if name.startswith("--")])
                words[i] = right + equals + value
        found, unknown = super().parse_known_args(words, namespace)
        if unknown:
            self._unknown(unknown[0], [])
        return found, unknown

    def _unknown(self, word: str, known: Sequence[str]) -> NoReturn:
        if foreign := _foreign(word, self.elsewhere):
            raise foreign
        raise UserError(
            f"unknown argument {word}", rule=nearest(word, known) if known else "", remedy=f"see {self.prog} --help"
        )


def _foreign(word: str, elsewhere: Mapping[str, tuple[str, str]]) -> UserError | None:
    """Return the error of another program's setting, or None."""
    found = elsewhere.get(word.lstrip("-").replace("-", "_"))
    return None if found is None else UserError(f"{word} is given", rule=found[0], remedy=found[1])


def nearest(word: str, known: Sequence[str]) -> str:
    """Say which of the known words is like an unknown one.

    Example:
        >>> nearest("trian", ["train", "audit"])
        'the nearest known one is train'
    """
    plain = {name.lstrip("-").replace("-", "_").lower(): name for name in reversed(known)}
    near = difflib.get_close_matches(word.lstrip("-").replace("-", "_").lower(), list(plain), n=1, cutoff=0.5)
    return f"the nearest known one is {plain[near[0]]}" if near else "no known one is like it"


def checked(owner: type, name: str, value: Any) -> Any:
    """Return `value` in the type of the setting `name`.

    Raises:
        UserError: it has another type or breaks the setting's rule.

    Example:
        >>> @dataclasses.dataclass
        ... class Settings:
        ...     steps: int = option(50, "steps of the sampler")
        >>> checked(Settings, "steps", "20")
        20
    """
    item, kind = _field(owner, name), _kind(_hints(owner)[name])
    words = (*item.metadata["words"], *kind.words)
    if (value is None and kind.optional) or (isinstance(value, str) and value in words):
        return value
    converted, rule = _many(kind, item, value) if kind.many else _one(kind.bare, item, value)
    rule = rule and " or ".join([rule, *words])
    for one in (converted if kind.many else [converted]) if not rule else []:
        rule = rule or _broken_rule(item.metadata, kind.choices, one)
    if rule:
        remedy = "leave it out for the default"
        if _default(item) is REQUIRED:
            remedy = ""
        elif _default(item) is not None:
            remedy = f"the default is {_shown(_default(item))}"
        shown = "(hidden)" if item.metadata["secret"] else _number(value) or _SHORT.repr(value)
        raise UserError(f"{name} is {shown}", rule=rule, remedy=remedy)
    return converted


@dataclasses.dataclass(frozen=True)
class _Kind:
    """An annotation, taken apart: the type of a value, whether None is one, whether there are several, and words of `Literal`."""

    bare: Any
    optional: bool
    many: Any  # list, tuple or None
    choices: tuple[Any, ...]
    words: tuple[str, ...]


@functools.cache
def _kind(hint: Any) -> _Kind:
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    parts = [part for part in (typing.get_args(hint) if is_union else (hint,)) if part is not types.NoneType]
    literals = [part for part in parts if typing.get_origin(part) is typing.Literal]
    others = [part for part in parts if part not in literals]
    optional = is_union and types.NoneType in typing.get_args(hint)
    if not others:
        values = tuple(value for part in literals for value in typing.get_args(part))
        return _Kind(type(values[0]), optional, None, values, ())
    words = tuple(value for part in literals for value in typing.get_args(part))
    many = typing.get_origin(others[0])
    if many in (list, tuple):
        inner = _kind(typing.get_args(others[0])[0])
        return _Kind(inner.bare, optional, many, inner.choices, words)
    return _Kind(others[0], optional, None, (), words)


def _one(bare: Any, item: dataclasses.Field[Any], value: Any) -> tuple[Any, str]:
    """Convert one value; return it, and the rule that it breaks if it has another type."""
    if bare is bool:
        return value, "" if isinstance(value, bool) else "it must be true or false"
    if bare is str:
        text = str(value) if isinstance(value, Path) else value
        # YAML 1.1 reads a bare `no` as false; mixed_precision has such a choice, and quoting it would be a trap.
        text = "no" if value is False and "no" in item.metadata["choices"] else text
        return text, "" if isinstance(text, str) and text else "it must be a text"
    if bare is Path:
        is_path = isinstance(value, (str, Path)) and str(value) != ""
        return (Path(value), "") if is_path else (value, "it must be a path")
    # YAML 1.1 reads 1e-4 as a text and the command line gives texts: both convert here, by one rule.
    try:
        if isinstance(value, bool):
            raise ValueError
        number = bare(value)
        # Through float only what is no integer already: a seed of 64 bits has no exact float.
        if not math.isfinite(number) or (isinstance(value, float) and number != value):
            raise ValueError
        return number, ""
    except (ValueError, TypeError, OverflowError):
        return value, f"it must be {'an integer' if bare is int else 'a finite number'}"


def _many(kind: _Kind, item: dataclasses.Field[Any], value: Any) -> tuple[Any, str]:
    values = [value] if isinstance(value, (str, Path)) else value
    if isinstance(values, (list, tuple)) and (values or _default(item) in ((), [])):
        pairs = [_one(kind.bare, item, one) for one in values]
        if not any(rule for _, rule in pairs):
            return kind.many(one for one, _ in pairs), ""
    return value, f"it must be a list of {_KINDS.get(kind.bare, 'text')}s"


def _broken_rule(meta: Mapping[str, Any], literals: Sequence[Any], value: Any) -> str:
    choices = meta["choices"] or literals
    if choices and value not in choices:
        return "it must be one of " + ", ".join(map(str, choices))
    if meta["low"] is not None and value < meta["low"]:
        return f"it must be at least {meta['low']}"
    if meta["above"] is not None and value <= meta["above"]:
        return f"it must be above {meta['above']}"
    if meta["high"] is not None and value > meta["high"]:
        return f"it must be at most {meta['high']}"
    if meta["below"] is not None and value >= meta["below"]:
        return f"it must be below {meta['below']}"
    if meta["multiple"] is not None and value % meta["multiple"]:
        return f"it must be a multiple of {meta['multiple']}"
    return ""


def _holds(owner: type, term: str, values: Mapping[str, Any]) -> bool:
    """Return whether a mode is on: `name`, `not name`, or `name=value,value`."""
    name, equals, wanted = term.removeprefix("not ").partition("=")
    value = values.get(name, _default(_field(owner, name)))
    if equals:
        return value in [checked(owner, name, word) for word in wanted.split(",")]
    return (value is not None and value is not False) is not term.startswith("not ")  # a level of 0 is given


def _switched_off(item: dataclasses.Field[Any], values: Mapping[str, Any]) -> UserError:
    terms = item.metadata["needs"]
    name, equals, wanted = terms[0].removeprefix("not ").partition("=")
    leave = "leave it out"
    if equals:
        because, remedy = f"{name} is {_shown(values[name])}", f"{leave}, or choose --{name} {' or '.join(wanted.split(','))}"  # fmt: skip
    elif terms[0].startswith("not "):
        because, remedy = f"{name} is given", f"{leave}, or leave {name} out"
    else:
        flags = " or ".join(f"--{term.partition('=')[0]}" for term in terms)
        because, remedy = f"{' and '.join(terms)} {'is' if len(terms) == 1 else 'are'} off", f"add {flags}, or {leave}"
    if item.metadata["because"]:
        return UserError(f"{item.name} is {_shown(values[item.name])}", rule=item.metadata["because"], remedy=remedy)
    return UserError(f"{item.name} is given", rule=f"it has no effect here: {because}", remedy=remedy)


def _rivals(owner: type, name: str) -> Iterator[str]:
    for item in _options(owner):
        if item.metadata["rival"] == name:
            yield item.name
        elif item.name == name and item.metadata["rival"]:
            yield item.metadata["rival"]


def _options(owner: type) -> list[dataclasses.Field[Any]]:
    return [item for item in dataclasses.fields(owner) if "text" in item.metadata]


def _field(owner: type, name: str) -> dataclasses.Field[Any]:
    return next(item for item in _options(owner) if item.name == name)


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    """Return the annotations of the options; other fields may name classes that are imported for type checkers alone."""
    found: dict[str, Any] = {}
    for base in reversed(owner.__mro__):
        names = [item.name for item in _options(owner) if item.name in vars(base).get("__annotations__", {})]
        written = types.SimpleNamespace(__annotations__={name: vars(base)["__annotations__"][name] for name in names})
        found |= typing.get_type_hints(written, globalns=vars(sys.modules[base.__module__]))
    return found


def _default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _number(value: Any) -> str:
    """Return a text that reads as a number as it stands, for a command line gives texts; nothing otherwise."""
    if not isinstance(value, str) or len(value) > _SHORT.maxlong:
        return ""
    try:
        float(value)
    except ValueError:
        return ""
    return value


def _group(parser: argparse.ArgumentParser, title: str, text: str | None) -> Any:
    if not title:
        return parser
    titled = getattr(parser, "titled", {})
    if title not in titled:
        titled[title] = parser.add_argument_group(title, text)
    return titled[title]


def _add(place: Any, item: dataclasses.Field[Any], hint: Any, *, proposed: bool = False) -> None:
    meta, kind, default = item.metadata, _kind(hint), _default(item)
    text = meta["text"].replace("%", "%%")
    if proposed:
        text = re.sub(r" \(default:? [^()]*\)$", "", text) + " (default: proposed)"
    elif default is not None and default is not False and default not in (REQUIRED, (), []):  # 0 is a default, too
        text += f" (default {_shown(default)})"
    extra: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
    if kind.bare is bool:
        extra["action"] = argparse.BooleanOptionalAction
    else:
        choices, words = meta["choices"] or kind.choices, (*meta["words"], *kind.words)
        one_of = "{" + ",".join(map(str, choices)) + "}" if choices else ""
        extra["metavar"] = meta["metavar"] or one_of or "|".join([_KINDS.get(kind.bare, "text").upper(), *words])
        if kind.many:
            extra["nargs"] = "*" if default in ((), []) and not meta["positional"] else "+"
        elif meta["bare"] is not None:
            extra |= {"nargs": "?", "const": str(meta["bare"])}
    if meta["positional"]:
        if default is not REQUIRED and not kind.many:
            extra["nargs"] = "?"
        place.add_argument(item.name, **extra)
    else:
        flags = [f"--{name}" for name in (item.name, *meta["alias"])]
        place.add_argument(*flags, dest=item.name, required=default is REQUIRED, **extra)
