"""The recipe's documents name every folder and every setting, and their links lead somewhere."""

import re
from pathlib import Path

from examples.tcod.settings.config import TcodConfig

NUM_GPUS = 0
RECIPE = Path(__file__).resolve().parents[2] / "examples" / "tcod"
README = (RECIPE / "README.md").read_text("utf-8")
SETTINGS = (RECIPE / "docs" / "SETTINGS.md").read_text("utf-8")


def test_every_entry_is_named():
    entries = {file.relative_to(RECIPE).parts[0] for file in RECIPE.rglob("*.py") if file.parent != RECIPE}
    entries |= {file.name for file in RECIPE.glob("*.py") if file.name != "__init__.py"}
    assert [name for name in entries if f"]({name})" not in README] == []


def test_every_setting_is_in_the_table_with_its_default():
    rows = [line.split(" | ") for line in SETTINGS.splitlines() if line.startswith("| `tcod_")]
    described = {}
    for keys, defaults, *_ in rows:
        names = re.findall(r"`(tcod_\w+)`", keys)
        described |= dict(zip(names, (part.strip() for part in defaults.split(",")), strict=False))
        described |= {name: defaults.strip() for name in names if len(names) == 1}
    assert set(described) == set(TcodConfig.model_fields)
    for name, field in TcodConfig.model_fields.items():
        if not field.is_required() and isinstance(field.default, int | float) and not isinstance(field.default, bool):
            assert float(described[name]) == field.default, name


def test_commands_name_programs_that_are_there():
    for document in [RECIPE / "README.md", *RECIPE.glob("docs/*.md")]:
        for tool in re.findall(r"examples\.tcod\.tools\.(\w+)", document.read_text("utf-8")):
            assert (RECIPE / "tools" / f"{tool}.py").exists(), (document, tool)


def test_links_lead_somewhere():
    for document in [RECIPE / "README.md", *RECIPE.glob("docs/*.md")]:
        text = document.read_text()
        for target, anchor in re.findall(r"\]\(([^)#:]*)(#[^)]*)?\)", text):
            assert not target or (document.parent / target).exists(), (document, target)
            aim = (document.parent / target).read_text() if target.endswith(".md") else text if not target else ""
            headings = [
                re.sub(r"[^\w -]", "", line.lstrip("# ").lower()) for line in aim.splitlines() if "#" in line[:4]
            ]
            assert not anchor or anchor[1:] in {heading.strip().replace(" ", "-") for heading in headings}, anchor
