"""The style sheet of a report: light and dark, from a telephone's width on."""

__all__ = ["STYLE"]

STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1f2328; --quiet: #59636e; --page: #ffffff; --panel: #f6f8fa; --line: #d0d7de;
  --accent: #0969da; --bar: #b6d4fe; --warn: #7d4e00; --warn-page: #fff8c5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #e6edf3; --quiet: #9198a1; --page: #0d1117; --panel: #151b23; --line: #3d444d;
    --accent: #58a6ff; --bar: #1f4a80; --warn: #f2cc60; --warn-page: #272115;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
}
header, main, footer { max-width: 100rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.25rem; margin: 2.5rem 0 .25rem; padding-top: .5rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: 1rem; margin: 0 0 .25rem; overflow-wrap: anywhere; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.quiet, figcaption, footer { color: var(--quiet); }
a { color: var(--accent); }
a:focus-visible, .scroll:focus-visible, summary:focus-visible {
  outline: 2px solid var(--accent); outline-offset: 2px;
}
nav ul {
  display: flex; flex-wrap: wrap; gap: .25rem 1rem; list-style: none; margin: .75rem 0 0;
  padding: 0;
}
.note {
  background: var(--warn-page); color: var(--warn); border-left: 4px solid; padding: .5rem .75rem;
  max-width: 46rem; overflow-wrap: anywhere;
}
.cards, .figures { display: grid; gap: 1.25rem; margin: 1rem 0; }
.cards { grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); }
.figures {
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 26rem), 1fr)); align-items: start;
}
.card {
  background: var(--panel); border: 1px solid var(--line); border-radius: .5rem;
  padding: .9rem 1rem;
}
.card p { margin: 0; }
.headline {
  font-size: 2.1rem; line-height: 1.2; font-weight: 650; font-variant-numeric: tabular-nums;
}
figure { margin: 0; min-width: 0; }
figure img { display: block; width: 100%; height: auto; max-width: 40rem; }
img.pixels { image-rendering: pixelated; background: #ffffff; border: 1px solid var(--line); }
figcaption { font-size: .875rem; margin-top: .25rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; max-width: 100%; margin: .75rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td {
  text-align: left; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top;
}
td, thead th:not(:first-child) { min-width: 9rem; overflow-wrap: anywhere; }
tbody th { font-weight: 500; white-space: nowrap; }
thead th { vertical-align: bottom; }
tr.differs > * { background: var(--warn-page); }
.bar {
  display: block; height: .4rem; background: var(--bar); border-radius: .2rem; margin-top: .2rem;
}
code { font-size: .9em; overflow-wrap: anywhere; }
summary { cursor: pointer; color: var(--accent); }
footer { margin-top: 3rem; padding-bottom: 2rem; font-size: .875rem; }
@media (max-width: 30rem) {
  header, main, footer { padding-left: .75rem; padding-right: .75rem; }
  tbody th { white-space: normal; min-width: 8rem; }
}
"""
