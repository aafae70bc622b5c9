"""Writes docs/settings.md out of the types of all settings: python -m scripts.make_settings"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from zinit.ui.settings import HEADER, REQUIRED, SettingsTable, settings_tables
from zinit.validation import MOST

DOCUMENT = Path(__file__).parents[1] / "docs" / "settings.md"
INTRODUCTION = f"""\
# Settings

Made by `python -m scripts.make_settings` out of the types that check them; do not edit. `zinit ls settings` prints the
same for what is installed, other packages' tasks and methods included; `zinit ls settings --json` is for programs.

A setting is an option, `-o train.epochs=3` (the table may be left out where the name is unique: `-o epochs=3`), or a
line of a TOML file, `--config mine.toml`. An option wins over the file, the file over a preset, and a preset over what
zinit chooses. Presets and methods bring settings of their own, such as learning rates: what a run took is in its
`run.json`. In an option a text needs no quotes, a list is `[1,2]` or `1,2`, and `none` is no value. A wrong value is
refused, with what was expected.

The parts of an adapter, `[parts.NAME]`, take the settings of `[prefix]`: `-o parts.late.length=20`.

A number is at most {MOST:,} in size, where no other limit is said.
"""


def render() -> str:
    """The whole document."""
    parts, last = [INTRODUCTION], ""
    for table in settings_tables():
        heading, level = _heading(table)
        if heading != last:
            parts.append(f"## {heading}\n")
            last = heading
        if level:
            parts.append(f"### {level}\n")
        parts.append(f"{table.about}\n")
        parts.append(_rows(HEADER, table.rows()))
    return "\n".join(parts)


def _heading(table: SettingsTable) -> tuple[str, str]:
    """The heading of the second level, and the one below it where an entry has settings of its own."""
    if table.entry is None:
        return f"`{table.title}`" if table.table else table.title[:1].upper() + table.title[1:], ""
    return f"`[{table.table}]`", table.entry


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header)]
    lines += [[f"`{name}`", _text(kind), _default(default), _text(about)] for name, kind, default, about in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _default(words: str) -> str:
    return words if words == REQUIRED else f"`{words}`"


def _text(words: str) -> str:
    """In a cell: a bar, and what looks like a tag, as it stands."""
    return words.replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    DOCUMENT.write_text(render(), encoding="utf-8")
