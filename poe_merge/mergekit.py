"""mergekit's configurations, read as configurations of this project.

A file is mergekit's if its ``merge_method`` is ``linear`` or ``dare_linear``, or ``task_arithmetic``, ``ties`` or
``dare_ties`` with a key that only mergekit has there, such as ``weight`` or ``density``. What it says is rewritten:
the method becomes a ``Weighted`` or ``WeightedDare`` on all tensors, and the base is taken from among the models.
"""

from __future__ import annotations

import copy
from os.path import normpath
from typing import Any

from poe_merge.settings import Document, Place

_METHODS = {
    "linear": ("Weighted", {"normalize": True}),
    "task_arithmetic": ("Weighted", {"normalize": False, "rescale": False}),
    "ties": ("Weighted", {"elect": True, "normalize": True, "rescale": False}),
    "dare_linear": ("WeightedDare", {"normalize": False, "rescale": True}),
    "dare_ties": ("WeightedDare", {"elect": True, "normalize": False, "rescale": True}),
}
"""Method of this project, and its settings by default, for each of mergekit's."""
WITHOUT_USE = {
    "slices": "experts share the base's layers",
    "modules": "one merge handles one checkpoint",
    "tokenizer": "the base's tokenizer is copied",
    "tokenizer_source": "the base's tokenizer is copied, which is `base`, and vocabularies are not united",
    "chat_template": "the base's chat template is copied",
    "int8_mask": "masks are made as they are used",
    "lambda": "the factor of the merged update is `scaling`",
    "normalize": "a product of experts weighs by precision, and methods say it with their name",
    "rescale": "methods say it with their name, `merge_method: WeightedDare(rescale=True)`",
}
"""Keys of mergekit that have no use here, and why."""
_OWN = ("linear", "dare_linear")
_KEYS = ("weight", "density", "normalize", "rescale", "lambda", "int8_mask")
_WITHOUT = {"linear": ("density", "rescale", "lambda", "int8_mask"), "task_arithmetic": ("density",)}
"""Keys that mergekit's method does nothing with; read here, they would change the merge."""


def is_mergekit(data: Any) -> bool:
    """Whether configuration data is mergekit's rather than this project's own.

    >>> is_mergekit({"merge_method": "ties", "parameters": {"density": 0.2}}), is_mergekit({"merge_method": "ties"})
    (True, False)
    """
    method = data.get("merge_method") if isinstance(data, dict) else None
    if not isinstance(method, str):
        return False
    given = [key for _, section in _placed(data) for key in section] if method in _METHODS else []
    return method in _OWN or any(key in _KEYS for key in given)


def read_as_mergekit(document: Document) -> Document:
    """Rewrite mergekit's configuration as one of this project; others are returned as they are.

    Args:
        document: Configuration data; it is left alone.

    Returns:
        Data with the same places in the file; what has no meaning here is among its problems.
    """
    if not is_mergekit(document.data):
        return document
    made = copy.deepcopy(document)
    theirs = made.data["merge_method"]
    _refuse_foreign(made, theirs)
    name, settings = _METHODS[theirs]
    settings = {**settings, **_switches(made, theirs)}
    _set_base_apart(made, theirs)
    made.data["merge_method"] = f"{name}({', '.join(f'{key}={value}' for key, value in settings.items())})"
    shared = _section(made.data, "parameters")
    if "lambda" in shared and "scaling" in shared:
        _problem(made, ("parameters", "lambda"), "`lambda` is mergekit's name of `scaling`. Leave one of them out")
    elif "lambda" in shared:
        shared["scaling"] = shared.pop("lambda")
        _moved(made, ("parameters", "lambda"), ("parameters", "scaling"))
    if made.data.get("tokenizer_source") == "base":
        del made.data["tokenizer_source"]
    made.data.setdefault("tensors", "all")
    return made


def _placed(data: dict[str, Any]) -> list[tuple[Place, dict[str, Any]]]:
    """The parameters of all models and of each, with their place."""
    models = data.get("models")
    entries = enumerate(models if isinstance(models, list) else ())
    own = [(("models", index, "parameters"), entry) for index, entry in entries if isinstance(entry, dict)]
    return [(place, _section(holder, "parameters")) for place, holder in [(("parameters",), data), *own]]


def _section(holder: dict[str, Any], key: str) -> dict[str, Any]:
    return holder[key] if isinstance(holder.get(key), dict) else {}


def _set_base_apart(document: Document, method: str) -> None:
    """Take the base from the list of models; in an average without one, the first model is it, and has its weight."""
    data = document.data
    models = data["models"] if isinstance(data.get("models"), list) else []
    listed = [entry.get("model") if isinstance(entry, dict) else None for entry in models]
    inferred = method == "linear" and data.get("base_model") is None and bool(listed) and isinstance(listed[0], str)
    if inferred:
        data["base_model"] = listed[0]
        document.origins[("base_model",)] = document.origins.get(("models", 0), "")
    base = data.get("base_model")
    same = [index for index, model in enumerate(listed) if _same(model, base)]
    weight = _section(data, "parameters").get("weight")
    for index in same[1:]:
        _problem(document, ("models", index), f"{base}, the base, is listed twice. Leave one of them out")
    if same:
        given = _section(models[same[0]], "parameters")
        weight = given.get("weight", weight)
        for key in sorted(given.keys() - set(_KEYS)):
            _problem(
                document, ("models", same[0], "parameters", key), f"mergekit's {method} has no `{key}`. Leave it out"
            )
        del models[same[0]]
        _close_gap(document, same[0])
    if method == "linear" and base is not None:
        _weigh_base(document, base, weight, inferred)


def _weigh_base(document: Document, base: Any, weight: Any, inferred: bool) -> None:
    """Give the base its weight in the average; it needs one, whether it was named or is the first model."""
    if weight is not None:
        document.data.setdefault("parameters", {})
        _section(document.data, "parameters").setdefault("base_weight", weight)
        return
    listed = "List it in `models` with a `weight`, or leave `base_model` out"
    way_out = "Give the first model, which is the base, a `weight`" if inferred else listed
    text = f"mergekit's linear counts the base among the models, and {base} has no weight. {way_out}"
    _problem(document, ("base_model",), text)


def _same(model: Any, base: Any) -> bool:
    return isinstance(model, str) and isinstance(base, str) and normpath(model) == normpath(base)


def _close_gap(document: Document, index: int) -> None:
    """Let the places of the models behind one that is gone move up."""
    origins = {p: text for p, text in document.origins.items() if p[:2] != ("models", index)}
    behind = {p: (p[0], int(p[1]) - 1, *p[2:]) for p in origins if p[0:1] == ("models",) and p[1:2] > (index,)}
    document.origins = {behind.get(p, p): text for p, text in origins.items()}


def _moved(document: Document, old: Place, new: Place) -> None:
    document.origins = {(*new, *p[len(old) :]) if p[: len(old)] == old else p: t for p, t in document.origins.items()}


def _refuse_foreign(document: Document, method: str) -> None:
    """Refuse parameters that mergekit's method has not."""
    for place, section in _placed(document.data):
        for key in [key for key in section if key in _WITHOUT.get(method, ())]:
            del section[key]
            _problem(document, (*place, key), f"mergekit's {method} does nothing with `{key}`. Leave it out")


def _switches(document: Document, method: str) -> dict[str, bool]:
    """The switches of the method, which are of the whole merge; ``int8_mask`` changes nothing of the result."""
    found: dict[str, bool] = {}
    for place, section in _placed(document.data):
        for key in ("normalize", "rescale", "int8_mask"):
            if key not in section:
                continue
            value = section.pop(key)
            if len(place) > 1:
                _problem(document, (*place, key), f"`{key}` is of all models. Write it in the shared `parameters`")
            elif not isinstance(value, bool):
                _problem(document, (*place, key), f"{value!r} is no switch of the whole merge. Write true or false")
            elif method == "linear" and not value:
                _problem(
                    document,
                    (*place, key),
                    "a merge here is the base plus updates, and weights that are not divided by their sum would weigh "
                    "the base, too. Leave it out, or write `merge_method: task_arithmetic` with a `base_model`",
                )
            elif key != "int8_mask":
                found[key] = value
    return found


def _problem(document: Document, place: Place, text: str) -> None:
    dotted = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")
    origin = document.origins.get(document.known(place), "")
    document.problems.append(": ".join(part for part in (origin, dotted, f"{text}.") if part))
