"""The pieces of work of one system: what is done with a block of test images."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from ..attacks.pgd import PGD
from ..attacks.suite import SuiteResult
from ..attacks.suite_run import SuiteSettings
from ..attacks.sweep import attack_sweep, surrogate_models
from ..attacks.targets import classify
from ..models.ensemble import ItoEnsemble
from ..models.recast import recast
from ..models.votes import decide, winners
from ..noise.keys import PathRange
from ..outcomes import ABSTAIN
from ..runs.build import recast_as
from ..studies.density import density_shift, path_sample
from ..validation import check_eps, parse_eps
from .declared import Norm
from .laboratory import Laboratory, System, sde_inputs
from .pieces import Block, Piece, Tensors, Work
from .protocols import STEPS, Protocol


class Maker:
    """Makes the pieces of one system: a ResNet of the paper at one omega, as it stands at this scale."""

    def __init__(self, lab: Laboratory, system: System) -> None:
        self.lab, self.system, self.seed = lab, system, lab.scale.seed
        self.members = system.members[: system.config.ensemble.members]

    # --- on one block of images ------------------------------------------------------------------------------

    def attack(self, protocol: Protocol, kind: str, norm: Norm, eps: str, block: Block) -> Piece:
        """The images of one attack: ``images``, ``index``, ``truth``."""
        lab, system = self.lab, self.system
        radius = check_eps(norm, parse_eps(eps))
        members = {"resnet": 0, "member": 1}.get(protocol.through, len(self.members))  # that it runs
        attack = protocol.attack(kind, norm, radius, system.std, lab.scale.eot)

        def make() -> Tensors:
            images, model = lab.images(block), system.resnet_network()
            if members:
                model = surrogate_models(system.ensemble(members), model, [protocol.through])[protocol.through]
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="A randomised model is attacked with one path")
                result = attack.run(model, images.x, images.y, self.seed, images.index)
            return {"images": result.images, "cost": torch.tensor([result.gradients, result.queries], device="cpu")}

        size = lab.size(block)
        paths = attack.eot if protocol.through in ("ensemble", "member") else max(1, members)
        title = f"{kind.upper()}, {protocol.title}, {norm} {eps}"
        inputs = {"attack": asdict(attack), "through": protocol.through}
        work = Work(size * attack.steps * paths)
        return self._piece("attack", title, inputs, block, make, work, members=members)

    def vote(self, block: Block, attacked: Piece | None = None) -> Piece:
        """The decisions on attacked images, or on clean ones: ``labels``, ``votes``; on clean ones also ``resnet``."""
        lab, system = self.lab, self.system
        ensemble = system.config.ensemble

        def make() -> Tensors:
            images = lab.images(block)
            x = images.x if attacked is None else lab.read(attacked)["images"].to(lab.device)
            prediction = self._ensemble().predict(x, self.seed, images.index)
            columns = {"labels": prediction.labels, "votes": prediction.votes, "invalid": prediction.invalid}
            return columns | {"resnet": classify(system.resnet_network(), x)}

        vote = {"inferences": ensemble.inferences, "rule": ensemble.rule}
        size = lab.size(block) * len(self.members) * ensemble.inferences
        title = "vote on clean images" if attacked is None else f"vote after {_short(attacked)}"
        needs = () if attacked is None else (attacked,)
        return self._piece("vote", title, vote, block, make, Work(queries=0.4 * size), needs)

    def untrained(self, block: Block) -> Piece:
        """The decisions of the recast ResNet before fine-tuning, on clean images: ``labels``."""
        lab, system = self.lab, self.system
        ensemble = system.config.ensemble

        def make() -> Tensors:
            images = lab.images(block)
            member = recast_as(system.config, system.resnet_network()).eval()
            voting = ItoEnsemble([member] * ensemble.members, ensemble.inferences, ensemble.rule)
            return {"labels": voting.predict(images.x, self.seed, images.index).labels}

        inputs = {**ensemble.model_dump(mode="json"), "sde": sde_inputs(system.config)}
        size = lab.size(block) * ensemble.members * ensemble.inferences
        work = Work(queries=0.4 * size)
        return self._piece("untrained", "vote before fine-tuning", inputs, block, make, work, members=0)

    def sweep(self, norm: Norm, texts: Sequence[str], block: Block) -> Piece:
        """The default attack at rising radii: for radius ``i`` ``denial-i``, ``evasion-i`` and ``resnet-i``."""
        lab = self.lab
        radii = [check_eps(norm, parse_eps(eps)) for eps in texts]
        attacks = [PGD(norm, eps, STEPS, eot=lab.scale.eot) for eps in radii]

        def make() -> Tensors:
            resnet = self.system.resnet_network()
            sweep = attack_sweep(
                self._ensemble(), resnet, lab.split(block), attacks, seed=self.seed, batch_size=lab.scale.block
            )
            tensors: Tensors = {}
            for level in range(len(radii)):
                tensors[f"denial-{level}"] = sweep.denial[level].labels
                tensors[f"evasion-{level}"] = sweep.evasion[level].labels
                tensors[f"resnet-{level}"] = sweep.worst_resnet(level)
            return tensors

        size, members, first = lab.size(block) * len(radii), len(self.members), attacks[0]
        gradients = first.steps * (2 * first.eot + members + 5)
        queries = 2.5 * 4 * members * self.system.config.ensemble.inferences
        title = f"PGD, default attack, {norm}, {len(radii)} radii"
        inputs = {"attacks": [asdict(attack) for attack in attacks]}
        return self._piece("sweep", title, inputs, block, make, Work(0.5 * size * gradients, size * queries))

    def suite(self, norm: Norm, block: Block, resnet: bool = False) -> Piece:
        """The suite at all radii, on the ensemble or on the original ResNet: ``denial-i`` and ``evasion-i``."""
        lab, scale = self.lab, self.lab.scale
        radii = tuple(check_eps(norm, parse_eps(eps)) for eps in scale.radii[norm])
        settings = SuiteSettings(norm, radii, scale.effort, seed=self.seed, batch_size=scale.block)

        def make() -> Tensors:
            images, network = lab.images(block), self.system.resnet_network()
            if resnet:
                _, channels, height, width = images.x.shape
                defender = ItoEnsemble([recast(network, 0.0, image_shape=(channels, height, width))], 1)
                suite = settings.suite(defender)
            else:
                defender = self._ensemble()
                suite = settings.suite(defender, network)
            results = replace(suite, state=lab.state(piece)).attack(defender, images, radii)
            return {key: value for i, result in enumerate(results) for key, value in _columns(i, result).items()}

        size = lab.size(block) * len(radii) * scale.effort
        work = Work(size * (500 if resnet else 400), size * (1500 if resnet else 500))
        inputs = {name: value for name, value in asdict(settings).items() if name != "batch_size"}
        title = f"suite on the {'ResNet' if resnet else 'ensemble'}, {norm}, {len(radii)} radii"
        inputs |= {} if resnet else self._vote_inputs()
        piece = self._piece("suite", title, inputs, block, make, work, members=0 if resnet else None)
        return piece

    def paths(self, block: Block, attacked: Piece | None = None) -> Piece:
        """What each inference of each voter says: ``winners``, int16 ``(inferences, voters, N)``."""
        lab, system, voters = self.lab, self.system, self.lab.scale.voters
        inferences = 20  # the paper's Figure 4 ends there

        def make() -> Tensors:
            images = lab.images(block)
            x = images.x if attacked is None else lab.read(attacked)["images"].to(lab.device)
            quick = system.ensemble(voters).quick(x)
            paths = PathRange(self.seed, "report", images.index, 0, voters * inferences)
            with torch.no_grad():
                said = winners(quick.path_logits(x, paths))  # (inferences * voters, N)
            return {"winners": said.to(torch.int16).unflatten(0, (inferences, voters))}

        title = f"{voters} x {inferences} inferences " + ("on clean images" if attacked is None else "under attack")
        needs = () if attacked is None else (attacked,)
        work = Work(queries=lab.size(block) * voters * inferences)
        inputs = {"voters": voters, "inferences": inferences}
        return self._piece("paths", title, inputs, block, make, work, needs, members=voters)

    def density(self, block: Block, attacked: Piece) -> Piece:
        """How far the attack moves the law of the output, see `density_shift`: a column for each statistic."""
        lab, members = self.lab, len(self.members)
        count = -(-lab.scale.density.paths // members) * members  # each member has as many

        def make() -> Tensors:
            images, ensemble = lab.images(block), self._ensemble()
            x = lab.read(attacked)["images"].to(lab.device)
            # Paths of their own: common noise would hide that the two samples are of one law.
            clean = path_sample(ensemble, images.x, count, self.seed, images.index)
            moved = path_sample(ensemble, x, count, self.seed, images.index, first=count)
            shift = density_shift(clean, moved, seed=self.seed, members=members)
            return {name: value for name, value in vars(shift).items() if isinstance(value, Tensor)}

        work = Work(queries=2 * lab.size(block) * count)
        title = f"density after {_short(attacked)}"
        return self._piece("density", title, {"paths": count}, block, make, work, (attacked,))

    # --- on the whole split ------------------------------------------------------------------------------------

    def gallery(self, votes: Sequence[Piece], blocks: Sequence[Block], most: int = 8) -> Piece:
        """Full votes on the clean images of which the ensemble is least sure, those on which it abstains first.

        Its columns are ``index``, ``truth`` and ``labels`` ``(K,)``, the members' labels ``members`` ``(members, K)``,
        and ``votes`` ``(members, K, classes)``.
        """
        lab, system = self.lab, self.system

        def make() -> Tensors:
            parts = [lab.read(vote) for vote in votes]
            labels, index, truth = (torch.cat([part[name] for part in parts]) for name in ("labels", "index", "truth"))
            shares = torch.cat([part["votes"] for part in parts], 1).sum(0).double()
            lead = (shares / shares.sum(1, keepdim=True).clamp_min(1)).topk(2).values
            unsure = (lead[:, 0] - lead[:, 1]) - 2.0 * (labels == ABSTAIN)
            chosen = unsure.argsort(stable=True)[:most]
            x = torch.cat([lab.images(block).x.cpu() for block in blocks])[chosen].to(lab.device)
            prediction = self._ensemble().predict(x, self.seed, index[chosen].to(lab.device), full=True)
            ensemble = system.config.ensemble
            members = [decide(vote[None], ensemble.rule, ensemble.inferences) for vote in prediction.votes]
            columns = {"labels": prediction.labels, "votes": prediction.votes, "members": torch.stack(members)}
            return {**columns, "index": index[chosen], "truth": truth[chosen]}

        work = Work(queries=most * len(self.members) * system.config.ensemble.inferences)
        needs = (system.resnet, *self.members, *votes)
        inputs = {**self._vote_inputs(), "seed": self.seed, "most": most}
        title = f"full votes on the least certain images, {system.title}"
        return Piece("gallery", title, inputs, needs, make, work, system.config.network.arch, system.title)

    # --- what they share -------------------------------------------------------------------------------------

    def _ensemble(self) -> ItoEnsemble:
        return self.system.ensemble(len(self.members))

    def _vote_inputs(self) -> dict[str, Any]:
        ensemble = self.system.config.ensemble
        return {"vote": {"inferences": ensemble.inferences, "rule": ensemble.rule}}

    def _piece(
        self,
        kind: str,
        title: str,
        inputs: dict[str, Any],
        block: Block,
        make: Callable[[], Tensors],
        work: Work,
        needs: tuple[Piece, ...] = (),
        members: int | None = None,
    ) -> Piece:
        """A piece on a block that needs the ResNet and the first ``members`` members; None: those of the ensemble."""

        def with_names() -> Tensors:
            images = self.lab.images(block)
            return {**make(), "index": images.index, "truth": images.y}

        if kind == "sweep":
            inputs = inputs | self._vote_inputs()
        # A data set that stands for two of the paper has one name here, so that its work is done once.
        images = {"of": self.lab.fingerprint(block.data), "count": block.count, "block": self.lab.scale.block}
        inputs = {**inputs, "seed": self.seed, "images": {**images, "number": block.number}}
        count = len(self.members) if members is None else members
        needs = (self.system.resnet, *self.system.members[:count], *needs)
        title = f"{title}, images {block.number * self.lab.scale.block} on, {self.system.title}"
        arch, title_of = self.system.config.network.arch, self.system.title
        return Piece(kind, title, inputs, needs, with_names, work, arch, title_of, block=block.number)


def _short(piece: Piece) -> str:
    """The title of a piece without its images and networks."""
    return piece.title.partition(", images ")[0]


def _columns(level: int, result: SuiteResult) -> Tensors:
    return {
        f"denial-{level}": result.denial.labels,
        f"evasion-{level}": result.evasion.labels,
        f"counts-{level}": torch.tensor(
            [result.attacked, result.fooled, result.queries, result.gradients], device="cpu"
        ),
    }
