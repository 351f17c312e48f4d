"""The laws of the house: who may import whom, and what every module says of itself."""

import ast
import contextlib
import importlib
import subprocess
import sys
import textwrap

import pytest

from tests.support.package_files import FILES, PACKAGE

TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}
HEAVY = ("flax", "orbax", "tensorflow_datasets")


def imported(tree, package):
    """What the code of a package imports, wherever it does: names, modules or what is in them."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join(parents if node.level else []) + ("." if node.level else "")
            base = (base + (node.module or "")).strip(".")
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def imports_of(name):
    """Modules of this package that a module imports, anywhere in its code, and their parents."""
    package = name if FILES[name].name == "__init__.py" else name.rpartition(".")[0]
    found = imported(TREES[name], package)
    found |= {module.rpartition(".")[0] for module in found}
    return found & set(FILES) - {name}


def programs_in(tree):
    """The code itself, and that in its strings, which tests give to other processes."""
    yield tree
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and "import" in str(node.value):
            with contextlib.suppress(SyntaxError):
                yield ast.parse(textwrap.dedent(str(node.value)))


def outside_of(name):
    """Other packages that a module imports, anywhere in its code."""
    nodes = list(ast.walk(TREES[name]))
    plain = [a.name for node in nodes if isinstance(node, ast.Import) for a in node.names]
    return {
        module.partition(".")[0]
        for module in (*plain, *(n.module for n in nodes if isinstance(n, ast.ImportFrom)))
        if module
    } - {"ait_jax"}


def reached_from(name):
    """All modules of this package that importing one can bring in, and how it came to each."""
    ways, waiting = {name: (name,)}, [name]
    while waiting:
        module = waiting.pop()
        for other in imports_of(module) - set(ways):
            ways[other] = (*ways[module], other)
            waiting.append(other)
    return ways


def modules_under(room):
    prefix = f"ait_jax.{room}"
    return [name for name in FILES if name == prefix or name.startswith(f"{prefix}.")]


# Each room imports from those below it alone. Programs join what they like.
FLOORS = [
    {"errors", "promotion"},
    {"cpu", "methods", "parallel"},
    {"models", "optim", "quant", "run"},
    {"command_line", "convert", "generators"},
    {"config", "report", "teacher"},
    {"training"},
    {"data"},
    {"export"},
    {"compile_check", "evaluate", "main", "predict", "zero_shot"},
]

TRAINING = [
    name
    for room in (
        *("methods", "quant", "optim", "generators", "models", "convert", "teacher", "training"),
    )
    for name in modules_under(room)
]


def room_of(name):
    return name.split(".")[1] if "." in name else ""


def arrows():
    """(from, to) of rooms, and the imports that make each; programs are left out."""
    found = {}
    for name in FILES:
        if name.endswith(".__main__") or name == "ait_jax":
            continue
        for other in imports_of(name):
            pair = room_of(name), room_of(other)
            if other != "ait_jax" and pair[0] != pair[1]:
                found.setdefault(pair, []).append(f"{name} -> {other}")
    return found


def test_the_walk_sees_imports():
    # Otherwise the laws below would hold of anything.
    assert {"ait_jax.quant.calls", "ait_jax.quant.affine"} <= imports_of("ait_jax.quant.linen")
    assert {"ait_jax.methods.losses", "ait_jax.data.sources"} <= imports_of(
        "ait_jax.data.teacher_training"
    )
    assert "ait_jax.models.resnet_cifar" in reached_from("ait_jax.teacher")
    assert {"ait_jax.data.sources", "ait_jax.data.evaluator", "ait_jax.training.loop"} <= set(
        reached_from("ait_jax.main")
    )
    assert len(TRAINING) > 40 and {"ait_jax.training.loop", "ait_jax.quant.linen"} < set(TRAINING)
    assert ("training", "quant") in arrows() and ("quant", "training") not in arrows()
    code = "from . import a; run('import b, c; from .d import e')"
    assert [imported(part, "tests.x") for part in programs_in(ast.parse(code))] == [
        {"tests.x", "tests.x.a"},
        {"b", "c", "tests.x.d", "tests.x.d.e"},
    ]


def test_rooms_import_from_floors_below():
    floor = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    assert {room_of(name) for name in FILES} - {""} == set(floor)
    for (here, there), ways in arrows().items():
        assert floor[there] < floor[here], ways[:3]


def test_the_top_of_the_package_is_small():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 26, sorted(entries)


@pytest.mark.parametrize("name", FILES)
def test_files_stay_small(name):
    assert len(FILES[name].read_text().splitlines()) <= 400


@pytest.mark.parametrize("name", FILES)
def test_data_is_for_programs_alone(name):
    """Nothing outside data/ and the programs, the user's call among them, imports real images."""
    readers = {"data", "evaluate", "main", "predict", "zero_shot"}
    if room_of(name) not in readers and not name.endswith(".__main__"):
        assert not any(room_of(other) == "data" for other in imports_of(name))


@pytest.mark.parametrize("name", TRAINING)
def test_zero_shot_rooms_know_no_data(name):
    ways = reached_from(name)
    seen = [way for module, way in ways.items() if room_of(module) == "data"]
    assert not seen, " -> ".join(seen[0])
    outside = set().union(*(outside_of(module) for module in ways))
    assert not outside & {"tensorflow_datasets", "sklearn", "array_record"}


@pytest.mark.parametrize(
    ("room", "allowed"),
    [
        ("optim", {"optim", "promotion"}),
        ("models", {"models"}),
        ("quant.affine", {"quant", "cpu", "promotion"}),
        ("quant", {"quant", "cpu", "errors", "methods", "promotion"}),
        ("methods", {"methods", "errors"}),
        ("generators", {"generators", "cpu", "errors", "methods", "promotion"}),
        ("cpu", {"cpu", "errors", "promotion"}),
        ("errors", set()),
    ],
)
def test_what_rooms_reach(room, allowed):
    for name in modules_under(room):
        if name.endswith(".__main__"):  # A program, which may join rooms.
            continue
        rooms = {other.split(".")[1] for other in reached_from(name) if other != "ait_jax"}
        assert rooms <= allowed | {room.split(".")[0]}, name


@pytest.mark.parametrize("room", ["training.loop", "parallel", "main"])
def test_the_step_knows_neither_loop_nor_devices(room):
    for name in (
        "ait_jax.training.step",
        "ait_jax.training.state",
        *modules_under("quant"),
        *modules_under("optim"),
    ):
        assert f"ait_jax.{room}" not in reached_from(name)


def test_no_test_imports_another_test():
    """What two of them need is in tests/support."""
    root = PACKAGE.parent
    files = {
        ".".join(path.relative_to(root).with_suffix("").parts): path
        for path in sorted((root / "tests").rglob("*.py"))
    }
    tests = {name for name, path in files.items() if path.name.startswith("test_")}
    assert "tests.project.test_rooms" in tests
    for name, path in files.items():
        for code in programs_in(ast.parse(path.read_text())):
            assert not imported(code, name.rpartition(".")[0]) & tests, name


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("ait_jax", (*HEAVY, "jax", "numpy")),
        ("ait_jax.optim", (*HEAVY, "ait_jax.quant", "ait_jax.models")),
        ("ait_jax.quant.affine", (*HEAVY, "optax", "ait_jax.optim", "ait_jax.models")),
        ("ait_jax.cpu.huge_pages", (*HEAVY, "jax", "numpy")),
        ("ait_jax.cpu.computed_once", (*HEAVY, "optax")),
        ("ait_jax.run.xla_setup", (*HEAVY, "jax", "numpy")),
        ("ait_jax.report", (*HEAVY, "jax", "jinja2", "matplotlib")),
        ("ait_jax.main", ("jinja2", "matplotlib", "tensorflow_datasets")),
        ("ait_jax.training.loop", ("tensorflow_datasets", "sklearn", "ait_jax.data")),
    ],
)
def test_a_room_can_be_imported_alone(module, absent):
    code = f"import sys, {module}; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    loaded = set(done.stdout.split())
    assert module in loaded
    assert not loaded & set(absent)


# What modules say of themselves -------------------------------------------------------------------

# Packages whose parts are imported one by one.
WITHOUT_ALL = {f"ait_jax.{room}" for room in ("cpu", "methods", "quant", "run", "training")}


@pytest.mark.parametrize("name", FILES)
def test_every_module_says_what_it_exports(name):
    module = importlib.import_module(name)
    assert hasattr(module, "__all__") == (name not in WITHOUT_ALL)
    exported = getattr(module, "__all__", [])
    assert len(set(exported)) == len(exported)
    for item in exported:
        value = getattr(module, item)
        assert not item.startswith("_")
        # Ours, or a constant or type alias; never something of another package, passed on.
        home = getattr(value, "__module__", "ait_jax")
        assert home.startswith(("ait_jax", "collections.abc", "builtins")), f"{item} of {home}"


@pytest.mark.parametrize("name", FILES)
def test_everything_public_has_a_docstring(name):
    tree, found = TREES[name], []
    assert ast.get_docstring(tree)
    public = [node for node in tree.body if is_public(node)]
    for node in public:
        found.append((node.name, ast.get_docstring(node)))
        if isinstance(node, ast.ClassDef):
            methods = [member for member in node.body if is_public(member)]
            found += [(f"{node.name}.{m.name}", ast.get_docstring(m)) for m in methods]
    assert [name for name, docstring in found if not docstring] == []


def is_public(node):
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return isinstance(node, kinds) and not node.name.startswith("_")
