"""The one kind of error that is the user's to mend: programs print it without a traceback."""

import difflib
from collections.abc import Iterable

__all__ = ["UserError", "did_you_mean"]


class UserError(ValueError):
    """Names the key or file, the value, and what is allowed."""


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """The end of a message about a word that is not known: `; did you mean 'train.steps'?`.

    Args:
        word: as it was given.
        known: the words there are. Dotted ones are keys of a config: where nothing else is near, a
            key that ends in the word will do.

    Returns:
        The words that are nearest, at most two; empty where none is near.
    """
    by_case = {text.lower(): text for text in known if isinstance(text, str)}
    if not isinstance(word, str) or not word or word in by_case.values():
        return ""
    section, _, last = word.lower().rpartition(".")
    alike = [text for text in by_case if text.rpartition(".")[::2] != ("", last)]
    alike = [text for text in alike if text.rpartition(".")[2] == last]
    # Those of the fewest sections first.
    alike = sorted(alike, key=lambda text: text.count("."))[:2]
    near = alike if not section else []  # "steps" alone is a key without its section.
    near = near or difflib.get_close_matches(word.lower(), by_case, n=1, cutoff=0.7)
    near = near or alike or difflib.get_close_matches(word.lower(), by_case, n=1, cutoff=0.55)
    return f"; did you mean {' or '.join(repr(by_case[text]) for text in near)}?" if near else ""
