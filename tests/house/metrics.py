"""Figures of the code, and what they count: python tests/house/metrics.py [--list NAME].

The source is read, not imported. `make lint` prints the figures, test_metrics.py holds them to LIMITS; --list names the
places behind one figure.
"""

import argparse
import ast
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = ("kernels", "ssmcore", "vision", "genomics", "timeseries", "graphs")
LONG_FILE = 600  # lines
BLOCK = 12  # significant lines that make a copy
# Figure -> (lowest, highest) allowed.
LIMITS = {
    "annotated functions, %": (99.0, 100.0),
    "tensor functions with shapes in their docstring, %": (95.0, 100.0),
    "lines of tests per line of code": (0.6, 2.0),
    "asserts on arguments": (0, 0),
    "lines of commented-out code": (0, 0),
    "TODO, FIXME, XXX": (0, 0),
    "files over 600 lines": (0, 2),
    "median lines of a file": (0, 200),
    "duplicated blocks of 12 lines": (0, 0),
}
# "(b, l, d)", "(2, e)", "(v,)", "(..., n)", "(batch, channels)"; or the function where they stand: "See `forward`".
_SIZE = r"(?:\.\.\.|[\w *+/.^-]+)"
_SHAPE = re.compile(rf"\({_SIZE},(?:\s*{_SIZE}(?:,\s*{_SIZE})*)?[,)]|[Ss]calar|shape|\b(?:[Ss]ee|[Ll]ike|[Aa]s) `")


class File:
    """One Python file: its lines, its tree, and where functions begin."""

    def __init__(self, path: Path) -> None:
        self.name = path.relative_to(ROOT).as_posix()
        self.text = path.read_text()
        self.tree = ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the tree; walking it is what takes the time."""
        return list(ast.walk(self.tree))

    @property
    def length(self) -> int:
        return self.text.count("\n")

    @cached_property
    def functions(self) -> list[tuple[ast.FunctionDef, str]]:
        """Functions and methods with the class they stand in, or ""; Triton's kernels are none."""

        def visit(node: ast.AST, owner: str) -> Iterator[tuple[ast.FunctionDef, str]]:
            for child in ast.iter_child_nodes(node):
                if isinstance(child, ast.expr):
                    continue
                function = isinstance(child, ast.FunctionDef)
                if function and not any("jit" in ast.unparse(decorator) for decorator in child.decorator_list):
                    yield child, owner
                below = f"{owner}.{child.name}" if function else owner
                yield from visit(child, child.name if isinstance(child, ast.ClassDef) else below)

        return list(visit(self.tree, ""))

    @cached_property
    def significant_lines(self) -> list[tuple[int, str]]:
        """Lines without comments, docstrings, imports, signatures and brackets alone, with their numbers."""
        skipped: set[int] = set()
        for node in self.nodes:
            if isinstance(node, ast.FunctionDef):
                skipped.update(range(node.lineno, node.body[0].lineno))
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if docstring or isinstance(node, (ast.Import, ast.ImportFrom)):
                skipped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
        lines = [(number, line.split("  # ")[0].strip()) for number, line in enumerate(self.text.splitlines(), 1)]
        return [
            (n, line) for n, line in lines if n not in skipped and re.search(r"\w", line) and not line.startswith("#")
        ]

    @cached_property
    def comments(self) -> list[tuple[int, str]]:
        """Lines that are a comment and nothing else, without what speaks to tools, with their numbers."""
        strings: set[int] = set()
        for node in self.nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.end_lineno != node.lineno:
                strings.update(range(node.lineno, node.end_lineno or node.lineno))
        found = []
        for number, line in enumerate(self.text.splitlines(), 1):
            comment = line.strip()
            if comment.startswith("#") and number not in strings:
                text = comment.lstrip("#").strip()
                if not re.match(r"(noqa|fmt|type|ruff|mypy|pragma):", text):
                    found.append((number, text))
        return found


@cache
def library() -> tuple[File, ...]:
    return tuple(File(path) for folder in LIBRARY for path in sorted((ROOT / folder).rglob("*.py")))


@cache
def tests() -> tuple[File, ...]:
    return tuple(File(path) for path in sorted((ROOT / "tests").rglob("*.py")))


def parameters(function: ast.FunctionDef) -> list[ast.arg]:
    """All parameters but self and cls."""
    spec = function.args
    found = [*spec.posonlyargs, *spec.args, *filter(None, [spec.vararg]), *spec.kwonlyargs, *filter(None, [spec.kwarg])]
    return [argument for argument in found if argument.arg not in ("self", "cls")]


def unannotated() -> list[str]:
    return [
        f"{file.name}:{function.lineno} {function.name}"
        for file in library()
        for function, _ in file.functions
        if any(argument.annotation is None for argument in parameters(function)) or function.returns is None
    ]


@cache
def listed() -> frozenset[str]:
    """Names in the `__all__` of a package or of a package inside one."""
    found: set[str] = set()
    for file in library():
        for node in file.nodes if file.name.endswith("__init__.py") else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
                found |= {word.value for word in ast.walk(node.value) if isinstance(word, ast.Constant)}
    return frozenset(found)


def is_public(function: ast.FunctionDef, owner: str) -> bool:
    """A listed function, or a method of a listed class."""
    return (owner or function.name) in listed() and not (function.name.startswith("_") and function.name != "__call__")


def tensor_functions() -> Iterator[tuple[str, bool]]:
    """Public functions that take or return tensors, with whether their docstring gives shapes.

    Not counted are steps that Lightning calls with a batch, whose class gives them; tensors of any shape and number
    (`*tensors`); weights by name; and what only refuses. A method without docstring has that of the class it extends.
    """
    inherited: dict[tuple[str, str], str] = {}
    bases: dict[str, list[str]] = {}
    for file in library():
        for node in file.nodes:
            if isinstance(node, ast.ClassDef):
                bases[node.name] = [ast.unparse(base).split(".")[-1] for base in node.bases]
                methods = [method for method in node.body if isinstance(method, ast.FunctionDef)]
                inherited |= {(node.name, method.name): ast.get_docstring(method) or "" for method in methods}

    def documentation(owner: str, name: str) -> str:
        own = inherited.get((owner, name), "")
        return own or next(filter(None, (documentation(base, name) for base in bases.get(owner, ()))), "")

    for file in library():
        for function, owner in file.functions:
            hook = re.search(r"^on_|_step$", function.name)
            if hook or not is_public(function, owner) or function.returns is None:
                continue
            spec = function.args
            given = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs]
            words = [ast.unparse(node.annotation) for node in given if node.annotation is not None]
            words.append(ast.unparse(function.returns))
            tensors = any(re.search(r"\bTensor\b", re.sub(r"(dict|Mapping|Callable)\[.*", "", word)) for word in words)
            if tensors and words[-1] != "NoReturn":
                text = documentation(owner, function.name) if owner else ast.get_docstring(function) or ""
                name = f"{owner}.{function.name}".lstrip(".")
                yield f"{file.name}:{function.lineno} {name}", bool(_SHAPE.search(text))


def asserts_on_arguments() -> list[str]:
    """Asserts of public functions that test a parameter; `x is not None` only tells a checker what is known."""
    found = []
    for file in library():
        for function, _ in file.functions:
            names = {argument.arg for argument in parameters(function) if not function.name.startswith("_")}
            for node in ast.walk(function):
                if isinstance(node, ast.Assert) and not re.fullmatch(r"[\w.]+ is not None", ast.unparse(node.test)):
                    read = {name.id for name in ast.walk(node.test) if isinstance(name, ast.Name)}
                    found += [f"{file.name}:{node.lineno} {ast.unparse(node)}"] if read & names else []
    return found


def commented_out_code() -> list[str]:
    """Comments that parse as a statement with an effect."""
    effects = (ast.Assign, ast.AugAssign, ast.Return, ast.Import, ast.ImportFrom, ast.Raise, ast.Assert)
    found = []
    for file in (*library(), *tests()):
        for number, comment in file.comments:
            header = re.fullmatch(r"(?:if|elif|for|while|with|def|class) .*:", comment)
            try:
                body = ast.parse(comment + " pass" if header else comment).body
            except SyntaxError:
                continue
            called = bool(body) and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Call)
            if header or called or (bool(body) and isinstance(body[0], effects)):
                found.append(f"{file.name}:{number} # {comment}")
    return found


def todos() -> list[str]:
    return [
        f"{file.name}:{number} # {comment}"
        for file in (*library(), *tests())
        for number, comment in file.comments
        if re.search(r"\b(TODO|FIXME|XXX)\b", comment)
    ]


def long_files() -> list[str]:
    return [f"{file.name} {file.length}" for file in (*library(), *tests()) if file.length > LONG_FILE]


def duplicated_blocks() -> list[str]:
    """Runs of at least BLOCK significant lines of the library that stand in two places."""
    lines = [(file.name, number, line) for file in library() for number, line in file.significant_lines]
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for start in range(len(lines) - BLOCK + 1):
        if lines[start][0] == lines[start + BLOCK - 1][0]:
            places[tuple(line for _, _, line in lines[start : start + BLOCK])].append(start)
    pairs = {(starts[0], other) for starts in places.values() for other in starts[1:]}
    found = []
    for first, second in sorted(pairs):
        if (first - 1, second - 1) not in pairs:  # where the run begins
            length = next(n for n in range(len(lines)) if (first + n, second + n) not in pairs) + BLOCK - 1
            where = [f"{lines[start][0]}:{lines[start][1]}" for start in (first, second)]
            found.append(f"{where[0]} and {where[1]}, {length} lines")
    return found


def figures() -> dict[str, tuple[float, list[str]]]:
    """Name -> (value, the places that count against it)."""
    everything = sum(1 for file in library() for _ in file.functions)
    bare = unannotated()
    shaped = list(tensor_functions())
    shapeless = [name for name, good in shaped if not good]
    size = [sum(len(file.significant_lines) for file in files) for files in (library(), tests())]
    counts = {
        "asserts on arguments": asserts_on_arguments(),
        "lines of commented-out code": commented_out_code(),
        "TODO, FIXME, XXX": todos(),
        "files over 600 lines": long_files(),
        "duplicated blocks of 12 lines": duplicated_blocks(),
    }
    found: dict[str, tuple[float, list[str]]] = {
        "annotated functions, %": (100 * (1 - len(bare) / everything), bare),
        "tensor functions with shapes in their docstring, %": (100 * (1 - len(shapeless) / len(shaped)), shapeless),
        "lines of tests per line of code": (size[1] / size[0], []),
        "median lines of a file": (statistics.median(file.length for file in library()), []),
        **{name: (len(places), places) for name, places in counts.items()},
    }
    return {name: found[name] for name in LIMITS}


def main() -> int:
    """Print the figures with their limits, or the places behind one; exit code 1 where a limit is broken."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", default=None, metavar="NAME", help="a part of a figure's name: show its places")
    options = parser.parse_args()
    broken = False
    for name, (value, places) in figures().items():
        low, high = LIMITS[name]
        if options.list is not None:
            if options.list in name:
                sys.stdout.write("\n".join([f"{name}: {value:.4g}", *places, ""]))
            continue
        bad = not low <= value <= high
        broken |= bad
        sys.stdout.write(f"{name:52} {value:8.4g}   {low:g} to {high:g}{'   OUT OF BOUNDS' if bad else ''}\n")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
