"""Remedies that messages print: flags, rules, keys and calls in them exist, and a test does what they say."""

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
from tests.test_remedies_calls import CALLS
from tests.test_remedies_commands import COMMANDS

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
KILLED, ACTIVATIONS = "tests/streaming/test_interruptions.py", "tests/test_cli_activations.py"
SEARCH, FITS, AROUND = "tests/test_cli_search.py", "tests/test_cli_functional.py", "tests/cli_sample/test_around.py"
EXECUTED: dict[str, str | tuple[str, str]] = {
    "keep the base's tensor, or leave out an expert's": (
        ODD,
        "test_the_suggested_rule_matches_its_tensor_and_no_other",
    ),
    "one of them was saved from a wrapped": (ODD, "test_a_prefix_of_all_names_is_seen_and_the_remedy_helps"),
    "values that are": (ODD, "test_a_buffer_that_is_infinite_by_design_can_be_kept"),
    "neither a bias nor a neighbour tells": (LAYOUTS, "test_what_nothing_tells_is_named_and_the_remedy_helps"),
    "is left from an interrupted": (KILLED, "test_killed_at_any_file_operation_it_goes_on"),
    "another process has ended before the work was done": (KILLED, "test_killed_at_any_file_operation_it_goes_on"),
    "exists. Give another folder, or go on with it: --resume": (
        ACTIVATIONS,
        "test_what_is_there_is_kept_on_request_only",
    ),
    "judged on what? Give --tasks": (SEARCH, "test_scores_of_a_users_tasks"),
    "Run `poe-merge merge`, then `poe-merge sample --merge FOLDER": (FITS, "test_members_surround_the_fit"),
    "give the folder to make, --out DIR": "no output",
    "--out \0: \0. Give another folder": "taken output",
    "is code of one's own, which would be run. If you trust it, add --allow-code (in": "code",
    "or type it as a flag": "code, typed",
    "acts on the rows or columns of a matrix": "one row",
    "Write a dtype of wider range": "narrow dtype",
    "of its variances are negative in the merge": "negative variances",
    "every model has weight 0": "no weights",
    "Use --sampler \0.": "energy of gibbs",
    "Add --coordinates span, or use --sampler": "coordinates of a sampler",
    "small ones draw near the MAP": "temperature",
    "Ask for fewer members or more --draws": "few draws",
    "`poe-merge plan` lists the tensors": "no such modules",
    "Write it like 'mlp.*fc2'": "no pattern",
    "is a merging method. To draw it at several seeds": "a method as sampler",
    "Draw with --coordinates span, or merge with `coordinates: full`": "a merge in the span",
    "no parameter is a range": "a search without a range",
    "Give a name that ends in .html": "a page",
    "has its own configuration. Give one of the two": "two configurations",
    "To draw around a merged one: `poe-merge sample --merge FOLDER`": "a folder as a configuration",
    "is no adapter, and the merge of one with others is none": "no adapters",
    "For float64 ask for": "tensors that are rounded",
    "has the name of a matrix of": "one name for two",
    "expected a mapping such as {match: lm_head": "a rule that is no mapping",
    "is missing. Write for instance {match: lm_head": "a rule without an action",
    "Write for instance `view: {rows": "a view that is no mapping",
    "only merged tensors are seen as matrices": "a view of a kept tensor",
    "use `action: average` or `action: base`": "a vector that is to be a matrix",
    "fits no tensor of the base": "a rule that fits nothing",
}
"""Words of messages: the test that does what they say, or the case of a command or a call that does."""

NOT_EXECUTED = {
    "the file changed while it was in use": "the file as it was is the user's own to bring back",
    "not there any more": "the file is the user's own to bring back",
    "embedding and head are tied by the config": "a base that stores the two apart is another model",
    "which were trained on models that name it differently": "a whole model, which `no adapters` writes",
    "is replaced whole by another": "a whole model, which `no adapters` writes",
    "the merge of adapters is not of their rank": "a whole model, which `no adapters` writes",
    "One set of statistics has one kind of expert": "advice for a configuration, not a command",
    "is of another §": "another database, or another name in it, is the user's own",
    "processes share a study by a database": "several processes, run so in `test_ranks_tasks.py`",
    "is too large for": "a merge again, of files that no test can hold: 1e38",
    "no such property": "names the properties, of which one is to be picked",
    "a search writes whole models": "two commands in a row, each with tests of its own",
    "it is about experts on predictions": "tasks are the user's own code",
    "it is about inputs that are held out": "tasks are the user's own code",
    "this command knows only experts in weight space": "names other commands",
    "Use them as --residual-map": "printed of a success, and run so in `test_cli_activations.py`",
    "--pattern \0 fits \0 of": "tells a number, and what to do nothing",
    "are about other experts than those of others": "advice for a configuration, not a command",
    "whose steps become nothing": "the temperature is computed, and tried in `test_refused.py`",
    "an ensemble of deltas": "another ensemble, drawn anew",
    "is code of one's own, which would be run. If you trust it, add --allow-code, or type": "as `code`",
    "on which its score is too low": "inputs that a fit has not seen are the user's own",
    "its record has no coefficients of a fit": "a merge again",
    "Take filters, `coordinates: span`": "advice for a configuration, not a command",
    "the merge is an adapter, and this is about whole models": "a merge again",
    "merged in Python, without a configuration": "another program, in Python",
    "has no posterior. Draw around a product": "another merge",
    "it was merged from other checkpoints": "a merge again",
    "Full draws are made from the weights themselves": "leaves a flag out",
    "`coordinates` differ between tensors": "advice for a configuration, not a command",
    "has no $ for the number": "a pattern is the user's own",
    "write bmm, blocks, or a mapping of names": "names values, all tried in `test_search.py`",
    "has no use for --tasks": "leaves flags out",
    "is no rule; write": "as `a rule that is no mapping`",
    "a configuration is a mapping": "a configuration anew",
    "A product of experts is `merge_method": "as `a method as sampler`",
    "and `network(base)` has": "code of the user's own",
    "`poe-merge batch-norm`": "as `negative variances`",
}
"""Words of messages whose advice no test can do as it is printed, and why."""


def printed() -> list[tuple[str, str]]:
    """Places and texts of the messages that print a flag, a rule or a key to set."""
    shown: dict[str, str] = {}
    for where, part in messages():
        shown[where] = shown.get(where, "") + part
    remedy = re.compile(FLAG + r"|\{match: |`[a-z_]+: ")
    return [(where, each) for where, each in shown.items() if remedy.search(each)]


def test_every_printed_remedy_is_executed_or_has_its_reason() -> None:
    known = (*EXECUTED, *NOT_EXECUTED)
    assert [each for each in printed() if not any(part.replace("§", HOLE) in each[1] for part in known)] == []


def test_no_reason_is_left_over() -> None:
    texts = [each for _, each in messages()] + [text for _, text in printed()]
    assert [part for part in NOT_EXECUTED if not any(part.replace("§", HOLE) in each for each in texts)] == []


@pytest.mark.parametrize("remedy", EXECUTED)
def test_executed_remedies_have_their_test(remedy: str) -> None:
    by = EXECUTED[remedy]
    if isinstance(by, str):
        assert by in COMMANDS or by in CALLS
    else:
        assert f"def {by[1]}(" in (ROOT / by[0]).read_text(encoding="utf-8")
