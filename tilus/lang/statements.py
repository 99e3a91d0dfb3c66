"""Statements of a kernel, and the inlining of helpers."""

from __future__ import annotations

import ast
import enum
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

from tilus.errors import TilusError
from tilus.ir.expr import Expr, as_expr, const, unary
from tilus.ir.stmt import EMPTY, Break, Continue, For, If, Return, Seq, While
from tilus.lang.assignment import assign, assignment
from tilus.lang.expression import evaluate, iterate, local_function
from tilus.lang.frame import Binding, Frame, Loop, NotUnrollable
from tilus.lang.inlining import bind_arguments, resolve
from tilus.lang.operators import truth
from tilus.lang.refusals import refuse
from tilus.lang.regions import Region, bind, promoting, region
from tilus.lang.roles import Warps, role
from tilus.lang.source import assigned_names, is_read_after
from tilus.lang.storage import is_storable, loop_variable
from tilus.lang.values import MAX_UNROLLED, LocalFunction, RuntimeRange, Value, describe, is_runtime

MAX_NESTED_CALLS = 8  # of one function in itself; `twice(lambda x: twice(f, x), y)` is no recursion


class Flow(enum.Enum):
    """What runs after a statement: the next one; the end or the next trip of the unrolled loop; or nothing that can be
    reached, because the code jumped or returned."""

    NEXT = enum.auto()
    BREAK = enum.auto()
    CONTINUE = enum.auto()
    STOP = enum.auto()


class Body(Frame):
    """Translates the statements of one function. `result` is what it returned."""

    def __init__(self, *args: Any, is_kernel: bool = False) -> None:
        super().__init__(*args)
        self.is_kernel = is_kernel
        self.result: Value = None

    def run(self) -> None:
        """Translate the whole function."""
        if isinstance(self.source.node, ast.Lambda):
            self.result = evaluate(self, self.source.node.body)
        else:
            self.block(self.source.node.body)

    def block(self, nodes: Sequence[ast.stmt]) -> Flow:
        for node in nodes:
            with self.at(node):
                flow = self.statement(node)
            if flow is not Flow.NEXT:
                return flow
        return Flow.NEXT

    def statement(self, node: ast.stmt) -> Flow:
        match node:
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                assignment(self, node)
            case ast.Expr():
                self._expression(node)
            case ast.If():
                return self._if(node)
            case ast.For():
                return self._for(node)
            case ast.While():
                return self._while(node)
            case ast.With():
                return self._with(node)
            case ast.Break():
                return self._jump(Break(self.builder.loc), Flow.BREAK)
            case ast.Continue():
                return self._jump(Continue(self.builder.loc), Flow.CONTINUE)
            case ast.Return():
                return self._return(node)
            case ast.Assert():
                self._assert(node)
            case ast.FunctionDef():
                self._define(node)
            case ast.Pass():
                pass
            case _:
                raise refuse(node)
        return Flow.NEXT

    def _expression(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Constant) and (isinstance(node.value.value, str) or node.value.value is ...):
            return  # a docstring or `...`
        if not isinstance(node.value, (ast.Call, ast.Yield, ast.YieldFrom, ast.Await)):
            raise TilusError("this expression has no effect", hint="assign its value to a name, or remove it")
        evaluate(self, node.value)

    def _assert(self, node: ast.Assert) -> None:
        holds = truth(evaluate(self, node.test), "the asserted condition")
        if isinstance(holds, Expr):
            raise TilusError(
                "assert of a run-time condition, expected a compile-time one",
                hint="check shapes before the launch, or handle the case with `if`",
            )
        if not holds:
            text = ast.get_source_segment("".join(self.source.lines), node.test)
            message = f": {evaluate(self, node.msg)}" if node.msg is not None else ""
            raise TilusError(f"assertion failed{message} ({text})")

    def _define(self, node: ast.FunctionDef) -> None:
        for decorator in node.decorator_list:
            if getattr(evaluate(self, decorator), "__name__", "") != "inline":
                raise TilusError(
                    "a decorated function inside a kernel is not supported", hint="define it outside of the kernel"
                )
        bind(self, node.name, local_function(self, node, node.name))

    # Branches.

    def _if(self, node: ast.If) -> Flow:
        cond = truth(evaluate(self, node.test), "the condition of `if`")
        if isinstance(cond, bool):
            return self.block(node.body if cond else node.orelse)
        return promoting(self, lambda: self._runtime_if(node, cond), assigned_names([*node.body, *node.orelse]))

    def _runtime_if(self, node: ast.If, cond: Expr) -> Flow:
        sides: list[tuple[Region, Flow]] = []
        for nodes in (node.body, node.orelse):
            with region(self) as side:
                flow = self.block(nodes)
            sides.append((side, flow))
        self._merge(node, [side for side, flow in sides if flow is Flow.NEXT])
        (then, _), (orelse, _) = sides
        self.builder.append(If(cond, then.body(), orelse.body() if orelse.stmts else EMPTY, self.builder.loc))
        for side in (then, orelse):
            self._lose(side, f"assigned only in a branch at line {node.lineno}")
        return Flow.NEXT if any(flow is Flow.NEXT for _, flow in sides) else Flow.STOP

    def _merge(self, node: ast.If, sides: list[Region]) -> None:
        """Names that every side that goes on has bound, and that are read later, keep their values in slots."""
        if not sides:
            return
        common = [name for name in sides[0].bound if all(name in side.bound for side in sides)]
        for name in common:
            values = [side.bound[name] for side in sides]
            if all(is_storable(value) for value in values) and is_read_after(name, node, self.source.node):
                slot = self.storage.allocate(_widest(values), name)
                for side, value in zip(sides, values):
                    side.assign(self, slot, value, name)
                self.scope.names[name] = Binding(slot, self.translation.level, slot=True)
                self.scope.lost.pop(name, None)

    def _lose(self, side: Region, why: str) -> None:
        for name in side.bound:
            if name not in self.scope.names:
                self.scope.lost[name] = (why, f"give {name} a value before it as well")

    def _with(self, node: ast.With) -> Flow:
        if len(node.items) != 1 or node.items[0].optional_vars is not None:
            raise TilusError(
                "`with` takes one tilus construct and no `as` in a kernel", hint="nest the `with` statements"
            )
        warps = evaluate(self, node.items[0].context_expr)
        if not isinstance(warps, Warps):
            raise TilusError(
                f"`with` over {describe(warps)}, expected a construct of tilus",
                hint="only tilus.warps(...) opens a block",
            )
        with role(self, warps, node):
            self.block(node.body)
        return Flow.NEXT

    # Loops.

    def _for(self, node: ast.For) -> Flow:
        if node.orelse:
            raise TilusError(
                "`else` of a loop is not supported in a kernel", hint="set a flag before `break` and test it"
            )
        with self.at(node.iter):
            iterable = evaluate(self, node.iter)
            if isinstance(iterable, RuntimeRange):
                return self._runtime_for(node, self.storage.snapshot(iterable, "bound"))
            items = iterate(self, iterable, "the iterable of `for`")
            if len(items) > MAX_UNROLLED:
                raise TilusError(
                    f"a loop of {len(items)} trips would be unrolled, expected at most {MAX_UNROLLED}",
                    hint="use tilus.range for a loop of the kernel",
                )
        if not (isinstance(iterable, range) and iterable.step > 0 and isinstance(node.target, ast.Name)):
            return self._unrolled(node, items, optional=False)
        flow = self._attempt(lambda: self._unrolled(node, items, optional=True))
        if flow is None:
            return self._runtime_for(node, RuntimeRange(iterable.start, iterable.stop, iterable.step))
        return flow

    def _unrolled(self, node: ast.For, items: Sequence[Value], optional: bool) -> Flow:
        with self._loop(Loop(runtime=False, level=self.translation.level, optional=optional)):
            for item in items:
                with self.at(node.target):
                    assign(self, node.target, item)
                flow = self.block(node.body)
                if flow is Flow.STOP:
                    return flow
                if flow is Flow.BREAK:
                    break
        return Flow.NEXT

    @contextmanager
    def _loop(self, loop: Loop) -> Generator[None]:
        self.loops.append(loop)
        try:
            yield
        finally:
            self.loops.pop()

    def _attempt(self, translate: Callable[[], Flow]) -> Flow | None:
        """Translate an unrolled loop; None, with nothing changed, when it cannot be unrolled."""
        names, lost, journal = dict(self.scope.names), dict(self.scope.lost), len(self.translation.journal)
        try:
            with self.builder.block() as stmts:
                flow = translate()
        except NotUnrollable:
            self.translation.rollback(journal)
            self.scope.names, self.scope.lost = names, lost
            return None
        for stmt in stmts:
            self.builder.append(stmt)
        return flow

    def _runtime_for(self, node: ast.For, bounds: RuntimeRange) -> Flow:
        if not isinstance(node.target, ast.Name):
            raise TilusError("a run-time loop needs one name as its variable", loc=self.source.loc(node.target))
        name = node.target.id
        outer = self.scope.names.get(name)
        if outer is not None and outer.level < self.translation.level:
            raise TilusError(
                f"the loop variable {name} is also bound outside of this run-time loop or branch",
                loc=self.source.loc(node.target),
                hint="give the loop variable a name of its own",
            )

        def translate() -> None:
            start, stop = as_expr(bounds.start), as_expr(bounds.stop)
            var = loop_variable(self.builder.fresh(name), start, stop, bounds.step)
            with region(self) as body:
                self.scope.names[name] = Binding(var, self.translation.level)
                self._loop_body(node.body)
            self._lose(body, f"assigned only in the loop at line {node.lineno}")
            self.builder.append(For(var, start, stop, bounds.step, body.body(), bounds.unroll, self.source.loc(node)))

        promoting(self, translate, assigned_names(node.body) - {name})
        self.scope.names.pop(name, None)
        self.scope.lost[name] = (
            f"the variable of the run-time loop at line {node.lineno}",
            "copy it, in the loop, to a variable that has a value before the loop",
        )
        return Flow.NEXT

    def _loop_body(self, nodes: Sequence[ast.stmt]) -> None:
        with self._loop(Loop(runtime=True, level=self.translation.level)):
            self.block(nodes)

    def _while(self, node: ast.While) -> Flow:
        if node.orelse:
            raise TilusError(
                "`else` of a loop is not supported in a kernel", hint="set a flag before `break` and test it"
            )
        flow = None if isinstance(node.test, ast.Constant) else self._attempt(lambda: self._unrolled_while(node))
        if flow is None:
            return promoting(self, lambda: self._runtime_while(node), assigned_names(node.body))
        return flow

    def _unrolled_while(self, node: ast.While) -> Flow:
        with self._loop(Loop(runtime=False, level=self.translation.level, optional=True)):
            for _ in range(MAX_UNROLLED):
                cond = truth(evaluate(self, node.test), "the condition of `while`")
                if isinstance(cond, Expr):
                    raise NotUnrollable
                if not cond:
                    return Flow.NEXT
                flow = self.block(node.body)
                if flow is Flow.STOP:
                    return flow
                if flow is Flow.BREAK:
                    return Flow.NEXT
        raise TilusError(f"`while` was unrolled {MAX_UNROLLED} times and goes on", hint="use tilus.range")

    def _runtime_while(self, node: ast.While) -> Flow:
        with region(self) as body:
            cond = as_expr(truth(evaluate(self, node.test), "the condition of `while`"))
            if body.stmts:  # the condition needs instructions: test inside of the loop
                self.builder.append(If(unary("not", cond), Seq((Break(self.builder.loc),)), EMPTY, self.builder.loc))
                cond = const(True)
            self._loop_body(node.body)
        self._lose(body, f"assigned only in the loop at line {node.lineno}")
        self.builder.append(While(cond, body.body(), self.builder.loc))
        endless = isinstance(node.test, ast.Constant) and not any(isinstance(n, ast.Break) for n in ast.walk(node))
        return Flow.STOP if endless else Flow.NEXT

    def _jump(self, jump: Break | Continue, flow: Flow) -> Flow:
        word = "break" if flow is Flow.BREAK else "continue"
        if not self.loops:
            raise TilusError(f"{word} leaves a role, expected a loop inside of it", hint="put the loop into the role")
        loop = self.loops[-1]
        if loop.runtime:
            self.builder.append(jump)
            return Flow.STOP
        if loop.level != self.translation.level:
            if loop.optional:
                raise NotUnrollable
            raise TilusError(
                f"{word} under a run-time condition leaves an unrolled loop, which is not supported",
                hint="loop with tilus.range"
                + (", or put the rest of the body under the opposite condition" if word == "continue" else ""),
            )
        return flow

    # Functions.

    def _return(self, node: ast.Return) -> Flow:
        if self.is_kernel:
            if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
                raise TilusError(
                    "a kernel returns a value, expected `return` alone", hint="store results with tilus.store"
                )
            if self.translation.level > 0:
                self.builder.append(Return(self.builder.loc))
            return Flow.STOP
        if self.translation.level > self.entry_level:
            raise TilusError(
                "a helper returns inside of a run-time loop or branch, expected one `return` at its end",
                hint="assign the value to a name and return that; scalars can use `a if cond else b`",
            )
        if node.value is not None:
            self.result = evaluate(self, node.value)
        return Flow.STOP

    def inline(
        self, function: FunctionType | LocalFunction, args: Sequence[Value], kwargs: Mapping[str, Value]
    ) -> Value:
        calls, name = (
            self.translation.calls,
            function.name if isinstance(function, LocalFunction) else function.__qualname__,
        )
        source, scope, signature, identity = resolve(function)
        if sum(caller == identity for caller, _ in calls) >= MAX_NESTED_CALLS:
            raise TilusError(f"{name} calls itself, which is not supported in a kernel", hint="write a loop")
        arguments = bind_arguments(name, signature, args, kwargs)
        loc = self.builder.loc
        calls.append((identity, loc))
        body = Body(self.translation, source, scope)
        for parameter, value in arguments.items():
            scope.names[parameter] = Binding(body.keep_attributes(value), self.translation.level)
        try:
            body.run()
        except TilusError as error:
            error.add_note(f"  inlined into {loc}")
            raise
        finally:
            calls.pop()
        return body.result

    def keep_attributes(self, value: Value) -> Value:
        """A copy of what a helper could change through an object while it uses its argument."""
        slots = self.storage.slots(value)
        if slots and any(b.slot and b.value in slots for b in self.translation.attributes.values()):
            return self.storage.snapshot(value)
        return value


def _widest(values: Sequence[Value]) -> Value:
    """The value whose type a variable gets that both sides of a branch assign: run-time types over those of constants."""
    return next((v for v in values if is_runtime(v)), values[0])
