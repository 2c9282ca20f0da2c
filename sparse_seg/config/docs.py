"""`docs/config.md` of the schema: `python -m sparse_seg.config.docs > docs/config.md`."""

from __future__ import annotations

from sparse_seg.config.keys import Key, all_keys, type_name
from sparse_seg.config.load import short_yaml
from sparse_seg.config.schema import Config
from sparse_seg.registry import Registry

INTRODUCTION = """\
# Config keys

Made from `sparse_seg/config/schema.py` by `python -m sparse_seg.config.docs > docs/config.md`.

A config is YAML; `_base_` names files whose settings it starts from, `--set model.width=0.5` overrides one.
In paths, `~` stands for the home folder.
Keys marked \\* are part of what a network computes: a checkpoint only fits the values it was trained with.
"""


def render() -> str:
    """The page: one table a section, in the schema's order."""
    sections: dict[str, list[str]] = {}
    for name, info, kind, default in all_keys(Config):
        section, _, last = name.rpartition(".")
        mark = " \\*" if info.function else ""
        cells = [f"`{last}`{mark}", type_name(kind), f"`{short_yaml(default)}`", _valid(info), info.meaning]
        sections.setdefault(section, []).append("| " + " | ".join(cells) + " |")
    head = "| key | type | default | valid | meaning |\n| --- | --- | --- | --- | --- |"
    tables = [f"\n## {section}\n\n{head}\n" + "\n".join(rows) + "\n" for section, rows in sections.items()]
    return INTRODUCTION + "".join(tables)


def _valid(info: Key) -> str:
    if info.choices:
        choices = info.choices.declared if isinstance(info.choices, Registry) else info.choices
        return ", ".join(f"`{short_yaml(choice)}`" for choice in choices)
    names = f"[{', '.join(info.items)}]" if isinstance(info.items, tuple) else ""
    return ", ".join(filter(None, (names, info.bounds and f"in {info.bounds}")))


if __name__ == "__main__":
    print(render(), end="")
