"""One way to train, and the tables of all that are compared: a new rival or preset becomes a line here, and is then
part of every run, table and curve.

Names carry what is compared: "no noise: ", "NF4: " and "DPO: " before a name are experiments of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from alphatoken_loss import AlphaTokenConfig


@dataclass(frozen=True)
class Setting:
    """One way to train.

    Args:
        selection (`str`): all; mixed or only (validation examples, in each batch or alone); a key of
            `training.SELECTIONS` (random, oracle, rho1, log_ratio) or of `rivals.RULES` (eaft, dft, stm); "values" is
            AlphaToken's, by `config`.
        kl (`float`): coefficient of KL(reference || policy) on response tokens.
        kl_to_base (`bool`): the KL's reference is the base also where the selection has a reference of its own.
        l2 (`float`): coefficient of the squared Frobenius norm of the adapters' deltas s B A.
        task (`str`): "sft" or "dpo".
        precondition (`bool`): AlphaToken values the step that Adam will take.
        rho_of (`str`): "data": rho as `shared_gain` tells of the first 64 training rows; "share": by the share alone.
        noise (`bool`): training answers have boilerplate, junk and corrupted tokens (toy world).
        exchanged (`float`): share of training answers that are those of other rows (toy world).
        loss_type (`str`): of `dpo_loss`.
        smoothing (`float`): share of flipped preferences that the loss reckons with.
        likelihood (`float`): coefficient of the chosen answers' loss beside DPO's.
        flipped (`float`): share of training pairs whose labels are exchanged.
    """

    name: str
    selection: str = "all"
    config: AlphaTokenConfig | None = None
    kl: float = 0.0
    kl_to_base: bool = False
    l2: float = 0.0
    task: str = "sft"
    precondition: bool = False
    rho_of: str = ""
    noise: bool = True
    exchanged: float = 0.0
    nf4: bool = False
    loss_type: str = "sigmoid"
    smoothing: float = 0.0
    likelihood: float = 0.0
    flipped: float = 0.0


RATES = {"sft": (3e-3, 6e-4), "dpo": (1e-3, 3e-4, 1e-4)}  # of the toy world, the hottest first
SEEDS = 5


FULL = AlphaTokenConfig.best(estimator="difference")  # the difference estimator, all of the target before every step
BEST = AlphaTokenConfig.best()
BEST_FOR_PAIRS = AlphaTokenConfig.best(pairs=True)


def values(name: str, **options: object) -> Setting:
    """AlphaToken with these settings; further fields of `Setting` as in `values("...", setting={"kl": 0.3})`."""
    more: dict[str, object] = options.pop("setting", {})  # type: ignore[assignment]
    return Setting(name, "values", AlphaTokenConfig(**options), **more)  # type: ignore[arg-type]


_PATH: dict[str, object] = {"estimator": "path", "path_start": True, "path_kl": 0.6}


UNMASKED = values("all tokens, from theta*, KL to it", **{**_PATH, "rho": 1.0})  # what is left of the preset
RENEWED = values("path, theta* renewed, best() else", **{**_PATH, "path_every": 20})
SMOOTHED = values("path, smoothed, best() else", **{**_PATH, "smoothing": 3})  # chosen by values of neighbours too
SMOOTHED_MORE = values("path, smoothed, rho 0.7, best() else", **{**_PATH, "smoothing": 3, "rho": 0.7})
MORE = values("path, rho 0.7, best() else", **{**_PATH, "rho": 0.7})
OF_ORACLE = Setting("oracle, from theta*, KL to it", "oracle", BEST)  # the preset, but with the oracle's mask
UNMASKED_RENEWED = values("all tokens, theta* renewed, KL to it", **{**_PATH, "rho": 1.0, "path_every": 20})
OF_DATA = Setting("path, best(), rho of the data", "values", BEST, rho_of="data")
OF_SHARE = Setting("path, best(), rho of the share", "values", BEST, rho_of="share")


def supervised() -> Iterator[Setting]:
    yield Setting("all tokens")
    yield Setting("random half", "random")
    yield Setting("validation mixed in", "mixed")
    yield Setting("validation only", "only")
    yield Setting("RHO-1, clean reference", "rho1")
    yield Setting("RHO-1 + KL 0.3 to its reference", "rho1", kl=0.3)
    yield Setting("oracle", "oracle")
    yield values("difference", estimator="difference")
    yield values("difference, Adam's step", estimator="difference", setting={"precondition": True})
    yield Setting("RHO-1 + KL 0.3 to the base", "rho1", kl=0.3, kl_to_base=True)
    yield Setting("path, best()", "values", BEST)
    yield Setting("path, best(), KL 0.3 to the base", "values", BEST, kl=0.3)
    yield values("path, no drift, best() else", **{**_PATH, "stability_weight": 0.0})
    yield UNMASKED
    yield OF_DATA
    yield values("path, three blocks, best() else", **_PATH, num_layers=3)
    yield values("path, by sequence, best() else", **_PATH, threshold_scope="sequence")
    # What best() comes to where the gradient is not made that of a mean over kept tokens: the KL counts 1 / rho times.
    yield values("path, KL 1.2, best() else", **{**_PATH, "path_kl": 1.2})
    yield values("path, from the base, best() else", **_PATH, path_from="reference")
    yield values("path, theta* renewed", **{**_PATH, "path_kl": 0.3, "path_every": 20})
    yield RENEWED
    yield SMOOTHED
    yield SMOOTHED_MORE
    yield MORE
    yield values("path, from the start, KL 0.3", estimator="path", path_kl=0.3)
    yield values("path", estimator="path")
    for name in ("EAFT", "STM", "DFT"):
        yield Setting(name, name.lower())
    full = Setting("difference, Adam's step, all 32", "values", FULL, precondition=True)
    yield full
    yield replace(full, name="difference, Adam's step, all 32, KL 0.3", kl=0.3)
    options: dict[str, object] = {"estimator": "difference", "threshold": "zero"}
    yield values("difference, Adam's step, above zero", **options, setting={"precondition": True})
    yield values("ghost K=3")
    yield Setting("ghost K=3, paper preset", "values", AlphaTokenConfig.paper())
    yield values("ghost K=3, W=0", causal_window=0)
    yield values("ghost all, W=0", num_layers="all", causal_window=0)
    yield values("ghost all", num_layers="all")
    yield values("ghost all, W=0, Adam's step", num_layers="all", causal_window=0, setting={"precondition": True})
    yield values("difference, no drift", estimator="difference", stability_weight=0)
    yield values("ghost K=3, no drift", stability_weight=0)
    yield values("ghost all, no drift", num_layers="all", stability_weight=0)
    yield values("difference K=3", estimator="difference", num_layers=3)
    for kl in (0.1, 0.3, 1.0):
        yield Setting(f"KL {kl}", kl=kl)
        yield values(f"KL {kl} + difference", estimator="difference", setting={"kl": kl})
    yield Setting("L2 0.001", l2=0.001)
    yield values("L2 0.001 + difference", estimator="difference", setting={"l2": 0.001})
    yield values("ghost K=3, W=0, no drift", causal_window=0, stability_weight=0)
    yield values("ghost all, W=0, no drift", num_layers="all", causal_window=0, stability_weight=0)
    yield values("difference K=3, no drift", estimator="difference", num_layers=3, stability_weight=0)
    yield values("exact", estimator="exact")
    yield values("exact K=3", estimator="exact", num_layers=3)


def without_noise() -> Iterator[Setting]:
    yield Setting("no noise: all tokens", noise=False)
    yield Setting("no noise: random half", "random", noise=False)
    yield Setting("no noise: RHO-1, clean reference", "rho1", noise=False)
    yield Setting("no noise: RHO-1 + KL 0.3 to the base", "rho1", kl=0.3, kl_to_base=True, noise=False)
    yield Setting("no noise: KL 0.3", kl=0.3, noise=False)
    yield Setting("no noise: path, best()", "values", BEST, noise=False)
    yield Setting("no noise: path, best(), KL 0.3 to the base", "values", BEST, kl=0.3, noise=False)
    yield replace(UNMASKED, name=f"no noise: {UNMASKED.name}", noise=False)
    yield replace(UNMASKED_RENEWED, name=f"no noise: {UNMASKED_RENEWED.name}", noise=False)
    yield replace(OF_DATA, name=f"no noise: {OF_DATA.name}", noise=False)
    yield replace(OF_SHARE, name=f"no noise: {OF_SHARE.name}", noise=False)
    yield values("no noise: ghost K=3", setting={"noise": False})
    yield values("no noise: difference", estimator="difference", setting={"noise": False})
    yield values("no noise: difference, rho 0.8", estimator="difference", rho=0.8, setting={"noise": False})
    both: dict[str, object] = {"noise": False, "precondition": True}
    yield values("no noise: difference, Adam's step", estimator="difference", setting=both)
    yield values(
        "no noise: difference, Adam's step, above zero", estimator="difference", threshold="zero", setting=both
    )


def exchanged_answers() -> Iterator[Setting]:
    """Three in ten answers are right code behind the wrong prompt: what no single token gives away."""
    given: dict[str, object] = {"noise": False, "exchanged": 0.3}
    yield Setting("exchanged: all tokens", **given)  # type: ignore[arg-type]
    yield Setting("exchanged: KL 0.3", kl=0.3, **given)  # type: ignore[arg-type]
    yield Setting("exchanged: RHO-1 + KL 0.3 to the base", "rho1", kl=0.3, kl_to_base=True, **given)  # type: ignore[arg-type]
    yield Setting("exchanged: oracle", "oracle", **given)  # type: ignore[arg-type]
    yield Setting("exchanged: path, best()", "values", BEST, **given)  # type: ignore[arg-type]
    yield replace(UNMASKED, name=f"exchanged: {UNMASKED.name}", **given)  # type: ignore[arg-type]
    yield replace(OF_DATA, name=f"exchanged: {OF_DATA.name}", **given)  # type: ignore[arg-type]
    yield replace(OF_SHARE, name=f"exchanged: {OF_SHARE.name}", **given)  # type: ignore[arg-type]


def in_nf4() -> Iterator[Setting]:
    yield Setting("NF4: all tokens", nf4=True)
    yield values("NF4: ghost K=3", setting={"nf4": True})
    yield values("NF4: difference", estimator="difference", setting={"nf4": True})


def preferences() -> Iterator[Setting]:
    yield Setting("DPO: all tokens", task="dpo")
    yield Setting("DPO: random half", "random", task="dpo")
    yield Setting("DPO: log-ratio", "log_ratio", task="dpo")
    yield values("DPO: ghost K=3", setting={"task": "dpo"})
    yield values("DPO: ghost all, W=0", num_layers="all", causal_window=0, setting={"task": "dpo"})
    yield values("DPO: difference", estimator="difference", setting={"task": "dpo"})
    both = {"task": "dpo", "precondition": True}
    yield values("DPO: difference, Adam's step", estimator="difference", setting=both)
    yield Setting("DPO: validation only", "only", task="dpo")
    yield Setting("DPO: validation only, with likelihood", "only", task="dpo", likelihood=1.0)
    yield values("DPO: difference, no drift", estimator="difference", stability_weight=0, setting={"task": "dpo"})
    for share in (0.0, 0.3):
        yield from against_flips(share)


def against_flips(share: float) -> Iterator[Setting]:
    """Preferences of which a share of the training labels is wrong, and what is told to help."""
    name, task = f"DPO {share:.0%} flipped: ", {"task": "dpo", "flipped": share}
    if share:
        yield Setting(f"{name}all tokens", **task)  # type: ignore[arg-type]
    yield Setting(f"{name}smoothed 0.3", smoothing=0.3, **task)  # type: ignore[arg-type]
    yield Setting(f"{name}robust 0.3", loss_type="robust", smoothing=0.3, **task)  # type: ignore[arg-type]
    yield Setting(f"{name}with likelihood", likelihood=1.0, **task)  # type: ignore[arg-type]
    yield Setting(f"{name}best(pairs=True)", "values", BEST_FOR_PAIRS, **task)  # type: ignore[arg-type]
    yield values(f"{name}path, above zero", estimator="path", threshold="zero", setting=task)


# What the other settings are compared with, first in line and at the mild rate too; of clean answers and pairs MILD is.
MAIN = (
    "all tokens",
    "random half",
    "validation mixed in",
    "validation only",
    "RHO-1, clean reference",
    "RHO-1 + KL 0.3 to its reference",
    "RHO-1 + KL 0.3 to the base",
    "path, best()",
    "path, best(), KL 0.3 to the base",
    "path, no drift, best() else",
    "path, KL 1.2, best() else",
    "path, from the base, best() else",
    "path, theta* renewed",
    "path, theta* renewed, best() else",
    "path, smoothed, best() else",
    "path, smoothed, rho 0.7, best() else",
    "path, rho 0.7, best() else",
    "all tokens, from theta*, KL to it",
    "path, best(), rho of the data",
    "path",
    "EAFT",
    "STM",
    "DFT",
    "KL 0.1",
    "KL 1.0",
    "oracle",
    "difference",
    "difference, Adam's step",
    "difference, Adam's step, all 32",
    "difference, Adam's step, all 32, KL 0.3",
    "difference, Adam's step, above zero",
    "difference, no drift",
    "ghost K=3",
    "ghost all, W=0",
    "KL 0.3",
    "KL 0.3 + difference",
    "L2 0.001",
    "L2 0.001 + difference",
)
MILD = (
    "best(pairs=True)",
    "smoothed 0.3",
    "robust 0.3",
    "with likelihood",
    "all tokens",
    "validation only",
    "validation only, with likelihood",
    "RHO-1, clean reference",
    "RHO-1 + KL 0.3 to the base",
    "KL 0.3",
    "path, best()",
    "path, best(), KL 0.3 to the base",
    "all tokens, from theta*, KL to it",
    "path, best(), rho of the data",
    "oracle",
    "difference",
    "difference, Adam's step",
)
QUICK = ("all tokens", "random half", "RHO-1, clean reference", "ghost K=3", "difference")


def toy_runs(quick: bool) -> list[tuple[Setting, float, int]]:
    """Setting, learning rate and seed; one seed after the other, so that what is there is balanced."""
    main = [setting for setting in supervised() if setting.name in MAIN]
    rest = [setting for setting in supervised() if setting.name not in MAIN]
    hot, mild = RATES["sft"]
    if quick:
        return [(setting, hot, 0) for setting in main if setting.name in QUICK]
    first = [(setting, lr) for setting in main for lr in (hot, mild)]
    for setting in (*without_noise(), *exchanged_answers(), *preferences()):
        rates = RATES[setting.task]
        first += [(setting, lr) for lr in (rates if setting.name.partition(": ")[2] in MILD else rates[:1])]
    second = [(setting, hot) for setting in (*rest, *in_nf4())]
    return [(*one, seed) for group in (first, second) for seed in range(SEEDS) for one in group]


REAL_RATES = {"sft": (2e-3, 5e-4, 1.25e-4), "dpo": (5e-4, 1.25e-4, 3e-5)}
REAL_SEEDS = 3


def real_supervised() -> Iterator[Setting]:
    yield Setting("all tokens")
    yield Setting("RHO-1, clean reference", "rho1")
    yield Setting("RHO-1 + KL 0.3 to the base", "rho1", kl=0.3, kl_to_base=True)
    yield values("difference", estimator="difference")
    yield Setting("path, best()", "values", BEST)
    yield Setting("path, best(), KL 0.3 to the base", "values", BEST, kl=0.3)
    yield values("path, KL 0.3, best() else", **{**_PATH, "path_kl": 0.3})
    yield RENEWED
    yield SMOOTHED
    yield SMOOTHED_MORE
    yield UNMASKED
    yield UNMASKED_RENEWED
    yield OF_DATA
    yield OF_SHARE
    yield values("path, from theta*", estimator="path", path_start=True)
    yield values("path", estimator="path")
    yield Setting("difference in full", "values", FULL, precondition=True)
    yield Setting("difference in full + KL 0.3", "values", FULL, precondition=True, kl=0.3)
    yield values("ghost K=3")
    yield Setting("random half", "random")
    for kl in (0.1, 0.3, 1.0):
        yield Setting(f"KL {kl}", kl=kl)
    yield Setting("RHO-1 + KL 0.3 to its reference", "rho1", kl=0.3)
    yield Setting("EAFT", "eaft")
    yield Setting("STM", "stm")
    yield Setting("DFT", "dft")
    yield Setting("validation mixed in", "mixed")
    yield Setting("validation only", "only")
    yield Setting("oracle", "oracle")
    yield OF_ORACLE


def real_preferences() -> Iterator[Setting]:
    yield Setting("DPO: all tokens", task="dpo")
    yield Setting("DPO: robust 0.3", task="dpo", loss_type="robust", smoothing=0.3)
    yield Setting("DPO: smoothed 0.3", task="dpo", smoothing=0.3)
    yield Setting("DPO: with likelihood", task="dpo", likelihood=1.0)
    yield Setting("DPO: validation only", "only", task="dpo")
    yield values("DPO: difference", estimator="difference", setting={"task": "dpo"})
    both = {"task": "dpo", "precondition": True}
    yield values("DPO: difference, above zero", estimator="difference", threshold="zero", setting=both)
    yield Setting("DPO: best(pairs=True)", "values", BEST_FOR_PAIRS, task="dpo")
    yield Setting("DPO: difference in full", "values", FULL, task="dpo", precondition=True)
    yield Setting("DPO: random half", "random", task="dpo")


REAL_QUICK = ("all tokens", "difference", "DPO: all tokens", "DPO: difference")


def real_runs(task: str, quick: bool, seeds: int | None = None) -> list[tuple[Setting, float, int]]:
    """Setting, learning rate and seed, by seed and rate: what is there is balanced. `quick`: two at the middle rate."""
    settings = list(real_supervised() if task == "sft" else real_preferences())
    rates = REAL_RATES[task]
    if quick:
        return [(setting, rates[1], 0) for setting in settings if setting.name in REAL_QUICK]
    middle_first = (rates[1], rates[0], *rates[2:])
    return [(setting, lr, seed) for seed in range(seeds or REAL_SEEDS) for lr in middle_first for setting in settings]
