"""How the package is built: imports go down, one place samples, one place writes pages, and few modules lie at the top."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "ambient_sd"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}

# Low floors first: a module may import from its own floor's package and from lower floors.
FLOORS: list[set[str]] = [
    {"utils", "schedule", "objective", "oracle", "assets", "sampling_options"},
    {"families"},
    {"data"},
    {"guard", "audit"},
    {"sampling"},
    {"training"},
    {"reporting"},
    {"commands"},
    {"cli", "__init__"},
]
FLOOR = {part: number for number, parts in enumerate(FLOORS) for part in parts}


def part_of(module: str) -> str:
    return module.split(".", maxsplit=1)[0]


def imports_of(module: str, tree: ast.AST) -> Iterator[str]:
    """Yield the modules of the package that a module imports, lazy imports too, but not those for type checkers alone."""
    checked_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in checked_only:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import"
            # `from ambient_sd import x` may name a module or what __init__ offers.
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("ambient_sd.") for name in names if name.startswith("ambient_sd."))


def arrows(sources: dict[str, str]) -> set[tuple[str, str]]:
    """Return the imports that go up, or across between the packages of one floor."""
    found = set()
    for module, text in sources.items():
        here = part_of(module)
        for name in imports_of(module, ast.parse(text)):
            there = part_of(name)
            if there not in FLOOR:  # __version__ and what else __init__ offers
                continue
            across = FLOOR[there] == FLOOR[here] and there != here and FLOOR[here] > 0
            if FLOOR[there] > FLOOR[here] or across:
                found.add((module, there))
    return found


def looped_calls(text: str) -> list[str]:
    """Return the calls of a pipeline inside a loop or a comprehension, but for functions that are only defined there."""
    found: list[str] = []

    def visit(node: ast.AST, looped: bool) -> None:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            looped = False
        if isinstance(node, (ast.For, ast.While, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            looped = True
        if looped and isinstance(node, ast.Call):
            name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
            if re.search(r"(^|_)(pipe|pipeline)$", name) and not name.startswith("load_"):
                found.append(ast.unparse(node)[:80])
        for child in ast.iter_child_nodes(node):
            visit(child, looped)

    visit(ast.parse(text), False)
    return found


TAG = re.compile(r"</?(p|div|html|body|td|th|tr|table|figure|figcaption|h[1-6]|span|style|title|img|small|ul|li|pre|svg)\b[^<>]*>|<!doctype", re.I)  # fmt: skip


def markup(text: str) -> list[str]:
    """Return the tags in the strings of a module, docstrings aside."""
    tree = ast.parse(text)
    docs = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return [match.group() for node in strings if id(node) not in docs for match in TAG.finditer(node.value)]


def test_imports_go_down_the_floors_only() -> None:
    found = arrows({name: path.read_text() for name, path in MODULES.items()})
    assert found == set()


def test_arrows_up_are_seen() -> None:
    """Negative control: lazy and aliased imports are found, and those that may be are not."""
    up = {"guard.a": "def f():\n    from ambient_sd.training.config import x\n", "audit.b": "import ambient_sd.guard as g\n", "data.c": "from ambient_sd import sampling\n"}  # fmt: skip
    assert arrows(up) == {("guard.a", "training"), ("audit.b", "guard"), ("data.c", "sampling")}
    down = {
        "guard.a": "from ambient_sd import __version__\nfrom ambient_sd.data import stream\nfrom ambient_sd.guard.b import c\n"
    }
    assert arrows(down) == set()


def test_every_module_has_a_floor() -> None:
    assert {part_of(name) for name in MODULES} <= set(FLOOR)


def test_no_loop_calls_a_pipeline_outside_sampling() -> None:
    found = {name: looped_calls(path.read_text()) for name, path in MODULES.items() if name != "sampling"}
    assert {name: calls for name, calls in found.items() if calls} == {}


def test_loops_over_a_pipeline_are_seen() -> None:
    """Negative control."""
    assert len(looped_calls("for p in prompts:\n    images += pipe(p).images\n")) == 1
    assert len(looped_calls("x = [self.pipe(p) for p in prompts]\nwhile True: base_pipeline()\n")) == 2
    assert looped_calls("pipe(prompts)\nfor p in prompts:\n    load_pipeline(p)\n    pipe.unet(p)\n") == []


def test_html_is_written_in_reporting_alone() -> None:
    found = {name: markup(path.read_text()) for name, path in MODULES.items() if part_of(name) != "reporting"}
    assert {name: tags[:3] for name, tags in found.items() if tags} == {}


def test_markup_is_seen() -> None:
    """Negative control."""
    assert markup('x = f"<p class=a>{y}</p>"') == ["<p class=a>", "</p>"]
    assert markup('"""Not <p> here."""\nx = "a < b > c <unknown>"') == []


def test_few_modules_lie_at_the_top() -> None:
    top = sorted(path.stem for path in PACKAGE.glob("*.py") if path.stem != "__init__")
    assert len(top) <= 6, top
