"""The configuration of a run: typed, frozen, and nothing in it that nobody knows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..data import AUGMENTATIONS, DATASETS
from ..models.resnets import ARCHITECTURES
from ..models.votes import RULES
from ..sde.schedules import Schedule
from ..sde.solvers import check_solver
from ..validation import ItoError, nearest, shown

ENVIRONMENT = "ITO_SDE_"  # ITO_SDE_SDE__OMEGA=0.4 sets sde.omega


def _one_of(kind: str, known: Iterable[str], value: str | None) -> str | None:
    if value is not None and value not in known:
        raise ItoError(nearest(kind, value, known))
    return value


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Section):
    """Which images; see `neuralsde_ito.data.load_data`."""

    name: str = "digits"
    path: str | None = None
    size: int | None = Field(None, ge=4)
    augment: str | None = None
    train_limit: int | None = Field(None, ge=1)
    test_limit: int | None = Field(None, ge=1)

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str | None:
        return _one_of("data set", DATASETS, value)

    @field_validator("augment")
    @classmethod
    def _augment(cls, value: str | None) -> str | None:
        return _one_of("augmentation", AUGMENTATIONS, value)


class Network(_Section):
    """The ResNet; see `neuralsde_ito.resnets.load_resnet`. Classes and channels follow the data."""

    arch: str = "resnet8"
    weights: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @field_validator("arch")
    @classmethod
    def _arch(cls, value: str) -> str | None:
        return _one_of("architecture", ARCHITECTURES, value)


class Fit(_Section):
    """How weights are trained."""

    epochs: int = Field(ge=0)
    lr: float = Field(gt=0)
    optimizer: Literal["adam", "sgd"] = "adam"
    decay: Literal["constant", "one-cycle"] = "constant"
    weight_decay: float = Field(0.0, ge=0)
    batch_size: int = Field(128, ge=1)


class Sde(_Section):
    """How blocks become SDEs and how these are solved; see `neuralsde_ito.recast.recast`."""

    omega: float = Field(0.2, ge=0)
    schedule: str = "inverse-time"
    solver: str = "euler"
    steps: int = 1
    horizon: float | None = Field(None, gt=0)
    checkpoint: bool = False

    @model_validator(mode="after")
    def _solvable(self) -> Sde:
        Schedule(self.omega, self.schedule)
        check_solver(self.solver, self.omega, self.steps)
        return self


class Ensemble(_Section):
    """How many vote, and by which rule; see `neuralsde_ito.ensemble.ItoEnsemble`."""

    members: int = Field(5, ge=1)
    inferences: int = Field(20, ge=1)
    rule: str = "hierarchical"
    paths_per_call: int = Field(4, ge=1)

    @field_validator("rule")
    @classmethod
    def _rule(cls, value: str) -> str | None:
        return _one_of("rule", RULES, value)


class Attack(_Section):
    """What ``ito-sde attack`` does unless told otherwise.

    ``eps`` are the radii of the sweep by norm, in pixel units; ``also`` are printed beside any the user names.
    """

    images: int | None = Field(None, ge=1)
    eps: dict[Literal["linf", "l2"], tuple[str, ...]] = {"linf": ("8/255",), "l2": ("0.5",)}
    also: dict[Literal["linf", "l2"], tuple[str, ...]] = {}


class Config(_Section):
    """Everything that a run depends on."""

    name: str = "digits"
    seed: int = Field(0, ge=0, lt=2**63)
    data: Data = Data()
    network: Network = Network()
    resnet: Fit = Fit(epochs=30, lr=0.1, optimizer="sgd", decay="one-cycle", weight_decay=5e-4)
    sde: Sde = Sde()
    finetune: Fit = Fit(epochs=40, lr=1e-4)
    ensemble: Ensemble = Ensemble()
    attack: Attack = Attack()

    def to_yaml(self) -> str:
        """The resolved configuration, which ``--config FILE`` reads back."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _presets().iterdir() if path.name.endswith(".yaml"))


def _presets() -> Traversable:
    return files("neuralsde_ito.configs")  # beside the package in an editable install, inside it in a wheel


def load_config(
    source: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    assignments: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """Resolve a configuration: ``base`` < ``source`` < environment < assignments < overrides.

    Args:
        source: name of a preset, or path of a YAML file; default the preset ``digits`` if there is no ``base``.
        environ: variables ``ITO_SDE_SECTION__KEY``.
        assignments: ``"sde.omega=0.4"``; values are YAML.
        overrides: dotted key -> value.
        base: a configuration to begin with instead of a preset.

    Raises:
        ItoError: unknown preset, key (the nearest is offered) or value; one sentence that names it.
    """
    if source is not None or base is None:
        tree = _read(source or "digits")
    else:
        tree = base.model_dump(mode="json")
    changes: dict[str, Any] = {}
    for name, text in (environ or {}).items():
        if name.startswith(ENVIRONMENT):
            changes[name.removeprefix(ENVIRONMENT).lower().replace("__", ".")] = _value(name, text)
    for assignment in assignments:
        key, mark, text = assignment.partition("=")
        if not mark or not key.strip():
            raise ItoError(f"An assignment looks like sde.omega=0.4, got {shown(assignment)}.")
        changes[key.strip()] = _value(key, text)
    changes.update({key: value for key, value in (overrides or {}).items() if value is not None})
    for key, value in changes.items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ItoError(f"Unknown key {shown(key)}: {shown(section)} holds no keys.")
        node[leaf] = value
    return parse_config(tree)


def parse_config(tree: object) -> Config:
    """A configuration from nested mappings.

    Raises:
        ItoError: one sentence that names the key, the value it saw, and the mend.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ItoError(nearest("configuration key", place, _keys(Config))) from None
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        saw = "" if first["type"] == "value_error" else f", got {shown(first['input'])}"
        raise ItoError(f"{place or 'The configuration'}: {reason}{saw}.") from None


def differing_keys(one: Config, other: Config) -> list[str]:
    """Dotted keys in which two configurations differ."""
    a, b = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _read(source: str | Path) -> dict[str, Any]:
    path: Path | Traversable = Path(source)
    if not str(source).endswith((".yaml", ".yml")):
        if str(source) not in preset_names():
            raise ItoError(nearest("preset", str(source), preset_names()))
        path = _presets() / f"{source}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError:
        raise ItoError(f"There is no configuration file {shown(str(path))}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ItoError(f"The configuration file {str(path)!r} is not YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(tree, dict):
        raise ItoError(f"The configuration file {str(path)!r} must hold keys and values.")
    return tree


def _value(name: str, text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ItoError(f"The value of {shown(name)} is not YAML: {shown(text)}.") from None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out
