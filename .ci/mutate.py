"""Change the program by one operator, constant or statement at a time; do its tests notice?

PYTHONPATH=.ci python -m pytest -q -s -p mutate --mutate SECTION,... [--mutants N] [--seed N].
Each mutant lives in a forked child, in which the tests that call its function run until one
fails. Only tests in the pytest process count: what a server does is not seen.
"""

from __future__ import annotations

import ast
import copy
import functools
import json
import os
import random
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import pytest

import mediaserver as ms

SOURCE = Path(ms.__file__).read_text("utf-8")
SERVERS = {"server", "start", "machine", "browser", "chromium", "behind", "entities", "django"}
COMPARED = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
COUNTED = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.Div: ast.Mult,
}  # fmt: skip
SECONDS = 60  # that the tests of one mutant may take


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


class Replace(ast.NodeTransformer):
    def __init__(self, target: ast.AST) -> None:
        self.target = target

    def visit(self, node: ast.AST) -> Any:
        return change(node) if node is self.target else self.generic_visit(node)


def lines_of(sections: list[str]) -> set[int]:
    """The lines of the sections with these numbers."""
    found, current = set(), ""
    for number, line in enumerate(SOURCE.splitlines(), 1):
        if banner := re.match(r"# (\d+)\. ", line):
            current = banner[1]
        if current in sections:
            found.add(number)
    return found


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


def in_child(work: Any, seconds: float) -> int:
    """The exit status of a child that does some work; 1 too when it takes too long."""
    sys.stdout.flush()
    process = os.fork()
    if not process:
        status = 3
        try:
            signal.alarm(0)
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, 1)
            status = int(work())
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    return 1


class Mutation:
    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.failed = False

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed = self.failed or report.failed

    def check(
        self, session: pytest.Session, function: FunctionType, code: CodeType,
        items: list[pytest.Item],
    ) -> bool:  # fmt: skip
        """Whether one of the tests fails with other code; later ones are left out then."""
        function.__code__ = code
        self.failed = False
        for item, following in zip(items, [*items[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)
            if self.failed:
                return True
        return False

    def calls(self, session: pytest.Session, items: list[pytest.Item]) -> dict[str, list[str]]:
        """Which tests call each function, those that are quick first."""
        with tempfile.NamedTemporaryFile("r+") as file:

            def watch() -> int:
                seen: dict[str, list[tuple[float, str]]] = defaultdict(list)
                current: set[CodeType] = set()

                def profile(frame: Any, event: str, _: Any) -> None:
                    if event == "call" and frame.f_code.co_filename == ms.__file__:
                        current.add(frame.f_code)

                for item in items:
                    current.clear()
                    begun = time.monotonic()
                    sys.setprofile(profile)
                    threading.setprofile(profile)
                    self.failed = False
                    item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
                    sys.setprofile(None)
                    threading.setprofile(None)
                    if not self.failed:
                        for code in {(c.co_firstlineno) for c in current}:
                            seen[str(code)].append((time.monotonic() - begun, item.nodeid))
                Path(file.name).write_text(
                    json.dumps({k: [i for _, i in sorted(v)] for k, v in seen.items()})
                )
                return 0

            assert in_child(watch, 20 * SECONDS) == 0
            return dict(json.loads(Path(file.name).read_text()))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        options = self.config.option
        items = [i for i in session.items if not SERVERS & set(getattr(i, "fixturenames", ()))]
        lines = lines_of(options.mutate.split(","))
        tree = ast.parse(SOURCE)
        known = {i.nodeid: i for i in items}
        calls = self.calls(session, items)
        mutants = [
            (name, function, node)
            for name, function in functions(tree).items()
            if function.lineno in lines
            for statement in function.body
            for node in ast.walk(statement)
            if can_change(node)
        ]
        random.Random(options.seed).shuffle(mutants)
        counts = {"killed": 0, "survived": 0, "not called": 0}
        for name, function, node in mutants[: options.mutants]:
            found = function_of(name)
            if found is None:
                continue
            tests = [known[i] for i in calls.get(str(found.__code__.co_firstlineno), [])]
            code = mutated_code(name, function, node)
            if code.co_freevars != found.__code__.co_freevars:
                continue  # a method that calls super() no more
            if tests:
                check = functools.partial(self.check, session, found, code, tests[:100])
                verdict = "killed" if in_child(check, SECONDS) else "survived"
            else:
                verdict = "not called"
            counts[verdict] += 1
            if verdict != "killed":
                before = ast.unparse(node).partition("\n")[0][:80]
                after = ast.unparse(change(node)).partition("\n")[0][:80]
                place = f"{getattr(node, 'lineno', '?')} {name}"
                print(f"{verdict} ({len(tests)} tests): {place}: {before} -> {after}", flush=True)
        print(counts, flush=True)
        return True


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--mutate", help="numbers of sections")
    parser.addoption("--mutants", type=int, default=100)
    parser.addoption("--seed", type=int, default=1)


def pytest_configure(config: pytest.Config) -> None:
    if config.option.mutate:
        config.pluginmanager.register(Mutation(config))
