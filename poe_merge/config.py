"""The configuration of a merge: one description of every key gives the YAML file, the flags and their help texts.

Fields are mergekit's where mergekit has them. Relative paths are relative to the YAML file; any parameter may be a list
of values by filter, as in mergekit::

    merge_method: poe                   # or a merging method: ties, Ties(density=0.3), my_module:MyMethod(1.0)
    base_model: path/to/base
    models:
      - model: path/to/expert           # a folder, a file, or a model id of the Hugging Face Hub
        name: mnist
        parameters: {weight: 1.0}       # importance; residual_map, energy and scale may differ per model, too
    parameters:
      residual_map: [{filter: mlp, value: OutputGram}, {value: InputGram}]
      energy: StudentT(4.0)
      eta: 0.1                          # relative to the experts' curvature; AbsolutePrecision(1e-3) is absolute
    out_dtype: bfloat16
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from poe_merge import settings as s
from poe_merge.adapter_base import with_base_of_adapters
from poe_merge.by_tensor import Setting
from poe_merge.code_in_files import refuse_code, refuse_file
from poe_merge.functional_section import FunctionalParameters
from poe_merge.mergekit import WITHOUT_USE, read_as_mergekit
from poe_merge.method_keys import allowed, misplaced
from poe_merge.presets import PRESETS
from poe_merge.sections import Section, validated
from poe_merge.settings import POE, ConfigError, Document, Place, Value, read_yaml
from poe_merge.specs import ENERGY, METHOD, PRECISION, RESIDUAL_MAP, SCALE

if TYPE_CHECKING:
    import torch

    from poe_models.weights.rules import RuleTable

__all__ = [
    "ConfigError",
    "MergeConfig",
    "ModelEntry",
    "ModelParameters",
    "Parameters",
    "load_config",
    "parse_config",
    "require_known",
]

_DTYPES = ("float32", "float64", "bfloat16", "float16")
Number = Setting[float] | None
Text = Setting[str] | None
Checkpoint = Annotated[str, Value(s.located, "PATH", path=True)]
Texts = Setting[tuple[str, ...]] | None


class ModelParameters(Section):
    """Parameters that may differ per model; those that are missing come from the shared ``Parameters``."""

    weight: Annotated[Number, s.number(1.0, gradient=True)] = None
    """Importance of the experts, or their weights in a weighted method."""
    density: Annotated[Number, s.share()] = None
    """Share of an update's entries that a weighted method keeps; the method's own if not given."""
    residual_map: Annotated[Texts, s.spec(RESIDUAL_MAP, "InputGram", many=True)] = None
    """Directions of the update that an expert cares about; two for both sides of the matrices."""
    energy: Annotated[Text, s.spec(ENERGY, "Cauchy")] = None
    """Energy of an expert's scaled squared residual."""
    scale: Annotated[Text, s.spec(SCALE, "Balanced(1.0)")] = None
    """Unit of an expert's squared residual, with its gamma."""


class Parameters(ModelParameters):
    """The design shared by all models, and the solver's settings."""

    scaling: Annotated[Number, s.number(1.0, gradient=True)] = None
    """Factor of the merged update in the merged weights."""
    base_weight: Annotated[Number, s.number(gradient=True)] = None
    """Weight of the base in a weighted method; 0 if not given."""
    eta: Annotated[Text, Value(s.eta, "NUMBER|PRECISION", 0.1, kind=PRECISION)] = None
    """Precision of the anchor: a number is relative to the experts' curvature."""
    anchor: Annotated[Text, Value(s.anchor, "zero|METHOD|PATH", "zero", kind=METHOD, path=True)] = None
    """Centre of the anchor: zero, a merging method such as task_arithmetic(0.3), or a checkpoint."""
    coordinates: Annotated[Text, s.choice("kind of coordinates", "full", "span", default="full")] = None
    """Unknowns of the solver: whole updates, or coefficients on the experts' updates."""
    starts: Annotated[
        Texts, s.choice("start", "ones", "twin", "experts", "center", default=["twin", "experts"], many=True)
    ] = None
    """Starts of the solver; the lowest energy wins."""
    max_steps: Annotated[Setting[int] | None, s.number(100, 1, whole=True)] = None
    """Most reweighted solves per start."""
    tolerance: Annotated[Number, s.number(None, 0.0, above=True)] = None
    """Relative tolerance on gradient and weights; 1e-5, or 1e-10 in float64, if not given."""
    step_tolerance: Annotated[Number, s.number(None, 0.0, above=True)] = None
    """Stop when a step is shorter than this instead."""
    acceleration: Annotated[Setting[bool] | None, s.choice("switch", True, False, default=True)] = None
    """Anderson extrapolation of the weights."""

    @field_validator("step_tolerance")
    @classmethod
    def _one_tolerance(cls, value: Number, info: ValidationInfo) -> Number:
        other = info.data.get("tolerance")
        if value and other and value.complete and other.complete:
            raise ValueError("`tolerance` and `step_tolerance` are two ways to stop; give one of them")
        return value


class ModelEntry(Section):
    """An expert: its place, its name, and the parameters of its own."""

    model: Checkpoint
    """A folder, a weight file, or a model id of the Hub."""
    name: Annotated[str | None, Field(min_length=1)] = None
    """Its name; that of its path if not given."""
    parameters: ModelParameters = ModelParameters()
    """Parameters that differ from those of the other experts."""

    @property
    def label(self) -> str:
        """The name of the expert: as given, or from its path."""
        return label_of(self.name, self.model)


def label_of(name: str | None, model: str) -> str:
    """The name of an expert: as given, or from its path.

    >>> label_of(None, "runs/mnist/model.safetensors"), label_of(None, "org/emoji@v2")
    ('mnist', 'emoji')
    """
    path = Path(model)
    if not path.exists():
        path = Path(model.partition("@")[0])
    if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".ckpt"):
        generic = path.stem in ("model", "pytorch_model", "adapter_model")
        path = path.parent if generic else path.with_suffix("")
    return name or path.name


class MergeConfig(Section):
    """Configuration of a merge: everything that decides what comes out."""

    merge_method: Annotated[str, Value(s.merge_method, "METHOD", kind=METHOD)] = POE
    """A merging method instead of a product of experts, poe."""
    base_model: Checkpoint
    """The base: a folder, a weight file, or a model id of the Hub."""
    models: tuple[ModelEntry, ...]
    """An expert; once for each."""
    parameters: Parameters = Parameters()
    """The design and the solver's settings."""
    functional: FunctionalParameters = FunctionalParameters()
    """Experts on predictions."""
    preset: Annotated[str | None, s.choice("preset", *PRESETS)] = None
    """Settings of a paper, which ``poe-merge presets`` lists."""
    rules: tuple[Annotated[dict[str, Any], Value(s.rule, "RULE")], ...] = ()
    """A treatment, '{match: lm_head, action: base}'; a flag's goes before the file's."""
    tensors: Annotated[str, s.choice("set of tensors", "matrices", "all")] = "matrices"
    """Tensors that are merged: matrices, vectors being averaged, or all, as methods of entries were published."""
    dtype: Annotated[str | None, s.choice("dtype", *_DTYPES)] = None
    """Dtype of the output; the merge itself is computed in float64 if that is it, else in float32."""
    out_dtype: Annotated[str | None, s.choice("dtype", "base", *_DTYPES)] = None
    """Dtype of the output, if other than dtype; that of the base if neither is given."""
    output: Annotated[str, Value(s.output, "model|adapter|adapter(rank=INTEGER)")] = "model"
    """Form of the merge: a whole model, or of adapters an adapter, which may be cut to a rank."""
    device: Annotated[str, Value(s.device, "DEVICE")] = "cpu"
    """Device that computes: cpu, cuda, cuda:1."""
    matmul_precision: Annotated[str, s.choice("precision", "highest", "high", "medium")] = "highest"
    """Precision of float32 matrix products, in torch's words: high is TF32 on a GPU."""
    seed: Annotated[int, s.number(low=0, whole=True)] = 0
    """Seed of the draws of ``sample``, and of torch's generators for energies that draw."""
    batch_bytes: Annotated[int, s.number(low=1, whole=True)] = 64 * 2**20
    """Most bytes of updates that are solved as one batch."""
    memory_budget: Annotated[int | None, Value(s.memory, "SIZE")] = None
    """Most memory that merging may take, such as 2GB: batches are made smaller, and too little is refused."""

    @field_validator("models")
    @classmethod
    def _distinct_models(cls, value: tuple[ModelEntry, ...], info: ValidationInfo) -> tuple[ModelEntry, ...]:
        if not value:
            raise ValueError("`models` is empty; list at least one expert, `- model: PATH`")
        labels = [entry.label for entry in value]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"two models are called `{twice[0]}`; give each a `name` of its own")
        base = info.data.get("base_model")
        if any(entry.model == base for entry in value):
            raise ValueError(
                f"the base {base} is also listed as an expert; remove it from `models` (mergekit lists it there for "
                "some methods, this one does not)"
            )
        return value

    @field_validator("models", "parameters", "preset", "functional")
    @classmethod
    def _of_the_method(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse what a merging method, or a product of experts, has no use for."""
        method = info.data.get("merge_method", POE)
        foreign = _foreign_keys(value, method)
        if foreign:
            message = misplaced(foreign, method)
            raise PydanticCustomError("misplaced", "{message}", {"message": message, "place": foreign[0]})
        if method == POE and (negative := _negative_weights(value)):
            message = f"{negative[0][1]:g} is not a finite number of at least 0"
            raise PydanticCustomError("misplaced", "{message}", {"message": message, "place": negative[0][0]})
        return value

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype that the merge is computed in: float64 if asked for, float32 otherwise; never half precision."""
        import torch

        return torch.float64 if self.dtype == "float64" else torch.float32

    @property
    def output_dtype(self) -> torch.dtype | None:
        """Dtype of the merged weights: ``out_dtype``, else ``dtype``, else (None) that of each tensor of the base."""
        import torch

        name = self.out_dtype or self.dtype or "base"
        return None if name == "base" else getattr(torch, name)

    @property
    def adapter(self) -> tuple[int | None] | None:
        """Largest rank of the adapter to write, None for its own; None if a model is written."""
        if self.output == "model":
            return None
        rank = self.output.partition("=")[2].rstrip(")")
        return (int(rank) if rank else None,)

    def shared(self) -> dict[str, Setting[Any]]:
        """Every shared parameter: what the configuration says, then its preset, then the defaults."""
        from inference.problem import TOLERANCE

        given = self.parameters.settings()
        preset = _settings(PRESETS[self.preset].parameters if self.preset else {})
        if "tolerance" in given:
            preset.pop("step_tolerance", None)
        defaults = {key: value.default for key, value in Parameters.values().items()}
        default = _settings({**defaults, "tolerance": TOLERANCE[self.compute_dtype]})
        layers = {key: [layer[key] for layer in (given, preset, default) if key in layer] for key in defaults}
        return {key: reduce(Setting.otherwise, layer) for key, layer in layers.items() if layer}

    def rule_table(self) -> RuleTable:
        """Treatments: the configuration's rules, then its preset's, then the defaults, of matrices or all tensors."""
        from poe_models.weights.rules import ALL_TENSORS, DEFAULT_RULES

        return (ALL_TENSORS if self.tensors == "all" else DEFAULT_RULES).extended(self._own_rules())

    def _own_rules(self) -> list[dict[str, Any]]:
        return [*self.rules, *(map(dict, PRESETS[self.preset].rules) if self.preset else ())]

    def resolved(self) -> dict[str, Any]:
        """The whole configuration with presets and defaults filled in, as plain data that reproduces the run."""
        shared = self.shared()
        if self.merge_method != POE:
            shared = {key: setting for key, setting in shared.items() if allowed(key, self.merge_method)}
        elif "step_tolerance" in shared and shared["step_tolerance"].complete:
            del shared["tolerance"]
        models = [
            {"model": entry.model, "name": entry.label, "parameters": _plain(entry.parameters.settings())}
            for entry in self.models
        ]
        return {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": models,
            "parameters": _plain(shared),
            **({"functional": self.functional.model_dump(exclude_none=True)} if self.functional.tasks else {}),
            "rules": self._own_rules(),
            "tensors": self.tensors,
            "dtype": str(self.compute_dtype).removeprefix("torch."),
            "out_dtype": "base" if self.output_dtype is None else str(self.output_dtype).removeprefix("torch."),
            "output": self.output,
            "device": self.device,
            "matmul_precision": self.matmul_precision,
            "seed": self.seed,
            "batch_bytes": self.batch_bytes,
            **({} if self.memory_budget is None else {"memory_budget": self.memory_budget}),
        }


def _plain(settings: Mapping[str, Setting[Any]]) -> dict[str, Any]:
    return {key: setting.plain() for key, setting in settings.items()}


def _settings(values: Mapping[str, Any]) -> dict[str, Setting[Any]]:
    return Parameters.model_validate(values).settings()


def _foreign_keys(value: Any, method: str) -> list[Place]:
    """Places, within a top-level key's value, of settings that a method has no use for."""
    if isinstance(value, ModelParameters):
        return [(key,) for key in value.settings() if not allowed(key, method)]
    if isinstance(value, tuple):
        entries = enumerate(entry.parameters for entry in value)
        return [(index, "parameters", *place) for index, own in entries for place in _foreign_keys(own, method)]
    if isinstance(value, FunctionalParameters):
        return [("tasks",)] if value.tasks is not None and method != POE else []
    return [()] if value is not None and method != POE else []


def _negative_weights(value: Any) -> list[tuple[Place, float]]:
    """Weights of less than 0, with their places within a top-level key's value."""
    if isinstance(value, tuple):
        entries = enumerate(entry.parameters for entry in value)
        return [((index, "parameters", *p), n) for index, own in entries for p, n in _negative_weights(own)]
    given = value.weight if isinstance(value, ModelParameters) else None
    return [] if given is None else [(("weight",), number) for number in given.numbers() if number < 0]


_SECTIONS: dict[tuple[str, ...], type[Section]] = {
    (): MergeConfig,
    ("parameters",): Parameters,
    ("functional",): FunctionalParameters,
    ("models",): ModelEntry,
    ("models", "parameters"): ModelParameters,
}


def load_config(path: Path, *, allow_code: bool = False) -> MergeConfig:
    """Read a configuration from a YAML file.

    Args:
        path: The file.
        allow_code: Import the modules that it names, which runs their code.

    Returns:
        The configuration.

    Raises:
        ConfigError: If there are mistakes; lists all, each with its place and the nearest valid name.
    """
    return parse_config(read_yaml(path), dict.fromkeys((path.absolute().parent, Path.cwd())), allow_code=allow_code)


def parse_config(document: Document, folders: Iterable[Path] = (), *, allow_code: bool = False) -> MergeConfig:
    """Validate configuration data.

    Args:
        document: The data.
        folders: Relative paths and module names refer to these, or to the current folder.
        allow_code: Import modules that the data names; those that were typed as flags are imported always.

    Returns:
        The configuration.

    Raises:
        ConfigError: If there are mistakes; lists all, each with its place and the nearest valid name.
    """
    if not allow_code:
        values = [item for section in _SECTIONS.values() for item in section.values().items()]
        refuse_code(document, {key for key, value in values if value.kind})
        refuse_file(document, ("functional", "tasks"))
    places = list(folders)
    known = with_base_of_adapters(read_as_mergekit(document), places)
    return validated(known, MergeConfig, _SECTIONS, places, WITHOUT_USE)


def require_known(config: MergeConfig, *, functional: bool) -> None:
    """Refuse experts on predictions where a command does not know them, and settings of such experts without any.

    Args:
        config: The configuration.
        functional: Whether the command knows them.

    Raises:
        ConfigError: If something would be left out.
    """
    tasks, given = config.functional.tasks, sorted(config.functional.model_fields_set)
    if tasks is None and given:
        raise ConfigError(f"functional.{given[0]}: it is about experts on predictions. Give their --tasks.")
    usual = FunctionalParameters().patience  # which a record's configuration spells out
    if config.functional.patience != usual and not config.functional.held_out:
        raise ConfigError("functional.patience: it is about inputs that are held out. Give --held-out, such as 0.25.")
    if tasks is not None and not functional:
        raise ConfigError(
            "functional.tasks: this command knows only experts in weight space. Leave `functional` out, or use `merge` "
            "and `sample --merge`."
        )
