"""Policies from a command line: `NAME[:key=value,...][+NAME...]`, found in `policies.__all__` and built by their constructor's annotations.

A name is the class's, or the short one of its paper (`SHORT`), without regard to capitals, hyphens and underscores. Values are whole
numbers, numbers, words, true or false, or none; what else a constructor may take cannot be given this way. Several joined with `+` are
composed in that order: a `+` before a letter joins, one before a digit belongs to a number.

`listing` reads the policies' source instead of importing them, which takes seconds: `--help` must come at once.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import re
import types
import typing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ambient_sd.utils.errors import UserError, one_line
from ambient_sd.utils.settings import nearest

if TYPE_CHECKING:
    from ambient_sd.guard.policies.base import Policy

SHORT = {
    "Wen": "prompt_optimization", "STP": "static_transition", "DTP": "dynamic_transition", "OG": "opposite_guidance", "cap": "scale_cap",
    "G_spe": "despecification", "PRSS": "reanchoring", "GUARD": "attention_guard", "Han": "latent_optimization", "SAIL": "sail",
    "Ren": "attention_rescaling", "RT": "random_tokens", "CWR": "caption_word_repetition", "RNA": "random_numbers",
    "GNI": "gaussian_embedding_noise",
}  # fmt: skip


def available() -> dict[str, type[Policy]]:
    """Return every policy that can be asked for, by the name that is shown.

    Example:
        >>> "sail" in available()
        True
    """
    from ambient_sd.guard import policies
    from ambient_sd.guard.policies.base import Policy
    from ambient_sd.guard.policies.compose import Compose

    found = [getattr(policies, name) for name in policies.__all__]
    return {
        _words(kind.__name__): kind
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
    """Return every policy with its short name, its settings and their defaults, for `--help`; nothing is imported.

    Example:
        >>> "STP or static_transition:until=500" in listing()
        True
    """
    folder = Path(__file__).with_name("policies")
    nodes = [node for path in sorted(folder.glob("*.py")) for node in ast.parse(path.read_text(encoding="utf-8")).body]
    kinds = {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}
    short = {name: nickname for nickname, name in SHORT.items() if name != nickname.lower()}
    lines = []
    for name, node in sorted((_words(name), node) for name, node in kinds.items() if _words(name) in SHORT.values()):
        shown = f"{short[name]} or {name}" if name in short else name
        parts = ",".join(_declared(node, kinds))
        first = (ast.get_docstring(node) or "").split("\n")[0]
        lines.append(f"  {shown}{':' if parts else ''}{parts}\n      {first}")
    lines.append(
        "  several, joined with +: opposite_guidance:until=650+static_transition\n      They act as one, in this order."
    )
    return "\n".join(lines)


def _declared(node: ast.ClassDef, kinds: dict[str, ast.ClassDef]) -> list[str]:
    """Return `name=default` of what a class's constructor takes, or that of the class that it inherits."""
    for statement in node.body:
        if isinstance(statement, ast.FunctionDef) and statement.name == "__init__":
            given = statement.args.args[1:]
            missing: list[ast.expr | None] = [None] * (len(given) - len(statement.args.defaults))
            pairs = [*zip(given, [*missing, *statement.args.defaults], strict=True),
                     *zip(statement.args.kwonlyargs, statement.args.kw_defaults, strict=True)]  # fmt: skip
            return [
                f"{argument.arg}={_written(argument.annotation if default is None else default)}"
                for argument, default in pairs
            ]
    bases = [base.id for base in node.bases if isinstance(base, ast.Name) and base.id in kinds]
    return _declared(kinds[bases[0]], kinds) if bases else []


def _written(node: ast.expr | None) -> str:
    """Return a default, or of what must be given its type, as `usage` shows it."""
    assert node is not None
    with contextlib.suppress(ValueError):
        return str(ast.literal_eval(node)).lower()
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "Literal":
        return "|".join(map(str, ast.literal_eval(node.slice)))
    return ast.unparse(node).upper()


def canonical(text: str) -> str:
    """Return one spelling of `NAME[:key=value,...][+NAME...]`: long names, no spaces; what is unknown stays.

    Example:
        >>> canonical("OG+STP: until=400")
        'opposite_guidance+static_transition:until=400'
    """
    parts = []
    for part in re.split(r"\+(?![\d.])", text):
        name, colon, given = part.strip().partition(":")
        parts.append(_long(name) + colon + given.replace(" ", ""))
    return "+".join(parts)


def _long(name: str) -> str:
    names = {_plain(short): long for short, long in SHORT.items()} | {_plain(long): long for long in SHORT.values()}
    return names.get(_plain(name), name)


def make(text: str) -> Policy:
    """Build the policy that `NAME[:key=value,...]` asks for, or of several joined with `+` their composition.

    Raises:
        UserError: no policy or setting of that name, a value that it does not take, or policies that do not combine.

    Example:
        >>> make("static_transition:until=400").until
        400.0
    """
    from ambient_sd.guard.policies.compose import Compose

    parts = re.split(r"\+(?![\d.])", text)
    return _make(text) if len(parts) == 1 else Compose(*map(_make, parts))


def _make(text: str) -> Policy:
    name, _, given = text.partition(":")
    kinds = available()
    chosen = [(known, kind) for known, kind in kinds.items() if _plain(known) == _plain(_long(name))]
    if not chosen:
        raise UserError(f"policy is {one_line(name, 60)!r}", rule=nearest(name, [*SHORT, *kinds]),
                        remedy="ambient-sd sample --help lists all")  # fmt: skip
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


def _words(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


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
