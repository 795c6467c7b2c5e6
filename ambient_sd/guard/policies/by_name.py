"""Policies from a command line: `NAME[:key=value,...][+NAME...]`, found in `policies.__all__` and built by their constructor's annotations.

A name is the class's; capitals, hyphens and underscores do not matter. Values are whole numbers, numbers, words, true, false or
none; other arguments of a constructor cannot be given this way. Policies joined with `+` are composed in that order: a `+` before
a letter joins, one before a digit belongs to a number.
"""

from __future__ import annotations

import inspect
import re
import types
import typing
from typing import Any

from ambient_sd.guard.policies.base import Policy
from ambient_sd.guard.policies.compose import Compose
from ambient_sd.utils.errors import UserError, one_line


def available() -> dict[str, type[Policy]]:
    """Return every policy that can be asked for, by the name that is shown.

    Example:
        >>> "sail" in available()
        True
    """
    from ambient_sd.guard import policies

    found = [getattr(policies, name) for name in policies.__all__]
    return {
        re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", kind.__name__).lower(): kind
        for kind in found
        if inspect.isclass(kind)
        and issubclass(kind, Policy)
        and kind.__module__ != Policy.__module__
        and kind is not Compose
    }


def usage(name: str, kind: type[Policy]) -> str:
    """Return how a policy is asked for: its name, its settings and their defaults.

    Example:
        >>> usage("scale_cap", available()["scale_cap"])
        'scale_cap:cap=FLOAT'
    """
    parts = [
        f"{p.name}=" + (_shown(annotation) if p.default is p.empty else str(p.default).lower())
        for p, annotation in _settings(kind)
    ]
    return name + (":" + ",".join(parts) if parts else "")


def listing() -> str:
    """Return one line for each policy, for `--help`.

    Example:
        >>> listing().splitlines()[0]
        '  attention_guard:repulsion=2.0,attenuation=0.3,threshold=none,statistic=logits,all_blocks=false,decay=cosine,orthogonalize=true'
    """
    lines = []
    for name, kind in sorted(available().items()):
        first = (inspect.getdoc(kind) or "").split("\n")[0]
        lines.append(f"  {usage(name, kind)}\n      {first}")
    lines.append(
        "  several, joined with +: opposite_guidance:until=650+static_transition\n      They act as one, in this order."
    )
    return "\n".join(lines)


def make(text: str) -> Policy:
    """Build the policy that `NAME[:key=value,...]` asks for, or of several joined with `+` their composition.

    Raises:
        UserError: no policy or setting of that name, a value that it does not take, or policies that do not combine.

    Example:
        >>> make("static_transition:until=400").until
        400.0
    """
    parts = re.split(r"\+(?![\d.])", text)
    return _make(text) if len(parts) == 1 else Compose(*map(_make, parts))


def _make(text: str) -> Policy:
    name, _, given = text.partition(":")
    kinds = available()
    chosen = [(known, kind) for known, kind in kinds.items() if _plain(known) == _plain(name)]
    if not chosen:
        raise UserError(f"policy is {one_line(name, 60)!r}", rule=f"it must be one of {', '.join(sorted(kinds))}",
                        remedy="see ambient-sd sample --help")  # fmt: skip
    shown, kind = chosen[0]
    settings = {p.name: (p, annotation) for p, annotation in _settings(kind)}
    values: dict[str, Any] = {}
    for part in filter(None, given.split(",")):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or key not in settings or key in values:
            raise UserError(f"policy {shown} is given {one_line(part, 60)!r}",
                            rule="settings are key=value, each once", remedy=f"as in {usage(shown, kind)}")  # fmt: skip
        values[key] = _value(value.strip(), settings[key][1], f"policy {shown}: {key}")
    missing = [p.name for p, _ in settings.values() if p.default is p.empty and p.name not in values]
    if missing:
        raise UserError(f"policy {shown} needs {', '.join(missing)}", remedy=f"as in {usage(shown, kind)}")
    return kind(**values)


def _settings(kind: type[Policy]) -> list[tuple[inspect.Parameter, Any]]:
    if kind.__init__ is object.__init__:
        return []
    hints = typing.get_type_hints(kind.__init__)
    parameters = list(inspect.signature(kind).parameters.values())
    return [(p, hints.get(p.name, str)) for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _shown(annotation: Any) -> str:
    if typing.get_origin(annotation) is typing.Literal:
        return "|".join(map(str, typing.get_args(annotation)))
    return str(getattr(annotation, "__name__", annotation)).upper()


def _value(text: str, annotation: Any, where: str) -> Any:
    """Read a value by its annotation: the first alternative that it can be."""
    origin = typing.get_origin(annotation)
    if origin is typing.Literal:
        for choice in typing.get_args(annotation):
            if text == str(choice):
                return choice
    elif origin in (typing.Union, types.UnionType):
        for alternative in typing.get_args(annotation):
            try:
                return _value(text, alternative, where)
            except UserError:
                continue
    elif annotation is type(None) and text.lower() == "none":
        return None
    elif annotation is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    elif annotation in (int, float):
        try:
            return annotation(text)
        except ValueError:
            pass
    elif annotation is str:
        return text
    raise UserError(f"{where} is {one_line(text, 60)!r}", rule=f"it must be {_shown(annotation)}")
