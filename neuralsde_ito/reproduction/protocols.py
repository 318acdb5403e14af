"""How the paper's numbers may have been measured: every weak protocol that its silence allows, each with its reason.

The paper states no steps, no step size, no expectation over the noise, nor what is differentiated. Each protocol below
is a choice that a careful author can make without noticing, and that may leave more images right than an honest attack.
Where an attack averages over the noise, an image leaves it when it is fooled beyond luck, as in the default attack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..attacks.pgd import PGD

STEPS = 20  # of PGD: the column of the Madry toolbox's README that the paper quotes


@dataclass(frozen=True)
class Protocol:
    """One way to attack.

    Attributes:
        name: in files and records.
        title: in tables.
        why: one line: why the paper's silence allows it.
        through: the network whose gradients are taken, a name in `neuralsde_ito.attacks.sweep.SURROGATES`.
        averages: whether a gradient averages over the noise.
        random_start, stop: as in `PGD`.
        radius: from eps and the standard deviation of the normalisation to the radius that is attacked.
        one_step: whether the protocol makes sense with one step, as FGSM.
    """

    name: str
    title: str
    why: str
    through: str = "ensemble"
    averages: bool = True
    random_start: bool = True
    stop: bool = False
    radius: Callable[[float, float], float] = lambda eps, std: eps
    one_step: bool = True

    def attack(self, kind: str, norm: str, eps: float, std: float, eot: int) -> PGD:
        """The attack.

        Args:
            kind: ``pgd`` or ``fgsm``.
            norm, eps: the ball that the table names, in pixel units.
            std: of the normalisation, the mean over channels.
            eot: paths that a gradient averages, where the protocol averages.
        """
        eps = self.radius(eps, std)
        eps = min(eps, 1.0) if norm == "linf" else eps  # 1 is the whole range of a pixel
        if kind == "fgsm":
            one = PGD(norm, eps, 1, eot=eot if self.averages else 1, random_start=False, keep="last", stop=False)
            return one if eps == 0 else replace(one, step_size=eps)
        return PGD(norm, eps, STEPS, eot=eot if self.averages else 1, random_start=self.random_start, stop=self.stop)


PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "one-path",
            "one path a gradient",
            "an attack from a library calls the model once a step, and each call draws new noise",
            averages=False,
        ),
        Protocol(
            "one-member",
            "gradient of one member",
            "gradients through 20 networks are dear, and the vote itself has none",
            through="member",
            stop=True,
        ),
        Protocol(
            "transfer-stops",
            "transfer from the ResNet, stops at its border",
            "images made for the original network, by an attack that ends where that network is fooled",
            through="resnet",
            stop=True,
            one_step=False,
        ),
        Protocol(
            "transfer",
            "transfer from the ResNet, all steps",
            "images made for the original network: the same images for every model of a table",
            through="resnet",
        ),
        Protocol(
            "no-start",
            "no random start",
            "the Madry toolbox's tables have none",
            random_start=False,
            one_step=False,
            stop=True,
        ),
        Protocol(
            "eps-normalised",
            "eps in normalised units",
            "an attack behind the normalisation that does not convert eps: the ball is std times as large",
            radius=lambda eps, std: eps * std,
            stop=True,
        ),
        Protocol(
            "eps-wrong-way",
            "eps converted the wrong way round",
            "behind the normalisation eps must be divided by std; multiplied, the ball is std^2 times as large",
            radius=lambda eps, std: eps * std**2,
            stop=True,
        ),
        Protocol(
            "eps-divided",
            "eps divided by std, in pixels",
            "eps is converted, but the attack acts before the normalisation: a ball 1/std times as large",
            radius=lambda eps, std: eps / std,
            stop=True,
        ),
        Protocol(
            "noise-off",
            "noise off in the gradient",
            "in eval mode noise is often switched off, and the attack then sees the members without noise",
            through="noise-free",
        ),
    )
}

# A way to count, not an attack: on the images of the default attack.
ABSTENTIONS = Protocol(
    "abstentions-right",
    "default attack, abstentions counted as right",
    "the paper reports correct + abstention beside accuracy; under an attack that stops at an abstention",
)
DEFAULT = Protocol(
    "default",
    "default attack of this software",
    "ito-sde attack: the worst case over four sources of gradients, judged on fresh noise",
)
SUITE = Protocol("suite", "suite", "ito-sde suite: attack after attack, each on the images that the last ones left")
CURVES = ("transfer-stops", "one-path")  # the weak protocols that figures show
