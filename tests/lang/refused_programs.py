"""Programs that are refused, as (what it is about, body of the kernel, the whole error message)."""

REFUSED: list[tuple[str, str, str]] = [
    (
        "try",
        """\
try:
    pass
except ValueError:
    pass""",
        """\
try is not supported in a kernel
  at kernel.py:5:5
    5 |     try:
            ^^^^
  hint: a kernel cannot raise; test the condition with `if`""",
    ),
    (
        "raise",
        """\
raise ValueError""",
        """\
raise is not supported in a kernel
  at kernel.py:5:5
    5 |     raise ValueError
            ^^^^^^^^^^^^^^^^
  hint: check compile-time values with `assert cond, message`""",
    ),
    (
        "global",
        """\
global g""",
        """\
global is not supported in a kernel
  at kernel.py:5:5
    5 |     global g
            ^^^^^^^^
  hint: pass the value as an argument, or return it from the helper""",
    ),
    (
        "nonlocal",
        """\
def h():
    nonlocal a
    a = 1
h()""",
        """\
nonlocal is not supported in a kernel
  at kernel.py:6:9
    6 |         nonlocal a
                ^^^^^^^^^^
  hint: return the value from the helper and assign it where it is called""",
    ),
    (
        "del",
        """\
del a""",
        """\
del is not supported in a kernel
  at kernel.py:5:5
    5 |     del a
            ^^^^^
  hint: leave it out: registers are freed when a value is no longer used""",
    ),
    (
        "class",
        """\
class C: pass""",
        """\
a class definition is not supported in a kernel
  at kernel.py:5:5
    5 |     class C: pass
            ^^^^^^^^^^^^^
  hint: define the class outside of the kernel""",
    ),
    (
        "import",
        """\
import math""",
        """\
import is not supported in a kernel
  at kernel.py:5:5
    5 |     import math
            ^^^^^^^^^^^
  hint: import at the top of the file""",
    ),
    (
        "from",
        """\
from math import pi""",
        """\
import is not supported in a kernel
  at kernel.py:5:5
    5 |     from math import pi
            ^^^^^^^^^^^^^^^^^^^
  hint: import at the top of the file""",
    ),
    (
        "async",
        """\
async def h(): pass""",
        """\
async is not supported in a kernel
  at kernel.py:5:5
    5 |     async def h(): pass
            ^^^^^^^^^^^^^^^^^^^
  hint: asynchronous copies are tilus.copy_async, tilus.commit and tilus.wait""",
    ),
    (
        "match",
        """\
match a:
    case 1: pass""",
        """\
match is not supported in a kernel
  at kernel.py:5:5
    5 |     match a:
            ^^^^^^^^
  hint: use if / elif""",
    ),
    (
        "yield",
        """\
yield a""",
        """\
yield is not supported in a kernel
  at kernel.py:5:5
    5 |     yield a
            ^^^^^^^
  hint: return the value, or pass a helper function that is called with it""",
    ),
    (
        "pow",
        """\
v = a ** 2""",
        """\
operator ** on a run-time scalar of int32 and 2 exists only for compile-time values
  at kernel.py:5:9
    5 |     v = a ** 2
                ^^^^^^
  hint: write the products: x * x""",
    ),
    (
        "matmul",
        """\
v = t @ t""",
        """\
operator @ on a tile of f32 [4] and a tile of f32 [4] exists only for compile-time values
  at kernel.py:5:9
    5 |     v = t @ t
                ^^^^^
  hint: use tilus.dot(a, b, acc)""",
    ),
    (
        "in",
        """\
v = a in (1, 2)""",
        """\
operator in on a run-time scalar of int32 and (1, 2) exists only for compile-time values
  at kernel.py:5:9
    5 |     v = a in (1, 2)
                ^^^^^^^^^^^
  hint: compare with each value, joined by `or`""",
    ),
    (
        "is",
        """\
v = a is t""",
        """\
operator is on a run-time scalar of int32 and a tile of f32 [4] exists only for compile-time values
  at kernel.py:5:9
    5 |     v = a is t
                ^^^^^^
  hint: use == to compare run-time values""",
    ),
    (
        "assert_runtime",
        """\
assert a > 1""",
        """\
assert of a run-time condition, expected a compile-time one
  at kernel.py:5:5
    5 |     assert a > 1
            ^^^^^^^^^^^^
  hint: check shapes before the launch, or handle the case with `if`""",
    ),
    (
        "assert_false",
        """\
assert block == 3, f'block is {block}'""",
        """\
assertion failed: block is 4 (block == 3)
  at kernel.py:5:5
    5 |     assert block == 3, f'block is {block}'
            ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^""",
    ),
    (
        "forelse",
        """\
for i in range(3): pass
else: pass""",
        """\
`else` of a loop is not supported in a kernel
  at kernel.py:5:5
    5 |     for i in range(3): pass
            ^^^^^^^^^^^^^^^^^^^^^^^
  hint: set a flag before `break` and test it""",
    ),
    (
        "whileelse",
        """\
while a > 0: pass
else: pass""",
        """\
`else` of a loop is not supported in a kernel
  at kernel.py:5:5
    5 |     while a > 0: pass
            ^^^^^^^^^^^^^^^^^
  hint: set a flag before `break` and test it""",
    ),
    (
        "breakunrolled",
        """\
for i in (1, 2):
    if a > i: break""",
        """\
break under a run-time condition leaves an unrolled loop, which is not supported
  at kernel.py:6:19
    6 |         if a > i: break
                          ^^^^^
  hint: loop with tilus.range""",
    ),
    (
        "return",
        """\
return a""",
        """\
a kernel returns a value, expected `return` alone
  at kernel.py:5:5
    5 |     return a
            ^^^^^^^^
  hint: store results with tilus.store""",
    ),
    (
        "earlyreturn",
        """\
def h(v):
    if v > 1:
        return 1
    return 2
w = h(a)""",
        """\
a helper returns inside of a run-time loop or branch, expected one `return` at its end
  at kernel.py:7:13
    7 |             return 1
                    ^^^^^^^^
  hint: assign the value to a name and return that; scalars can use `a if cond else b`""",
    ),
    (
        "recursion",
        """\
def h(v):
    return h(v)
w = h(a)""",
        """\
h calls itself, which is not supported in a kernel
  at kernel.py:6:16
    6 |         return h(v)
                       ^^^^
  hint: write a loop""",
    ),
    (
        "starargs",
        """\
def h(*v): return v
w = h(a)""",
        """\
h takes any number of arguments, which is not supported in a kernel
  at kernel.py:5:5
    5 |     def h(*v): return v
            ^^^^^^^^^^^^^^^^^^^
  hint: name them""",
    ),
    (
        "unknown",
        """\
v = blok""",
        """\
unknown name blok
  at kernel.py:5:9
    5 |     v = blok
                ^^^^
  hint: did you mean block?""",
    ),
    (
        "unknownattr",
        """\
v = tilus.lod(x, [0], shape=[4])""",
        """\
module tilus has no attribute lod
  at kernel.py:5:9
    5 |     v = tilus.lod(x, [0], shape=[4])
                ^^^^^^^^^
  hint: did you mean load or log?""",
    ),
    (
        "notassigned",
        """\
v = w
w = 1""",
        """\
w is read before it is assigned
  at kernel.py:5:9
    5 |     v = w
                ^""",
    ),
    (
        "branchonly",
        """\
if a > 1:
    w = 1
v = w""",
        """\
w is assigned only in a branch at line 5 and is read after it
  at kernel.py:7:9
    7 |     v = w
                ^
  hint: give w a value before it as well""",
    ),
    (
        "looponly",
        """\
for i in tilus.range(a):
    w = i
v = w""",
        """\
w is assigned only in the loop at line 5 and is read after it
  at kernel.py:7:9
    7 |     v = w
                ^
  hint: give w a value before it as well""",
    ),
    (
        "loopvar",
        """\
for i in tilus.range(a): pass
v = i""",
        """\
i is the variable of the run-time loop at line 5 and is read after it
  at kernel.py:6:9
    6 |     v = i
                ^
  hint: copy it, in the loop, to a variable that has a value before the loop""",
    ),
    (
        "dtypechange",
        """\
w = 0
for i in tilus.range(a): w = w + 0.5""",
        """\
w is a run-time scalar of int32 and is assigned a run-time scalar of f32 in a run-time loop or branch
  at kernel.py:6:30
    6 |     for i in tilus.range(a): w = w + 0.5
                                     ^
  hint: a variable keeps its type there: give it a value of the right type before, or write .to(int32)""",
    ),
    (
        "shapechange",
        """\
for i in tilus.range(a): t = tilus.zeros([8])""",
        """\
t is a tile of f32 [4] and is assigned a tile of f32 [8] in a run-time loop or branch
  at kernel.py:5:30
    5 |     for i in tilus.range(a): t = tilus.zeros([8])
                                     ^
  hint: a variable keeps its dtype and shape there: cast the value, or use another name""",
    ),
    (
        "tupleinloop",
        """\
w = (a, a)
for i in tilus.range(a): w = (i, a)""",
        """\
w is a tuple that holds run-time values and is assigned a tuple that holds run-time values in a run-time loop or branch
  at kernel.py:6:30
    6 |     for i in tilus.range(a): w = (i, a)
                                     ^
  hint: only scalars and tiles can change there: use another name, or give it a first value of that type before""",
    ),
    (
        "noeffect",
        """\
a + 1""",
        """\
this expression has no effect
  at kernel.py:5:5
    5 |     a + 1
            ^^^^^
  hint: assign its value to a name, or remove it""",
    ),
    (
        "tilecond",
        """\
if t > 1: pass""",
        """\
the condition of `if` is a tile of boolean [4], expected a scalar
  at kernel.py:5:5
    5 |     if t > 1: pass
            ^^^^^^^^^^^^^^
  hint: for conditions of elements write & and | (each side in parentheses) and tilus.where; tilus.item makes a scalar of one \
element""",
    ),
    (
        "tileslice",
        """\
v = t[1:3]""",
        """\
a tile of f32 [4] cannot be indexed or sliced: its elements live in the registers of different threads
  at kernel.py:5:9
    5 |     v = t[1:3]
                ^^^^^^
  hint: load only that part from memory, reduce the tile, or select elements with tilus.where""",
    ),
    (
        "tileindex",
        """\
v = t[0]""",
        """\
a tile of f32 [4] cannot be indexed or sliced: its elements live in the registers of different threads
  at kernel.py:5:9
    5 |     v = t[0]
                ^^^^
  hint: load only that part from memory, reduce the tile, or select elements with tilus.where""",
    ),
    (
        "globalslicestep",
        """\
v = x[1:3:2]""",
        """\
a slice of global tensor x has step 2, expected 1
  at kernel.py:5:9
    5 |     v = x[1:3:2]
                ^^^^^^^^
  hint: leave the step out""",
    ),
    (
        "globalslicebound",
        """\
v = x[1.5:]""",
        """\
a slice of global tensor x is bounded by 1.5, expected an integer
  at kernel.py:5:9
    5 |     v = x[1.5:]
                ^^^^^^^""",
    ),
    (
        "narrowdim",
        """\
v = tilus.narrow(x, 1, 0, 2)""",
        """\
narrow: dim 1 of x, which has rank 1
  at kernel.py:5:9
    5 |     v = tilus.narrow(x, 1, 0, 2)
                ^^^^^^^^^^^^^^^^^^^^^^^^""",
    ),
    (
        "narrowstart",
        """\
v = tilus.narrow(x, 0, 1.5, 2)""",
        """\
narrow: start of f32 and length of int32, expected integers
  at kernel.py:5:9
    5 |     v = tilus.narrow(x, 0, 1.5, 2)
                ^^^^^^^^^^^^^^^^^^^^^^^^^^""",
    ),
    (
        "globalassign",
        """\
x[0] = 1.0""",
        """\
a global tensor of f32 [n] is assigned by [], expected a store
  at kernel.py:5:5
    5 |     x[0] = 1.0
            ^^^^
  hint: tilus.store(x, [i], tile)""",
    ),
    (
        "sharedslice",
        """\
v = tilus.shared(tilus.f32, [4, 8])[1:3]""",
        """\
a slice with bounds of shared tensor shared is not supported
  at kernel.py:5:9
    5 |     v = tilus.shared(tilus.f32, [4, 8])[1:3]
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: load a part: tilus.load_shared(s, [start, ...], shape=[size, ...])""",
    ),
    (
        "format",
        """\
v = f'{a}'""",
        """\
a run-time scalar of int32 in a string, expected a compile-time value
  at kernel.py:5:9
    5 |     v = f'{a}'
                ^^^^^^
  hint: use tilus.print""",
    ),
    (
        "comprehension",
        """\
v = [i for i in tilus.range(a)]""",
        """\
the iterable of a comprehension is a run-time range, expected a compile-time tuple, list or range
  at kernel.py:5:9
    5 |     v = [i for i in tilus.range(a)]
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: use a `for` statement over tilus.range for a run-time loop""",
    ),
    (
        "rtstep",
        """\
for i in range(a, 0, -1): pass""",
        """\
a run-time range has step -1, expected a positive constant
  at kernel.py:5:14
    5 |     for i in range(a, 0, -1): pass
                     ^^^^^^^^^^^^^^^
  hint: count upwards and compute the index from the loop variable: stop - 1 - i""",
    ),
    (
        "unhash",
        """\
v = math_floor(a)""",
        """\
floor is called with a run-time scalar of int32; Python functions without source work on compile-time values only
  at kernel.py:5:9
    5 |     v = math_floor(a)
                ^^^^^^^^^^^^^
  hint: use tilus.floor""",
    ),
    (
        "wrongarg",
        """\
v = tilus.load(x, [0], size=[4])""",
        """\
tilus.load: missing a required argument: 'shape'
  at kernel.py:5:9
    5 |     v = tilus.load(x, [0], size=[4])
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: its signature is load(src, offsets, shape, *, dims=None, layout=None, checked=True, evict=None)""",
    ),
    (
        "wronghelper",
        """\
def h(v): return v
w = h(a, a)""",
        """\
h: too many positional arguments
  at kernel.py:6:9
    6 |     w = h(a, a)
                ^^^^^^^
  hint: its signature is h(v)""",
    ),
    (
        "nested",
        """\
v = t + (a + unknown_name)""",
        """\
unknown name unknown_name
  at kernel.py:5:18
    5 |     v = t + (a + unknown_name)
                         ^^^^^^^^^^^^""",
    ),
    (
        "mutatelist",
        """\
w = []
for i in tilus.range(a): w.append(i)""",
        """\
.append() in a run-time loop or branch changes a list made before it
  at kernel.py:6:30
    6 |     for i in tilus.range(a): w.append(i)
                                     ^^^^^^^^^^^
  hint: unroll the loop with tilus.static_range, or keep the values in variables""",
    ),
    (
        "globallist",
        """\
glist.append(a)""",
        """\
.append() changes [], which was made outside of the kernel
  at kernel.py:5:5
    5 |     glist.append(a)
            ^^^^^^^^^^^^^^^
  hint: make it in the kernel: a kernel must not change the program that compiles it""",
    ),
    (
        "globalobj",
        """\
gobj.value = a""",
        """\
attribute value of namespace(value=1) is assigned, which was made outside of the kernel
  at kernel.py:5:5
    5 |     gobj.value = a
            ^^^^^^^^^^
  hint: make the object in the kernel: a kernel must not change the program that compiles it""",
    ),
    (
        "secondgrid",
        """\
tilus.grid(1)""",
        """\
tilus.grid is called a second time, expected once
  at kernel.py:5:5
    5 |     tilus.grid(1)
            ^^^^^^^^^^^^^
  hint: compute one grid for the kernel""",
    ),
    (
        "overflow",
        """\
v = a + 4294967296""",
        """\
4294967296 does not fit int32 (-2147483648 to 2147483647), the type of the other side of +
  at kernel.py:5:9
    5 |     v = a + 4294967296
                ^^^^^^^^^^^^^^
  hint: convert the other side to a wider type with .to(tilus.int64)""",
    ),
    (
        "zerodiv",
        """\
v = block // 0""",
        """\
ZeroDivisionError while computing a compile-time value: integer division or modulo by zero
  at kernel.py:5:9
    5 |     v = block // 0
                ^^^^^^^^^^""",
    ),
    (
        "walrusorder",
        """\
w = a
for i in tilus.range(a):
    v = w + (w := i)""",
        """\
this value changes while the rest of the expression is evaluated
  at kernel.py:7:13
    7 |         v = w + (w := i)
                    ^
  hint: assign the value to a name before""",
    ),
    (
        "str",
        """\
v = print(a)""",
        """\
print is called with a run-time scalar of int32; Python functions without source work on compile-time values only
  at kernel.py:5:9
    5 |     v = print(a)
                ^^^^^^^^
  hint: use tilus.print""",
    ),
    (
        "withopen",
        """\
with gobj: pass""",
        """\
`with` over namespace(value=1), expected a construct of tilus
  at kernel.py:5:5
    5 |     with gobj: pass
            ^^^^^^^^^^^^^^^
  hint: only tilus.warps(...) opens a block""",
    ),
    (
        "decor",
        """\
@tilus.kernel
def h(): pass""",
        """\
a decorated function inside a kernel is not supported
  at kernel.py:6:5
    6 |     def h(): pass
            ^^^^^^^^^^^^^
  hint: define it outside of the kernel""",
    ),
    (
        "starredtarget",
        """\
p, *q = (1, 2, 3)""",
        """\
a starred target is not supported in a kernel
  at kernel.py:5:5
    5 |     p, *q = (1, 2, 3)
            ^^^^^
  hint: slice the tuple: first, rest = t[0], t[1:]""",
    ),
    (
        "unpack",
        """\
p, q = (1, 2, 3)""",
        """\
3 values are unpacked into 2 names
  at kernel.py:5:5
    5 |     p, q = (1, 2, 3)
            ^^^^""",
    ),
    (
        "iterscalar",
        """\
for i in a: pass""",
        """\
the iterable of `for` is a run-time scalar of int32, expected a compile-time tuple, list or range
  at kernel.py:5:14
    5 |     for i in a: pass
                     ^
  hint: use a `for` statement over tilus.range for a run-time loop""",
    ),
    (
        "call",
        """\
v = block(1)""",
        """\
4 is called, but is not a function
  at kernel.py:5:9
    5 |     v = block(1)
                ^^^^^^^^""",
    ),
    (
        "staticlimit",
        """\
for i in range(100000): pass""",
        """\
a loop of 100000 trips would be unrolled, expected at most 4096
  at kernel.py:5:14
    5 |     for i in range(100000): pass
                     ^^^^^^^^^^^^^
  hint: use tilus.range for a loop of the kernel""",
    ),
    (
        "loopvarouter",
        """\
i = 0
if a > 1:
    for i in tilus.range(a): pass""",
        """\
the loop variable i is also bound outside of this run-time loop or branch
  at kernel.py:7:13
    7 |         for i in tilus.range(a): pass
                    ^
  hint: give the loop variable a name of its own""",
    ),
    (
        "runtimeshape",
        """\
v = tilus.load(x, [0], [a])""",
        """\
tilus.load: shape is [a run-time scalar of int32], expected a list of compile-time integers
  at kernel.py:5:9
    5 |     v = tilus.load(x, [0], [a])
                ^^^^^^^^^^^^^^^^^^^^^^^
  hint: it has to be known while compiling: a Const parameter, say, but no extent of a tensor; its signature is load(src, \
offsets, shape, *, dims=None, layout=None, checked=True, evict=None)""",
    ),
    (
        "negativeshape",
        """\
v = tilus.zeros([-1, 4])""",
        """\
a tile of shape [-1, 4], expected extents of at least 0
  at kernel.py:5:9
    5 |     v = tilus.zeros([-1, 4])
                ^^^^^^^^^^^^^^^^^^^^""",
    ),
    (
        "dtypename",
        """\
v = t.to("f16")""",
        """\
tilus.cast: dtype is 'f16', expected a dtype
  at kernel.py:5:9
    5 |     v = t.to("f16")
                ^^^^^^^^^^^
  hint: dtypes are values: tilus.f16; its signature is cast(x, dtype, *, layout=None)""",
    ),
    (
        "fractionaloffset",
        """\
v = tilus.load(x, [0.5], [4])""",
        """\
tilus.load: offsets is [0.5], expected a list of integers
  at kernel.py:5:9
    5 |     v = tilus.load(x, [0.5], [4])
                ^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: a tile starts at one index for each dim: [i, j]; its signature is load(src, offsets, shape, *, dims=None, layout=None, \
checked=True, evict=None)""",
    ),
    (
        "nottensor",
        """\
v = tilus.load(None, [0], [4])""",
        """\
tilus.load: src is None, expected a tensor in global memory
  at kernel.py:5:9
    5 |     v = tilus.load(None, [0], [4])
                ^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: pass it to the kernel; its signature is load(src, offsets, shape, *, dims=None, layout=None, checked=True, evict=None)""",
    ),
    (
        "newaxisoftensor",
        """\
v = x[None, :] * 2""",
        """\
2 indices for global tensor x, which has rank 1
  at kernel.py:5:9
    5 |     v = x[None, :] * 2
                ^^^^^^^^^^
  hint: load a tile: tilus.load(x, [start, ...], shape=[size, ...])""",
    ),
    (
        "nosuchfunction",
        """\
v = tilus.zzyzx(t)""",
        """\
module tilus has no attribute zzyzx
  at kernel.py:5:9
    5 |     v = tilus.zzyzx(t)
                ^^^^^^^^^^^
  hint: docs/instructions.md lists its functions""",
    ),
    (
        "badargs",
        """\
v = tilus.shared([4, 8], tilus.f32)""",
        """\
tilus.shared: dtype is [4, 8], expected a dtype
  at kernel.py:5:9
    5 |     v = tilus.shared([4, 8], tilus.f32)
                ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  hint: dtypes are values: tilus.f16; its signature is shared(dtype, shape, *, layout=None, name='shared')""",
    ),
    (
        "nograd",
        """\
v = tilus.block_id(3)""",
        """\
grid axis 3, expected 0, 1 or 2
  at kernel.py:5:9
    5 |     v = tilus.block_id(3)
                ^^^^^^^^^^^^^^^^^""",
    ),
    (
        "sharedassign",
        """\
s = tilus.shared(tilus.f32, [4])
s[0] = 1.0""",
        """\
a shared tensor of f32 [4] is assigned by [], expected a store
  at kernel.py:6:5
    6 |     s[0] = 1.0
            ^^^^
  hint: tilus.store_shared(s, tile)""",
    ),
    (
        "globalnone",
        """\
v = x == t""",
        """\
operator == between a global tensor of f32 [n] and a tile of f32 [4] is not defined
  at kernel.py:5:9
    5 |     v = x == t
                ^^^^^^
  hint: operators work on scalars and register tiles: load memory with tilus.load first""",
    ),
    (
        "lostbranchshape",
        """\
if a > 1:
    w = tilus.zeros([4])
else:
    w = tilus.zeros([8])
v = w""",
        """\
w is a tile of f32 [4] and is assigned a tile of f32 [8] in a run-time loop or branch
  at kernel.py:5:5
    5 |     if a > 1:
            ^^^^^^^^^
  hint: a variable keeps its dtype and shape there: cast the value, or use another name""",
    ),
    (
        "wherecond",
        """\
v = t if a > 1 else x""",
        """\
a run-time condition chooses between a tile of f32 [4] and a global tensor of f32 [n], expected scalars or tiles
  at kernel.py:5:9
    5 |     v = t if a > 1 else x
                ^^^^^^^^^^^^^^^^^
  hint: use `if` with a compile-time condition""",
    ),
    (
        "memberstore",
        """\
v = x.foo""",
        """\
a global tensor of f32 [n] has no attribute foo
  at kernel.py:5:9
    5 |     v = x.foo
                ^^^^^
  hint: it has shape, dtype, rank, strides""",
    ),
]
