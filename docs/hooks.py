"""What MkDocs does not do by itself: pages from all over the repository, and none of the web.

A file's place in the site is its place in the repository, so that one and the same link works in
both, and a wrong link in the README is an error of the site's build.
"""

import re
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]

_PATTERNS = (
    "*.md",
    "LICENSE",
    "docs/**/*.md",
    "docs/**/*.png",
    "benchmarks/**/*.md",
    "benchmarks/**/*.png",
    "configs/*.py",
    "examples/*.py",
    "examples/*.ipynb",
    "experiments/README.md",
    "experiments/results/**/*.md",
    "experiments/results/**/*.csv",
    "experiments/results/**/*.png",
)

# Elements that a browser loads by itself; links that a reader may follow are none of them.
_LOADED = re.compile(
    r"<(?:script|img|iframe|source|audio|video|embed)\b[^>]*?\ssrc=[\"']?((?:https?:)?//[^\"'\s>]+)"
    r"|<link\b(?![^>]*rel=[\"']?canonical)[^>]*?\shref=[\"']?((?:https?:)?//[^\"'\s>]+)",
    re.IGNORECASE,
)


def on_files(files: Files, config) -> Files:
    """Puts the repository's own paths in place of those below `docs_dir`."""
    for file in list(files):
        if file.src_dir == config.docs_dir:
            files.remove(file)
    for pattern in _PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_post_page(output: str, page, config) -> str:
    """Refuses a page that loads anything from elsewhere.

    Raises:
        PluginError: naming page and address.
    """
    del config
    for match in _LOADED.finditer(output):
        raise PluginError(f"{page.file.src_uri} loads {match[1] or match[2]}: ship it, or drop it")
    return output
