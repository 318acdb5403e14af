"""Certificates under attack, by hand: ``python tests/certificates/under_attack.py RUN [--n 10000] [--limit 100]``.

The suite attacks each image inside its certified radius. Then a smoothed vote of so many fresh samples decides on what
it found: a wrong answer would contradict the certificate (or be the error ``alpha`` at work).
"""

from __future__ import annotations

import argparse

import neuralsde_ito as ito
from neuralsde_ito.runs.build import load_dataset


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run")
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--limit", type=int, default=100)
    parser.add_argument("--radius", type=float, action="append")
    words = parser.parse_args()
    run = ito.Run.open(words.run)
    ensemble, test = run.ensemble(), load_dataset(run.config, train_limit=1).test.first(words.limit)
    index, x, y = next(test.batches(words.limit))
    certificate = ito.certify(ensemble, x, n=words.n, index=index)
    for radius in words.radius or [0.5 * certificate.sampling.sigma, certificate.sampling.sigma]:
        rows = certificate.holds(y, radius).nonzero()[:, 0]
        if not len(rows):
            print(f"radius {radius:g}: no image is certified")
            continue
        suite = ito.SuiteSettings("l2", (radius,)).suite(ensemble)
        images = ito.attacks.images.Images(x[rows], y[rows], index[rows])
        (found,) = suite.attack(ensemble, images, [radius])
        for goal, candidates in (("denial", found.denial.images), ("evasion", found.evasion.images)):
            attacked = ito.certify(ensemble, candidates, n=words.n, index=index[rows], beta=0.0, seed=1)
            votes = attacked.votes.gather(1, y[rows, None])[:, 0] / attacked.drawn
            fooled, least = int((votes <= 0.5).sum()), float(votes.amin())
            few = ensemble.predict(candidates, seed=2, index=index[rows]).labels
            print(
                f"radius {radius:g}, {goal}: {len(rows)} certified images attacked, {fooled} fooled by a vote of "
                f"{words.n:,} (the smallest share of the right class is {100 * least:.1f} %); a vote of "
                f"{ensemble.inferences} is wrong or abstains on {int((few != y[rows]).sum())}"
            )


if __name__ == "__main__":
    main()
