"""Remedies that messages print: flags, rules, keys and calls in them exist. Read from the source, nothing is run."""

from __future__ import annotations

import ast
import builtins
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

import diagnostics
import inference
import poe_merge
import poe_models
from poe_merge.cli import app
from poe_merge.config import MergeConfig, ModelEntry, ModelParameters, Parameters
from poe_merge.functional_section import FunctionalParameters
from poe_models.weights.rule import Rule

ROOT = Path(__file__).parent.parent
FLOORS = ("poe_models", "inference", "diagnostics", "poe_merge")
HOLE = "\0"
"""Stands for what a message fills in."""
VALUES = {
    "my_module:",  # a module of the user's
    "as:",  # of a search's groups
    "groups:",
    "tie_word_embeddings:",  # of a model's config.json
    "eta:",
}
"""Backticked texts with a colon that are no keys of ours."""


def text(node: ast.AST) -> str | None:
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else HOLE for part in node.values)
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def strings(node: ast.AST) -> Iterator[str]:
    found = text(node)
    if found is not None:
        yield found
    else:
        for child in ast.iter_child_nodes(node):
            yield from strings(child)


def message_of(node: ast.AST) -> ast.AST | None:
    """The expression whose strings a user is shown, of a statement that raises or warns."""
    if isinstance(node, ast.Raise):
        return node.exc
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in ("warn", "print"):
        return node
    return None


@cache
def messages() -> tuple[tuple[str, str], ...]:
    found = []
    for path in (path for floor in FLOORS for path in sorted((ROOT / floor).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            shown = message_of(node)
            if shown is not None:
                found += [(f"{path.relative_to(ROOT)}:{shown.lineno}", each) for each in strings(shown)]  # type: ignore[attr-defined]
    return tuple(dict.fromkeys(found))


def matches(pattern: str) -> list[tuple[str, str]]:
    """Places with what a pattern finds in the messages."""
    return [(where, found) for where, shown in messages() for found in re.findall(pattern, shown)]


@cache
def flags() -> dict[str, set[str]]:
    """The flags of each command."""
    group = get_command(app)
    return {
        name: {flag for option in command.params for flag in (*option.opts, *option.secondary_opts)} | {"--help"}
        for name, command in group.commands.items()  # type: ignore[attr-defined]
    }


FLAG = r"(?<![\w-])--[a-z][a-z-]*[a-z]"


def test_there_are_remedies_of_each_kind() -> None:
    assert len(matches(FLAG)) > 40
    assert len(matches(r"\{match: [^}]*\}")) >= 4
    assert len(matches(r"`[A-Za-z_.]+\(")) > 200


def test_flags_exist() -> None:
    known = set().union(*flags().values())
    assert not [each for each in matches(FLAG) if each[1] not in known]


def test_flags_of_a_command_that_is_named_are_its_own() -> None:
    calls = matches(r"poe-merge ([a-z-]+)([^`.;]*)`")
    assert calls
    for where, (command, rest) in calls:  # type: ignore[misc]
        assert command in flags(), where
        assert not set(re.findall(FLAG, rest)) - flags()[command], where


def test_rules_parse() -> None:
    for where, rule in matches(r"\{match: [^}]*\}"):
        if f"action: {HOLE}" in rule or "match: ..." in rule:
            continue  # a rule of the user's own, or a form with its text left out
        parsed = Rule.from_dict(yaml.safe_load(rule.replace(HOLE, "name")))
        assert parsed.action in ("merge", "average", "base"), where


def test_keys_are_those_of_the_configuration_or_of_rules() -> None:
    models = (MergeConfig, ModelEntry, ModelParameters, Parameters, FunctionalParameters)
    known = {name for model in models for name in model.model_fields} | set(Rule.__dataclass_fields__)
    unknown = [
        (where, key)
        for where, key in matches(r"`([a-z_]+:)(?= )")
        if key not in VALUES and key.removesuffix(":") not in known
    ]
    assert not unknown


def named(name: str) -> bool:
    """Return whether a dotted name is one of ours, a method of something of ours, or Python's."""
    first, *rest = name.strip(".").split(".")
    spaces = (poe_merge, poe_models, inference, diagnostics, builtins)
    if name.startswith("."):
        return True  # a method of what the user has given
    found = next((getattr(space, first) for space in spaces if hasattr(space, first)), None)
    if found is None:
        return first in defined()
    return all(hasattr(found, part) or part in defined() for part in rest)


@cache
def defined() -> frozenset[str]:
    """Names of all functions, classes, arguments and methods in the sources, what messages call things by."""
    found: set[str] = set()
    for path in (path for floor in FLOORS for path in (ROOT / floor).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.arg):
                found.add(node.arg)
            elif isinstance(node, ast.Name):
                found.add(node.id)
    return frozenset(found)


def test_calls_name_what_exists() -> None:
    assert not [each for each in matches(r"`([A-Za-z_.]+)\(") if not named(each[1])]


@pytest.mark.parametrize("wrong", ["--no-such-flag", "Anker", "TaskVectors.modulles"])
def test_what_does_not_exist_is_seen(wrong: str) -> None:
    assert wrong not in set().union(*flags().values())
    assert not named(wrong)


# ------------------------------------------------------------------------------------------------ remedies executed

ODD, LAYOUTS, UNITS = "tests/test_odd_checkpoints.py", "tests/test_layouts.py", "tests/test_extreme_updates.py"
EXECUTED = {
    "{match: '^NAME$', action: base}": (ODD, "test_the_suggested_rule_matches_its_tensor_and_no_other"),
    "name.replace(PART, '', 1)": (ODD, "test_a_prefix_of_all_names_is_seen_and_the_remedy_helps"),
    "the same rule for a buffer that is infinite": (ODD, "test_a_buffer_that_is_infinite_by_design_can_be_kept"),
    "view: {transpose: true}": (LAYOUTS, "test_what_nothing_tells_is_named_and_the_remedy_helps"),
    "divide all updates": (UNITS, "test_a_bound_posterior_refuses_them_and_a_merge_does_them"),
    "--resume": ("tests/streaming/test_interruptions.py", "test_killed_at_any_file_operation_it_goes_on"),
}
"""Remedies that are taken from the message, or done as it says, and helped: by the test that does so."""


@pytest.mark.parametrize("remedy", EXECUTED)
def test_executed_remedies_have_their_test(remedy: str) -> None:
    path, name = EXECUTED[remedy]
    assert f"def {name}(" in (ROOT / path).read_text(encoding="utf-8")
