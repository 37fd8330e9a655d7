"""The table of the recipe's fields in docs/finetuning.md: ``python -m tools.recipe`` writes it anew."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

from se_retrofit.finetune import FinetuneConfig

PAGE = Path(__file__).parents[1] / "docs" / "finetuning.md"
TABLE = re.compile(r"(?<=<!-- fields, by python -m tools\.recipe -->\n).*?(?=<!-- end of fields -->)", re.DOTALL)


def table() -> str:
    """A row for each field: its name, its default as YAML has it, and what it does."""
    rows = ["| field | default | |", "| --- | --- | --- |"]
    for name, field in FinetuneConfig.model_fields.items():
        default = FinetuneConfig().to_dict()[name]
        shown = "" if default in (None, [], {}) else f"`{yaml.safe_dump(default).splitlines()[0]}`"
        rows.append(f"| `{name}` | {shown} | {' '.join((field.description or '').split())} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    PAGE.write_text(TABLE.sub(lambda _: table(), PAGE.read_text(encoding="utf-8")), encoding="utf-8")
