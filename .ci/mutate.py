"""Change the program by one operator, constant or statement at a time; do its tests notice?

PYTHONPATH=.ci python -m pytest -q -s -p mutate --mutate SECTION,... [--mutants N] [--seed N].
First every test runs once, and it is noted which functions it calls, in this process or in a
server; `--calls=FILE` keeps that for the next time. Each mutant then lives in a forked child, in
which the tests that call its function run until one fails: the function has the other code
there, and so has the bytecode that this child's servers are started from. Python 3.12 or later.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import functools
import itertools
import json
import marshal
import mmap
import operator
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

import mediaserver as ms

SOURCE = Path(ms.__file__).read_text("utf-8")
FOREIGN = {"browser", "chromium", "machine", "behind", "django"}  # tests of others' programs
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COUNTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Div: ast.Mult,
}  # fmt: skip
AT_DEFINITION = {"annotation", "returns", "defaults", "kw_defaults", "decorator_list"}
SECONDS = 40  # after which no further test of a mutant begins
DEADLINE = 10.0  # seconds that a mutant may let a test wait
# Write down the line of each function that is called, behind the number of the test.
RECORDER = """
def record_calls(folder, program):
    import mmap, os, sys
    with open(folder + "/test", "r+b") as file:
        test = mmap.mmap(file.fileno(), 4)
    seen = set()

    def begin(code, _):
        if code.co_filename != program:
            return sys.monitoring.DISABLE
        call = b"%d %d\\n" % (int.from_bytes(test[:4], "little"), code.co_firstlineno)
        if call not in seen:
            seen.add(call)
            try:
                with open(folder + "/calls", "ab", 0) as file:
                    file.write(call)
            except OSError:
                pass

    sys.monitoring.use_tool_id(4, "mutate")
    sys.monitoring.register_callback(4, sys.monitoring.events.PY_START, begin)
    sys.monitoring.set_events(4, sys.monitoring.events.PY_START)
"""


def can_change(node: ast.AST) -> bool:
    """Whether there is a change for a node."""
    if isinstance(node, ast.BinOp):
        return type(node.op) in COUNTED
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    if isinstance(node, ast.Constant):
        return isinstance(node.value, int)
    if isinstance(node, ast.Return):
        return node.value is not None and not isinstance(node.value, ast.Constant)
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, (ast.Constant, ast.Yield))
    kinds = (
        ast.Compare, ast.BoolOp, ast.If, ast.IfExp, ast.While, ast.AugAssign, ast.Raise,
        ast.Continue, ast.Break,
    )  # fmt: skip
    return isinstance(node, kinds)


def change(node: Any) -> ast.AST:
    """The node with its one change."""
    made: Any = copy.copy(node)
    if isinstance(node, ast.Compare):
        made.ops = [COMPARED[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.BinOp):
        made.op = COUNTED[type(node.op)]()
    elif isinstance(node, ast.BoolOp):
        made.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.UnaryOp):
        made = node.operand
    elif isinstance(node, ast.Constant):
        made.value = not node.value if isinstance(node.value, bool) else node.value + 1
    elif isinstance(node, ast.Return):
        made.value = ast.Constant(None)
    elif isinstance(node, (ast.If, ast.IfExp, ast.While)):
        made.test = ast.UnaryOp(ast.Not(), node.test)
    else:
        made = ast.Pass()
    return ast.fix_missing_locations(ast.copy_location(made, node))


def nodes_to_change(node: ast.AST) -> Iterator[ast.AST]:
    """What can be changed of a function's code, of which its defaults and annotations are none."""
    for field, value in ast.iter_fields(node):
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and field not in AT_DEFINITION:
                if can_change(child):
                    yield child
                yield from nodes_to_change(child)


class Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST) -> None:
        self.target = target

    def visit(self, node: ast.AST) -> Any:
        return change(node) if node is self.target else self.generic_visit(node)


@functools.cache
def banners(path: str) -> list[tuple[int, str]]:
    """The lines of a file's banners, counted from 0, and the numbers of their sections."""
    lines = Path(path).read_text("utf-8").splitlines()
    found = [(number, re.match(r"# (\d+)\. ", line)) for number, line in enumerate(lines)]
    return [(number, banner[1]) for number, banner in found if banner]


def section_of(path: str, line: int) -> str:
    """The number of the section that a line of a file is in."""
    return max((b for b in banners(path) if b[0] <= line), default=(0, ""))[1]


def functions(tree: ast.Module) -> dict[str, ast.FunctionDef]:
    """Functions and methods by their names; what is nested belongs to what it is in."""
    found: dict[str, ast.FunctionDef] = {}
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                found[prefix + inner.name] = inner
    return found


def function_of(name: str) -> FunctionType | None:
    """The function object that a name of `functions` has in the program."""
    owner, _, last = name.rpartition(".")
    thing: Any = vars(getattr(ms, owner)).get(last) if owner else getattr(ms, last, None)
    for wrapper in ("fget", "func", "__func__", "__wrapped__"):
        thing = getattr(thing, wrapper, None) or thing
    return thing if isinstance(thing, FunctionType) else None


def mutated_code(name: str, function: ast.AST, node: ast.AST) -> CodeType:
    """The code of a function with one node of it changed."""
    made = Replace(node).visit(copy.deepcopy(function, {id(node): node}))
    owner = name.rpartition(".")[0]
    if owner:
        made = ast.ClassDef(owner, [], [], [made], [])
    module = ast.parse("from __future__ import annotations")
    module.body.append(made)
    code = compile(ast.fix_missing_locations(module), ms.__file__, "exec")
    for part in name.split("."):
        codes = [c for c in code.co_consts if isinstance(c, CodeType) and c.co_name == part]
        code = codes[-1]
    return code


def with_function(whole: CodeType, old: CodeType, new: CodeType) -> CodeType:
    """The code of a module with that of one function in it replaced."""
    place = (old.co_name, old.co_firstlineno)
    parts = []
    for part in whole.co_consts:
        if not isinstance(part, CodeType):
            parts.append(part)
        elif (part.co_name, part.co_firstlineno) == place:
            parts.append(new)
        else:
            parts.append(with_function(part, old, new))
    is_same = all(map(operator.is_, parts, whole.co_consts))
    return whole if is_same else whole.replace(co_consts=tuple(parts))


def start_from(tests: Any, folder: Path, make: Any) -> None:
    """Let the tests start their servers from what `make` makes of the program's code."""
    header, code = tests.BYTECODE_BEFORE[:16], marshal.loads(tests.BYTECODE_BEFORE[16:])
    bytecode = folder / "mediaserver.pyc"
    bytecode.write_bytes(header + marshal.dumps(make(code)))
    tests.BYTECODE = str(bytecode)


def in_child(work: Any, seconds: float) -> int:
    """The exit status of a child that does some work in a folder; 1 too when it takes too long."""
    sys.stdout.flush()
    folder = tempfile.mkdtemp(prefix="mutant-")
    process = os.fork()
    if not process:
        status = 3
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            tempfile.tempdir = os.environ["TMPDIR"] = folder
            status = int(work(Path(folder)))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end, ended, status = time.monotonic() + seconds, 0, 1 << 8
    while not ended and time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):  # its servers, too
        os.killpg(process, signal.SIGKILL)
    if not ended:
        os.waitpid(process, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return os.waitstatus_to_exitcode(status) if ended else 1


class Mutation:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def check(
        self, function: FunctionType, code: CodeType, items: list[pytest.Item], folder: Path
    ) -> bool:
        """Whether one of the tests fails with other code; later ones are left out then."""
        end = time.monotonic() + SECONDS
        before, function.__code__ = function.__code__, code
        self.tests.DEADLINE = DEADLINE
        start_from(self.tests, folder, lambda whole: with_function(whole, before, code))
        self.failed = False
        for item, following in itertools.pairwise([*items, None]):
            if self.failed or time.monotonic() > end:
                break
            assert item
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
        return self.failed

    def record(self, items: list[pytest.Item], result: Path, folder: Path) -> int:
        """Write which tests that pass call each function, and how long each took."""
        (folder / "test").write_bytes(bytes(4))
        (folder / "calls").touch()
        run = f"record_calls({str(folder)!r}, {ms.__file__!r})"
        hook = f"import marshal\n{RECORDER}\n{run}\ndel record_calls\n"
        whole = folder / "whole"
        whole.write_bytes(self.tests.BYTECODE_BEFORE[16:])
        hook += f"exec(marshal.loads(open({str(whole)!r}, 'rb').read()))"
        start_from(self.tests, folder, lambda _: compile(hook, ms.__file__, "exec"))
        exec(f"{RECORDER}\n{run}", {})
        with (folder / "test").open("r+b") as file:
            number = mmap.mmap(file.fileno(), 4)
        took = {}
        for place, (item, following) in enumerate(itertools.pairwise([*items, None])):
            assert item
            number[:4] = place.to_bytes(4, "little")
            self.failed, begun = False, time.monotonic()
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if not self.failed:
                took[place] = time.monotonic() - begun
            if place % 100 == 0:
                print(f"{place} of {len(items)} tests", file=sys.stderr, flush=True)
        sys.monitoring.set_events(4, 0)
        calls: dict[str, list[tuple[float, str]]] = defaultdict(list)
        for line in sorted(set((folder / "calls").read_text().splitlines())):
            place, function = map(int, line.split())
            if place in took:
                calls[str(function)].append((took[place], items[place].nodeid))
        result.write_text(json.dumps(calls))
        return 0

    def tests_of(self, name: str, line: int, section: str) -> list[pytest.Item]:
        """The tests that call a function: those of its own section first, quick ones first."""
        found = []
        for seconds, test in self.calls.get(str(line), []):
            if item := self.known.get(test):
                is_own = section_of(self.tests.__file__, item.location[1] or 0) == section
                found.append((not is_own, seconds, test))
        return [self.known[test] for _, _, test in sorted(found)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        options = self.config.option
        items = [i for i in session.items if not FOREIGN & set(getattr(i, "fixturenames", ()))]
        self.tests: Any = sys.modules["test_mediaserver"]
        self.tests.BYTECODE_BEFORE = Path(self.tests.BYTECODE).read_bytes()
        self.known = {item.nodeid: item for item in items}
        kept = Path(options.calls or tempfile.mkstemp()[1])
        if not kept.exists() or not kept.stat().st_size:
            assert in_child(functools.partial(self.record, items, kept), 3600) == 0
        self.calls: dict[str, list[tuple[float, str]]] = json.loads(kept.read_text())
        for section in options.mutate.split(","):
            print(f"section {section}: {self.mutate(section)}", flush=True)
        return True

    def mutate(self, section: str) -> dict[str, int]:
        """How many mutants of a section are killed, survive, and are called by no test."""
        options = self.config.option
        mutants = [
            (name, function, node)
            for name, function in functions(ast.parse(SOURCE)).items()
            if section_of(ms.__file__, function.lineno - 1) == section
            for node in nodes_to_change(function)
        ]
        random.Random(options.seed).shuffle(mutants)
        counts = {"killed": 0, "survived": 0, "not called": 0}
        for name, function, node in mutants[: options.mutants]:
            found = function_of(name)
            if found is None:
                continue
            tests = self.tests_of(name, found.__code__.co_firstlineno, section)
            code = mutated_code(name, function, node)
            if code.co_freevars != found.__code__.co_freevars:
                continue  # a method that calls super() no more
            if tests:
                check = functools.partial(self.check, found, code, tests)
                verdict = "killed" if in_child(check, 2 * SECONDS) else "survived"
            else:
                verdict = "not called"
            counts[verdict] += 1
            if verdict != "killed":
                before = ast.unparse(node).partition("\n")[0][:80]
                after = ast.unparse(change(node)).partition("\n")[0][:80]
                place = f"{getattr(node, 'lineno', '?')} {name}"
                print(f"{verdict} ({len(tests)} tests): {place}: {before} -> {after}", flush=True)
        return counts


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", help="numbers of sections")
    parser.addoption("--mutants", type=int, default=100)
    parser.addoption("--calls", help="a file for what is noted of calls")
    parser.addoption("--seed", type=int, default=1)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.mutate:
        config.pluginmanager.register(Mutation(config))
