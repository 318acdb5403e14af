"""What is reproduced: the items and scales that the files of ``configs/reproduce`` declare."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from importlib.resources import files
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from ..runs.config import Config, load_config
from ..validation import ItoError, check_eps, one_of

ITEMS = (*(f"table{i}" for i in range(1, 7)), *(f"figure{i}" for i in range(1, 6)), "density")
SCALES = ("smoke", "small", "paper")
DataName = Literal["cifar10", "imagenet"]
Norm = Literal["linf", "l2"]


class _Declared(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Cell(_Declared):
    """One situation of the paper, and its numbers in per cent; None where the paper gives none.

    Attributes:
        data, network, omega: the model.
        norm, eps, attack: the attack; without ``norm`` the images are clean. ``eps`` is a text in pixel units.
        correct, correct_abstained: of the ensemble.
        resnet: correct, of the original ResNet.
    """

    data: DataName = "cifar10"
    network: str
    omega: float = 0.2
    norm: Norm | None = None
    eps: str | None = None
    attack: Literal["pgd", "fgsm"] = "pgd"
    correct: float | None = None
    correct_abstained: float | None = None
    resnet: float | None = None


class Point(_Declared):
    """A point of a figure: a number of the paper in per cent, at one eps; ``omega`` None for other people's systems."""

    norm: Norm
    eps: str
    omega: float | None = None
    correct: float


class Item(_Declared):
    """A table or a figure of the paper.

    Attributes:
        title: its heading.
        kind: how its numbers are made, a name in `items.KINDS`.
        states, open, chosen: what the paper states, what it leaves open, and what is chosen here and why.
        data, network: of figures; cells have their own.
        cells: of tables.
        quotes: numbers in per cent that nothing here measures, by what they are.
        norms, omegas, points, quoted: of curves.
        attacked, eps: of Figure 4, L-inf.
    """

    title: str
    kind: Literal["benign", "attacked", "gallery", "curves", "votes-and-omega", "density"]
    states: str
    open: str
    chosen: str
    data: DataName = "cifar10"
    network: str = "ResNet-50"
    cells: tuple[Cell, ...] = ()
    quotes: dict[str, float] = {}
    norms: tuple[Norm, ...] = ()
    omegas: tuple[float, ...] = ()
    points: tuple[Point, ...] = ()
    quoted: tuple[Point, ...] = ()
    attacked: str = "8/255"
    eps: tuple[str, ...] = ()

    @property
    def data_names(self) -> set[str]:
        """The data sets that the item needs."""
        return {cell.data for cell in self.cells} or {self.data}


class Source(_Declared):
    """A data set of the paper at one scale: for each network of the paper the preset that stands for it."""

    presets: dict[str, str]


class Density(_Declared):
    """How the law of the output is measured: on so many test images, along so many paths, at these L-inf eps."""

    images: int = Field(ge=1)
    paths: int = Field(ge=10)
    eps: tuple[str, ...]


class Scale(_Declared):
    """How large the work is.

    Attributes:
        stand_in: a sentence: what stands in for what.
        needs: what the user must bring: ``data``, ``weights``.
        data: the paper's data sets that there are at this scale; other items are marked as needing them.
        set: dotted keys of the presets' configuration, and their values here.
        benign: test images of tables without attack; None: all.
        attacked: test images under attack.
        block: of them in one piece of work.
        eot: paths that a gradient averages, where an attack averages.
        effort: of the suite.
        voters: members of the left part of Figure 4; other items use the first ``ensemble.members``.
        density: of the item of that name.
        radii: by norm, in pixel units as texts, rising: those of the suite, and of figures.
        omegas: of the right part of Figure 4, and of the density.
        seed: of everything random.
    """

    stand_in: str
    needs: tuple[Literal["data", "weights"], ...] = ()
    data: dict[DataName, Source]
    set: dict[str, Any] = {}
    benign: int | None = Field(None, ge=1)
    attacked: int = Field(ge=1)
    block: int = Field(ge=1)
    eot: int = Field(ge=1)
    effort: float = Field(gt=0)
    voters: int = Field(ge=3)
    density: Density
    radii: dict[Norm, tuple[str, ...]]
    omegas: tuple[float, ...]
    seed: int = Field(0, ge=0)

    @field_validator("radii")
    @classmethod
    def _rising(cls, value: dict[Norm, tuple[str, ...]]) -> dict[Norm, tuple[str, ...]]:
        return {norm: tuple(sorted(radii, key=partial(_radius, norm))) for norm, radii in value.items()}

    def config(self, data: DataName, network: str, changes: Mapping[str, Any]) -> Config:
        """The configuration of a network of the paper at this scale, with the user's ``changes`` (dotted keys)."""
        return load_config(self.data[data].presets[network], overrides={**self.set, **changes})


def _radius(norm: str, text: str) -> float:
    return check_eps(norm, text)


Kind = TypeVar("Kind", bound=_Declared)


def load_item(name: str) -> Item:
    """The item of that name.

    Raises:
        ItoError: there is none; the nearest name is offered.
    """
    return _read(Item, one_of("item", name, ITEMS))


def load_scale(name: str) -> Scale:
    """The scale of that name.

    Raises:
        ItoError: there is none; the nearest name is offered.
    """
    return _read(Scale, one_of("scale", name, SCALES))


def _read(kind: type[Kind], name: str) -> Kind:
    text = (files("neuralsde_ito.configs") / "reproduce" / f"{name}.yaml").read_text(encoding="utf-8")
    try:
        return kind.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ItoError(f"configs/reproduce/{name}.yaml: {where}: {first['msg']}.") from None
