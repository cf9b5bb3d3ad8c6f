"""What benchmarks/fidelity.py builds itself: its schedules are the library's, its tables say what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from alphatoken_loss import AlphaToken, AlphaTokenConfig

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    """The scripts as modules, as a script of their folder sees them."""
    import agreement
    import fidelity
    import small

    yield {"fidelity": fidelity, "agreement": agreement, "small": small}


@pytest.fixture(scope="module")
def run(scripts):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scripts["small"], "BLOCKS", 2)
        base = scripts["small"].pretrained(0, seed=0)
    fisher = scripts["fidelity"].Fishers(base, {2: 1}, 2).sets[2][0].factored()
    return scripts["small"].Run(base, fisher, learning_rate=3e-3, seed=0)


@pytest.mark.slow
def test_schedules_are_the_librarys(scripts, run, monkeypatch):
    monkeypatch.setattr(scripts["fidelity"], "REFRESHED", ())  # nothing is compared here
    refresh = scripts["fidelity"].Refresh(run)
    keepers = {}
    for name, (size, every, decay) in refresh.schedules.items():
        options = {"target_every": every, "target_parts": size // 8, "target_decay": decay}
        config = AlphaTokenConfig(estimator="difference", stability_weight=0, **options)
        keepers[name] = AlphaToken(run.model, target=run.validation[: size // 8], config=config)
    for step, batch in run.steps(4):
        refresh.follow(step, batch, scripts["agreement"].Figures())
        for name, keeper in keepers.items():
            with keeper(batch):
                run.model(**batch, use_cache=False)
            for parameter, gradient in keeper.target.gradients.items():
                kept = refresh.targets[name].gradients[parameter]
                torch.testing.assert_close(kept, gradient, rtol=1e-4, atol=1e-7, msg=f"{name}, step {step}")


def test_joined_targets_are_the_target_of_all(scripts, run):
    batches = run.validation[:3]
    batches[1]["labels"][:, 20:] = -100  # so that sets do not weigh the same
    together = scripts["small"].joined([run.target([batch]) for batch in batches])
    whole = run.target(batches)
    assert together.tokens == whole.tokens
    for name, gradient in whole.gradients.items():
        torch.testing.assert_close(together.gradients[name], gradient, rtol=1e-4, atol=1e-7, msg=name)


def test_figures_are_means_over_samples(scripts):
    figures = scripts["agreement"]
    torch.manual_seed(0)
    counted = torch.rand(4, 9) < 0.7
    pairs = [(torch.randn(4, 9), torch.randn(4, 9)) for _ in range(3)]
    merged = figures.Figures()
    for found, wanted in pairs:
        one = figures.Figures(3e-3)
        one.add(("age", "2 steps old", "adaptation"), 20, found, wanted, counted)
        one.add(("age", "2 steps old", "adaptation"), 46, found, torch.zeros(4, 9), counted)  # nothing to rank by
        merged.merge(one)
    at = merged.results()["0.003"]["age"]["2 steps old"]["adaptation"]
    expected = torch.tensor([spearmanr(f[counted], w[counted]).statistic for f, w in pairs])
    assert set(at) == {"20", "all"} and at["20"] == at["all"] and at["all"][3] == 3
    assert at["all"][:2] == pytest.approx([expected.mean().item(), expected.std().item()], abs=1e-4)
    same = figures.same_half(torch.tensor([1.0, 2, 3, 4]), torch.tensor([4.0, 3, 2, 1]))
    assert same == 0.5  # of four, three reach the lower median: 2, 3, 4, and here the first three
