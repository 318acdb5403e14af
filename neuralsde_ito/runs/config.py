"""The configuration of a run: typed and frozen; unknown keys are refused."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..names import ADVERSARIES, ARCHITECTURES, AUGMENTATIONS, DATA_SETS, RULES
from ..sde.schedules import Schedule
from ..sde.solvers import check_solver
from ..validation import ItoError, check_eps, nearest, one_of, parse_eps, shown

ENVIRONMENT = "ITO_SDE_"  # ITO_SDE_SDE__OMEGA=0.4 sets sde.omega


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Data(_Section):
    """Which images; see `neuralsde_ito.data.load_data`."""

    name: str = Field("digits", description="digits, cifar10, cifar100 or imagefolder.")
    path: str | None = Field(None, description="Folder of the images, for CIFAR and image folders.")
    size: int | None = Field(None, ge=4, description="Height and width to which an image folder's images are scaled.")
    augment: str | None = Field(None, description="Augmentation in training; by default the one for this data.")
    train_limit: int | None = Field(None, ge=1, description="Number of training images, a fixed choice; null for all.")
    test_limit: int | None = Field(None, ge=1, description="Number of test images, a fixed choice; null for all.")

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if value in DATA_SETS:
            return value
        from ..data import DATASETS  # it imports torch, and may hold rows of the caller's

        return one_of("data set", value, DATASETS)

    @field_validator("augment")
    @classmethod
    def _augment(cls, value: str | None) -> str | None:
        return None if value is None else one_of("augmentation", value, AUGMENTATIONS)


class Network(_Section):
    """The ResNet; see `neuralsde_ito.models.resnets.load_resnet`. The data give the number of classes and channels."""

    arch: str = Field("resnet8", description="Architecture, a name in ARCHITECTURES.")
    weights: str | None = Field(None, description="File or torchvision name of trained weights; null: train first.")
    mean: tuple[float, ...] | None = Field(None, description="Mean of the normalisation, a number a channel.")
    std: tuple[float, ...] | None = Field(None, description="Standard deviation of the normalisation, likewise.")

    @field_validator("arch")
    @classmethod
    def _arch(cls, value: str) -> str:
        return one_of("architecture", value, ARCHITECTURES)


class Adversary(_Section):
    """How a training perturbs its images; see `neuralsde_ito.runs.adversarial`."""

    method: str = Field("none", description="none, n-fgsm, pgd or trades: how images are perturbed, if so.")
    norm: Literal["linf", "l2"] = Field("linf", description="Norm of the perturbation.")
    eps: str | float = Field("8/255", description="Its radius in pixel units.")
    steps: int | None = Field(None, ge=1, description="Gradients for a perturbation; null: 10, and 1 for n-fgsm.")
    step_size: str | float | None = Field(
        None, description="Length of a step in pixel units; null: eps / 4, and eps for n-fgsm."
    )
    start: float | None = Field(
        None, ge=0, description="Radius of the random start, in eps; null: 1; 2 for n-fgsm, 0.03 for trades."
    )
    beta: float = Field(6.0, ge=0, description="Weight of the divergence in the loss of trades.")

    @field_validator("method")
    @classmethod
    def _method(cls, value: str) -> str:
        return one_of("adversary", value, ADVERSARIES)

    @model_validator(mode="after")
    def _possible(self) -> Adversary:
        check_eps(self.norm, self.eps)
        if self.step_size is not None and not parse_eps(self.step_size, "step_size") > 0:
            raise ItoError(f"step_size must be above 0, got {shown(self.step_size)}.")
        if self.method == "n-fgsm" and self.steps not in (None, 1):
            raise ItoError(f"n-fgsm is one step, got steps={self.steps}; take pgd for more.")
        return self

    @property
    def radius(self) -> float:
        """`eps` as a number."""
        return check_eps(self.norm, self.eps)

    @property
    def iterations(self) -> int:
        """`steps`, or what the method takes by default."""
        return self.steps or (1 if self.method == "n-fgsm" else 10)

    @property
    def length(self) -> float:
        """`step_size` as a number, or what the method takes by default."""
        if self.step_size is not None:
            return parse_eps(self.step_size)
        return self.radius if self.method == "n-fgsm" else self.radius / 4

    @property
    def start_share(self) -> float:
        """`start`, or what the method takes by default."""
        return self.start if self.start is not None else {"n-fgsm": 2.0, "trades": 0.03}.get(self.method, 1.0)


class Fit(_Section):
    """How weights are trained; see `neuralsde_ito.runs.training`."""

    epochs: int = Field(ge=0, description="Passes over the training images.")
    lr: float = Field(gt=0, description="Learning rate; the largest one if it decays.")
    optimizer: Literal["adam", "sgd"] = Field("adam", description="adam, or sgd with Nesterov momentum 0.9.")
    decay: Literal["constant", "one-cycle"] = Field("constant", description="How the learning rate changes.")
    weight_decay: float = Field(0.0, ge=0, description="L2 penalty in the optimizer.")
    batch_size: int = Field(128, ge=1, description="Images of a step.")
    adversary: Adversary = Field(Adversary(), description="Adversarial training.")
    awp: float = Field(0.0, ge=0, description="Adversarial weight perturbation: its length relative to the weights'.")
    average: float = Field(0.0, ge=0, lt=1, description="Decay of the weights' moving average, the result; 0: none.")
    held_out: int = Field(0, ge=0, description="Training images left out, which choose the best epoch; 0: the last.")
    consistency: float = Field(0.0, ge=0, description="Weight of the consistency between two paths of an image.")
    precision: Literal["auto", "native", "float32", "bfloat16"] = Field(
        "auto",
        description="Of convolutions in training; auto: bfloat16 on an NVIDIA or AMD GPU that has instructions for it, "
        "float32 elsewhere; native: bfloat16 also on such a CPU.",
    )

    @model_validator(mode="after")
    def _one_loss(self) -> Fit:
        if self.consistency and self.adversary.method != "none":
            raise ItoError("consistency is a loss of its own: with it take adversary.method none.")
        return self


class Sde(_Section):
    """How blocks become SDEs and how these are solved; see `neuralsde_ito.models.recast.recast`."""

    omega: float = Field(0.2, ge=0, description="Strength of the noise; 0 is the ResNet without noise.")
    schedule: str = Field("inverse-time", description="How the noise depends on time and state.")
    solver: str = Field("euler", description="A name in SOLVERS; ode:... only with omega 0.")
    steps: int = Field(1, description="Solver steps a block, a power of two.")
    horizon: float | None = Field(None, gt=0, description="End of time; null: one unit a block.")
    checkpoint: bool = Field(False, description="Whether gradients save memory by computing steps twice.")
    input_sigma: float = Field(0.0, ge=0, description="Standard deviation of noise on the image, in pixel units.")

    @model_validator(mode="after")
    def _solvable(self) -> Sde:
        Schedule(self.omega, self.schedule)
        check_solver(self.solver, self.omega, self.steps)
        return self


class Ensemble(_Section):
    """How many networks vote, and by which rule; see `neuralsde_ito.models.ensemble.ItoEnsemble`."""

    members: int = Field(5, ge=1, description="Networks, each fine-tuned with its own order and noise.")
    inferences: int = Field(20, ge=1, description="Inferences of each member for one decision.")
    rule: str = Field("hierarchical", description="hierarchical or flat: how votes become a label.")
    paths_per_call: int = Field(4, ge=1, description="Paths of each member that a call of the ensemble averages.")

    @field_validator("rule")
    @classmethod
    def _rule(cls, value: str) -> str:
        return one_of("rule", value, RULES)


class Attack(_Section):
    """What ``ito-sde attack`` does by default."""

    images: int | None = Field(None, ge=1, description="Test images that are attacked; null for all.")
    eps: dict[Literal["linf", "l2"], tuple[str, ...]] = Field(
        {"linf": ("8/255",), "l2": ("0.5",)}, description="Radii by norm, in pixel units, if the user names none."
    )
    also: dict[Literal["linf", "l2"], tuple[str, ...]] = Field(
        {}, description="More radii by norm, attacked whether or not the user names some."
    )


class Config(_Section):
    """Everything that a run depends on."""

    name: str = Field("digits", description="Begins the name of a new run.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, order of images, augmentation and noise.")
    data: Data = Field(Data(), description="Which images.")
    network: Network = Field(Network(), description="The ResNet.")
    resnet: Fit = Field(
        Fit(epochs=30, lr=0.1, optimizer="sgd", decay="one-cycle", weight_decay=5e-4),
        description="Training of the ResNet, if network.weights names none.",
    )
    sde: Sde = Field(Sde(), description="The SDE and its solver.")
    finetune: Fit = Field(Fit(epochs=40, lr=1e-4), description="Fine-tuning of each member through the SDE.")
    ensemble: Ensemble = Field(Ensemble(), description="Members and vote.")
    attack: Attack = Field(Attack(), description="Defaults of ito-sde attack.")

    @model_validator(mode="after")
    def _paths_differ(self) -> Config:
        if not self.sde.input_sigma:
            trained = self.network.weights is None
            for phase, quiet in (("resnet", trained), ("finetune", not self.sde.omega)):
                if quiet and getattr(self, phase).consistency:
                    raise ItoError(f"{phase}.consistency compares paths of noise, and there is none: sde.input_sigma.")
        return self

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; ``--config FILE`` reads it."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def preset_names() -> list[str]:
    """The names of the presets that come with the package."""
    return sorted(path.name.removesuffix(".yaml") for path in _presets().iterdir() if path.name.endswith(".yaml"))


def _presets() -> Traversable:
    return files("neuralsde_ito.configs")  # beside the package in an editable install, in it in a wheel


def load_config(
    source: str | Path | None = None,
    environ: Mapping[str, str] | None = None,
    assignments: Iterable[str] = (),
    overrides: Mapping[str, Any] | None = None,
    base: Config | None = None,
) -> Config:
    """Resolve a configuration from all of its sources.

    It begins with ``source``, or without one with ``base``. Then ``environ`` replaces values, then ``assignments``,
    then ``overrides``.

    Args:
        source: name of a preset, or path of a YAML file; by default the preset ``digits`` if there is no ``base``.
        environ: environment variables ``ITO_SDE_SECTION__KEY``, with YAML as values; all others are ignored.
        assignments: such as ``"sde.omega=0.4"``; the values are YAML.
        overrides: dotted key -> value; None has no effect.
        base: a configuration to begin with instead of a preset.

    Raises:
        ItoError: unknown preset, key (the nearest known one is offered) or value; one sentence that names it.
    """
    if source is not None or base is None:
        tree = _read(source or "digits")
    else:
        tree = base.model_dump(mode="json")
    changes: dict[str, Any] = {}
    for name, text in (environ or {}).items():
        if name.startswith(ENVIRONMENT):
            changes[name.removeprefix(ENVIRONMENT).lower().replace("__", ".")] = _value(name, text)
    changes |= assigned(assignments)
    changes.update({key: value for key, value in (overrides or {}).items() if value is not None})
    for key, value in changes.items():
        node = tree
        *sections, leaf = key.split(".")
        for section in sections:
            node = node.setdefault(section, {})
            if not isinstance(node, dict):
                raise ItoError(f"Unknown key {shown(key)}: {shown(section)} is a value, not a section.")
        node[leaf] = value
    return parse_config(tree)


def assigned(assignments: Iterable[str]) -> dict[str, Any]:
    """Dotted keys and values of assignments such as ``"sde.omega=0.4"``; the values are YAML.

    Raises:
        ItoError: one is no assignment, or its value is not YAML.
    """
    changes = {}
    for assignment in assignments:
        key, mark, text = assignment.partition("=")
        if not mark or not key.strip():
            raise ItoError(f"An assignment looks like sde.omega=0.4, got {shown(assignment)}.")
        changes[key.strip()] = _value(key, text)
    return changes


def parse_config(tree: object) -> Config:
    """A configuration from nested mappings.

    Raises:
        ItoError: one sentence with the key, the value and what is wrong with it.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            raise ItoError(nearest("configuration key", key, _keys(Config))) from None
        reason = first["msg"].removeprefix("Value error, ").rstrip(".")
        value = "" if first["type"] == "value_error" else f", got {shown(first['input'])}"
        raise ItoError(f"{key or 'The configuration'}: {reason}{value}.") from None


def differing_keys(one: Config, other: Config) -> list[str]:
    """The dotted keys in which two configurations differ, sorted."""
    a, b = _flat(one.model_dump(mode="json")), _flat(other.model_dump(mode="json"))
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def _read(source: str | Path) -> dict[str, Any]:
    """The content of a preset or a YAML file."""
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
    """A value that was typed as YAML; ``name`` is the key or variable, for the message."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        raise ItoError(f"The value of {shown(name)} is not YAML: {shown(text)}.") from None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterable[str]:
    """All dotted keys of a configuration."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from _keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return out
