"""Parts that register themselves: a name, a class or function, and the config keys that it owns.

A method is one file. It registers what it brings (a generator, a quantizer, a loss, a phase) under
a name, declares its config keys once, with default, check and comment, and says what the shipped
recipes set for it. Everything else finds it by its name. See docs/write_a_method.md.
"""

import math
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, NamedTuple, TypeVar

from ait_jax.errors import UserError, did_you_mean

__all__ = [
    "Check",
    "Entry",
    "RecipeWords",
    "Registry",
    "Setting",
    "anything",
    "boolean",
    "integer",
    "is_integer",
    "number",
    "one_of",
    "registries",
    "sequence",
    "text",
]

Part = TypeVar("Part")


class Check:
    """What a value must be.

    Attributes:
        ok: whether a value is allowed.
        options: the words that are allowed, if it is one of some.
    """

    def __init__(
        self,
        ok: Callable[[Any], bool],
        allowed: str | Callable[[], str],
        options: Iterable[Any] = (),
    ):
        """Takes the check.

        Args:
            ok: whether a value is allowed.
            allowed: what is, for messages; or a function that says it when it is asked for, where
                it depends on what is registered.
            options: the words that are allowed, if it is one of some.
        """
        self.ok, self.options, self._allowed = ok, options, allowed

    @property
    def allowed(self) -> str:
        """What is allowed, for messages."""
        return self._allowed if isinstance(self._allowed, str) else self._allowed()


class Setting(NamedTuple):
    """A key of the config, declared once.

    Attributes:
        default: its value where none is set; its type is that of the key.
        check: of its values.
        comment: what it is, in a few words.
    """

    default: Any
    check: Check
    comment: str = ""


class RecipeWords(NamedTuple):
    """What the words after a shipped config's colon ask for.

    Attributes:
        network: name of the recipe, or of the one whose settings suit it.
        framework: a name of `generators.GENERATORS`.
        method: `"ait"` or `"baseline"`.
        recipe: `"paper"` or `"strong"`.
        budget: `"full"`, `"cpu"` or `"smoke"`.
        weight_bits: 2 to 8.
        activation_bits: 2 to 8.
    """

    network: str
    framework: str
    method: str
    budget: str
    recipe: str
    weight_bits: int
    activation_bits: int


class Entry(NamedTuple):
    """What is registered under a name.

    Attributes:
        part: the class or function.
        settings: the config keys that it owns, dotted.
        deltas: what shipped recipes set for it, by dotted key; called with the words of every
            recipe, also of those that do not use it.
    """

    part: Any
    settings: Mapping[str, Setting]
    deltas: Callable[[RecipeWords], Mapping[str, Any]] | None


_REGISTRIES: "list[Registry[Any]]" = []


def registries() -> "list[Registry[Any]]":
    """All registries there are."""
    return list(_REGISTRIES)


class Registry(Generic[Part], Mapping[str, Part]):
    """Parts of one kind by name.

    Attributes:
        key: the config key, or the section, that chooses among them.
        settings: config keys that all of them share.
    """

    def __init__(self, key: str, settings: Mapping[str, Setting] | None = None):
        """Holds nothing yet.

        Args:
            key: the config key, or the section, that chooses among its parts.
            settings: config keys that all of them share.
        """
        self.key = key
        self.settings = dict(settings or {})
        self._entries: dict[str, Entry] = {}
        _REGISTRIES.append(self)

    def register(
        self,
        name: str,
        *,
        settings: Mapping[str, Setting] | None = None,
        deltas: Callable[[RecipeWords], Mapping[str, Any]] | None = None,
    ) -> Callable[[Part], Part]:
        """A decorator that registers a class or function.

        Args:
            name: by which the config chooses it.
            settings: the config keys that it owns, dotted.
            deltas: what shipped recipes set for it.

        Raises:
            UserError: if the name, or one of the keys, is taken by something else.
        """

        def registered(part: Part) -> Part:
            old = self._entries.get(name)
            if old is not None and _home(old.part) != _home(part):
                raise UserError(f"{self.key}: {name!r} is registered already, by {_home(old.part)}")
            owned = dict(settings or {})
            for other in _REGISTRIES:
                taken = set(other.settings)
                for known, entry in other._entries.items():
                    if (other, known) != (self, name):
                        taken |= set(entry.settings)
                if clash := sorted(taken & set(owned)):
                    raise UserError(f"{self.key}: {name!r} declares {clash[0]}, a key there is")
            for key, setting in owned.items():
                if not setting.check.ok(setting.default):
                    raise UserError(
                        f"{key} = {setting.default!r} is not allowed as a default: it must be "
                        f"{setting.check.allowed}"
                    )
            self._entries[name] = Entry(part, owned, deltas)
            return part

        return registered

    def entry(self, name: str) -> Entry:
        """What is registered under a name.

        Raises:
            UserError: if nothing is; lists the names.
        """
        if name not in self._entries:
            raise UserError(
                f"{self.key} = {name!r} is not allowed: it must be one of {', '.join(self)}"
                f"{did_you_mean(name, self)}"
            )
        return self._entries[name]

    def all_settings(self) -> dict[str, Setting]:
        """The config keys of the kind and of its parts."""
        found = dict(self.settings)
        for entry in self._entries.values():
            found |= entry.settings
        return found

    def deltas(self, words: RecipeWords) -> dict[str, Any]:
        """What all parts set for the words of a recipe, by dotted key."""
        found: dict[str, Any] = {}
        for entry in self._entries.values():
            if entry.deltas is not None:
                found |= entry.deltas(words)
        return found

    def __getitem__(self, name: str) -> Part:
        return self.entry(name).part

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def _home(part: Any) -> str:
    return f"{getattr(part, '__module__', '?')}.{getattr(part, '__qualname__', part)}"


# Checks -------------------------------------------------------------------------------------------


def is_integer(value: Any) -> bool:
    """Whether a value is an integer of Python or NumPy; True and False are none."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def integer(low: float, high: float = math.inf) -> Check:
    """An integer in `low..high`."""
    allowed = f"an integer in {low}..{high}" if high < math.inf else f"an integer, at least {low}"
    return Check(lambda v: is_integer(v) and low <= v <= high, allowed)


def number(
    low: float, high: float = math.inf, *, open_low: bool = False, open_high: bool = False
) -> Check:
    """A finite number in `[low, high]`.

    Args:
        low: the lower end.
        high: the upper end.
        open_low: whether `low` itself is not allowed.
        open_high: whether `high` itself is not allowed.
    """

    def ok(value):
        return (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and math.isfinite(value)
            and (value > low if open_low else value >= low)
            and (value < high if open_high else value <= high)
        )

    if high == math.inf:
        return Check(ok, f"a number {'above' if open_low else 'of at least'} {low:g}")
    brackets = ("(" if open_low else "[") + f"{low:g}, {high:g}" + (")" if open_high else "]")
    return Check(ok, f"a number in {brackets}")


def one_of(options: Iterable[Any]) -> Check:
    """One of some values, or of the names of a registry, later ones included."""
    return Check(
        lambda v: v in tuple(options), lambda: "one of " + ", ".join(map(repr, options)), options
    )


def boolean() -> Check:
    """True or False."""
    return one_of((False, True))


def sequence(element: Callable[[Any], bool], allowed: str) -> Check:
    """A tuple whose elements are all allowed."""
    return Check(lambda v: isinstance(v, tuple) and all(map(element, v)), allowed)


def text(allowed: str = "text") -> Check:
    """Text of any kind."""
    return Check(lambda v: isinstance(v, str), allowed)


def anything() -> Check:
    """Whatever is checked elsewhere."""
    return Check(lambda v: True, "anything")
