"""Conventions of the public API: what a docstring has to say, and how options are passed.

`tests/project/test_rooms.py` sees to `__all__`, and that there is a docstring at all.
"""

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap

import pytest

import ait_jax
from ait_jax.generators import GENERATORS, Bank, Generator
from ait_jax.generators.bank import OptimisedImages
from ait_jax.methods.phases import OwnStep
from ait_jax.quant.activations import ACTIVATIONS, ActivationQuantizer
from ait_jax.quant.recentre import Recentre
from ait_jax.quant.weights import WEIGHTS, WeightQuantizer
from tests.support.package_files import FILES

ENOUGH_ARGUMENTS = 3  # From so many on, a docstring lists them.
MOST_POSITIONAL = 6
# First words in -s that are nouns: such a summary says what is returned, and no verb does.
NOUNS = {"Batches", "Features", "Images", "Metrics"}


def public_functions():
    """name -> function, for all in `__all__` and for the methods of classes there."""
    found = {}
    for module in map(importlib.import_module, FILES):
        for item in getattr(module, "__all__", []):
            value = getattr(module, item)
            members = [value]
            if inspect.isclass(value):
                members = [
                    getattr(member, "__func__", getattr(member, "fget", member))
                    for name, member in vars(value).items()
                    if not name.startswith("_")
                ]
            for function in filter(inspect.isfunction, members):
                # Fields may hold functions too, which have no name of their own.
                if function.__module__.startswith("ait_jax") and function.__name__.isidentifier():
                    function = inspect.unwrap(function)
                    found[f"{function.__module__}.{function.__qualname__}"] = function
    return found


FUNCTIONS = public_functions()
# The methods of registered parts are those of their interfaces, and described there.
INTERFACES = [
    (Generator, {**GENERATORS, "bank": Bank}),
    (OwnStep, {"images": OptimisedImages, "recentre": Recentre}),
    (ActivationQuantizer, ACTIVATIONS),
    (WeightQuantizer, WEIGHTS),
]
IMPLEMENTED = {
    f"{kind.__module__}.{kind.__qualname__}.{name}"
    for interface, registry in INTERFACES
    for kind in registry.values()
    for name in set(vars(interface)) & set(vars(kind))
    if not name.startswith("_")
}


def public_classes():
    """name -> class, for all classes in `__all__` that are defined there."""
    return {
        f"{name}.{item}": getattr(module, item)
        for name in FILES
        for module in [importlib.import_module(name)]
        for item in getattr(module, "__all__", [])
        if inspect.isclass(getattr(module, item)) and getattr(module, item).__module__ == name
    }


CLASSES = public_classes()


def section(thing, title):
    """The entries of a section of a docstring, in their order; None without the section."""
    docstring = inspect.getdoc(thing) or ""
    match = re.search(rf"^{title}:\n((?:(?: {{4}}.*)?\n?)+)", docstring, re.MULTILINE)
    return match and re.findall(r"^ {4}([*\w.`]+(?:, \w+)*):", match[1], re.MULTILINE)


def parameters(function):
    found = inspect.signature(function).parameters.values()
    return [parameter for parameter in found if parameter.name not in ("self", "cls")]


def positional(function):
    return [p for p in parameters(function) if p.kind is p.POSITIONAL_OR_KEYWORD]


def test_the_walk_sees_functions_and_classes():
    # Otherwise all below would hold of nothing.
    assert {
        "ait_jax.optim.inundation.gradient_inundation",
        "ait_jax.training.loop.Run.run",
    } <= set(FUNCTIONS)
    assert "ait_jax.quant.linen.QuantizedModel.apply" in FUNCTIONS
    assert "ait_jax.generators.gdfq.GDFQ.sample" in IMPLEMENTED
    assert {"ait_jax.training.state.AITState", "ait_jax.training.step.StepBuilder"} <= set(CLASSES)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_arguments_are_described(name):
    function = FUNCTIONS[name]
    described, stars = section(function, "Args"), {2: "*", 4: "**"}
    names = [f"{stars.get(int(p.kind), '')}{p.name}" for p in parameters(function)]
    if described is not None:
        assert described == names
    else:
        assert len(names) < ENOUGH_ARGUMENTS or name in IMPLEMENTED


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_returned_is_described(name):
    """In a section, or by a summary that is no sentence but the name of a thing."""
    function = FUNCTIONS[name]
    returned = inspect.signature(function).return_annotation
    if returned in (None, "None") or section(function, "Args") is None:
        return
    titles = re.findall(r"^(Returns|Yields):$", inspect.getdoc(function), re.MULTILINE)
    first = inspect.getdoc(function).split()[0]
    assert titles or first in NOUNS or not re.fullmatch(r"[A-Z][a-z]+s", first)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_raised_is_described(name):
    function = FUNCTIONS[name]
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    raised = raised_in(tree.body[0])
    if raised:
        module = inspect.getmodule(function)
        named = [resolve(entry, module) for entry in section(function, "Raises") or []]
        for error in raised:
            kind = resolve(error, module)
            assert any(issubclass(kind, other) for other in named), f"{error} is not described"


def raised_in(node):
    """Names of the errors that leave a function: not those that it catches itself."""
    found = set()
    if isinstance(node, ast.Raise) and node.exc is not None:
        error = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
        name = ast.unparse(error)
        # A variable is an error that was caught, and came from a call.
        return set() if name.islower() else {name}
    caught = {
        name
        for handler in getattr(node, "handlers", [])
        if handler.type is not None
        for name in ast.unparse(handler.type).strip("()").split(", ")
    }
    for field, value in ast.iter_fields(node):
        if field == "body" and "Exception" in caught:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                found |= raised_in(child) - (caught if field == "body" else set())
    return found


def resolve(name, module):
    """The class that a name stands for in a module, or in Python; errors of ours by name alone."""
    value = module
    try:
        for part in name.split("."):
            value = getattr(value, part)
    except AttributeError:
        value = getattr(__import__("builtins"), name, None) or next(
            kind for full, kind in CLASSES.items() if full.endswith(f".{name}")
        )
    return value


@pytest.mark.parametrize("name", FUNCTIONS)
def test_options_are_passed_by_name(name):
    places = positional(FUNCTIONS[name])
    assert len(places) <= MOST_POSITIONAL
    assert sum(place.default is not place.empty for place in places) <= 1
    switches = [p.name for p in places if p.annotation is bool or isinstance(p.default, bool)]
    assert switches == []


@pytest.mark.parametrize("name", FUNCTIONS)
def test_everything_is_typed(name):
    signature = inspect.signature(FUNCTIONS[name])
    open_ends = [p.name for p in parameters(FUNCTIONS[name]) if p.annotation is p.empty]
    assert open_ends == [] and signature.return_annotation is not signature.empty


@pytest.mark.parametrize("name", CLASSES)
def test_fields_are_described(name):
    kind = CLASSES[name]
    fields = list(getattr(kind, "_fields", []))
    if dataclasses.is_dataclass(kind):
        fields = [field.name for field in dataclasses.fields(kind)]
        if hasattr(kind, "scope"):  # A Flax module's own.
            fields = [field for field in fields if field not in ("parent", "name")]
    described = [part for entry in section(kind, "Attributes") or [] for part in entry.split(", ")]
    fields = [field for field in fields if not field.startswith("_")]
    if fields:
        assert sorted(described) == sorted(fields)


def test_the_version_is_semantic():
    number = r"(0|[1-9]\d*)"
    pattern = rf"{number}\.{number}\.{number}(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?"
    assert re.fullmatch(pattern, ait_jax.__version__)
