"""What a user can set, validated where it is set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .estimators import ESTIMATORS, estimator_class

if TYPE_CHECKING:
    from .models.sites import Scope


@dataclass(frozen=True)
class AlphaTokenConfig:
    """Settings of token valuation and selection (arXiv 2606.01635).

    Defaults are the paper's where it has one, but for the target's schedule and the form of the Fisher; `paper()` has
    the paper's all, `best()` those that train best. What benchmarks/fidelity.py and tradeoff.py say of each stands
    beside it.

    Args:
        rho (`float`, *optional*, defaults to 0.5):
            Share of response tokens that is trained on, in (0, 1]. With 1.0 nothing is scored or hooked.
        stability_weight (`float`, *optional*, defaults to 1.5):
            lambda of Eq. 12, the weight of the drift terms, at least 0. With 0 no Fisher is needed.
        num_layers (`int` or `"all"`, *optional*):
            K, the number of transformer blocks, counted from the last, whose adapters are scored. By default 3, or as
            many as there are, for the ghost estimator (the paper's; all blocks agree better with exact values, 0.60 to
            0.82 against 0.35 to 0.53, and train better, at the cost of a whole backward) and all for the others.
        causal_window (`int`, *optional*, defaults to 32):
            W of Eq. 9 in tokens: how far ahead a position is credited through attention. 0 switches the causal
            terms and all attention work off, and agrees as well with exact values. The other estimators follow every
            path and have no window.
        estimator (`str`, *optional*, defaults to `"ghost"`):
            How a batch is valued: `"ghost"`, the position-local terms of Eqs. 8 to 11; `"difference"`, what a token's
            loss changes by when the adapter is nudged, in one more forward without grad; `"exact"`, the derivative
            that the difference approaches, by forward-mode differentiation; `"path"`, what a token's loss changes by
            between the adapter and theta*, to which a few steps on the target and the drift lead, in one more forward
            without grad (none, with `path_logps` in the batch). The ghost is the default since it is nearly free and
            has the four terms; the difference trains better on every axis for about 0.3 of a step more.
        difference_rms (`float`, *optional*):
            Size of the nudge, by its effect: root mean square change of the last hidden state, relative to its own
            root mean square, over response positions. By default the square root of the unit roundoff of the coarsest
            precision in use, where rounding and curvature balance: 2.4e-4 in float32, 0.063 in bf16.
        threshold (`str`, *optional*, defaults to `"quantile"`):
            `"quantile"` keeps the top `rho` share; `"zero"` keeps every token of positive value, however many these
            are; `"soft"` drops none, and weighs each by the sigmoid of its value. The last two read `rho` no further
            than that it is below 1.
        soft_temperature (`float`, *optional*, defaults to 1.0):
            Of the soft threshold: what the value is divided by, times the root mean square of all values of its
            `threshold_scope`. The smaller, the nearer to the threshold `"zero"`.
        threshold_scope (`str`, *optional*, defaults to `"batch"`):
            Over what the (1 - rho) quantile, or the spread of a soft threshold, is taken: `"batch"`, the response
            tokens of the micro-batch (of each branch, for pairs), or `"sequence"`, those of each sequence.
            `"pair"`, for preferences: each pair counts by the sum of its values, and is kept or dropped whole.
        target_every (`int`, *optional*, defaults to 1):
            Optimizer steps between two estimates of the target gradient in a training loop, at least 1.
        target_parts (`int`, *optional*, defaults to 4):
            Of so many parts of the target's sequences each estimate after the first takes one, in turn, into a running
            average. Overhead: a forward and a backward of 1 / (target_parts * target_every) of them a step; with 32
            sequences of target and 64 of training, the defaults take 8 for 64.
        target_decay (`float` or `None`, *optional*, defaults to 0.5):
            Share that the running average keeps of what it held, in [0, 1). `None` makes every estimate anew from all
            sequences of the target, whatever `target_parts` says. At equal overhead a part a step followed exact values
            better than all of them every four; all of them at each (`target_parts=1, target_decay=None`) is best, for
            the overhead of all: benchmarks/fidelity.py, tradeoff.py.
        fisher (`str`, *optional*, defaults to `"factored"`):
            Form of the Fisher that this library estimates: `"factored"` (rank one with exact marginals,
            d_out + d_in floats a layer; its totals rank at 0.999 beside the dense one's) or `"dense"` (d_out x d_in).
        path_steps (`int`, *optional*):
            Adam steps to theta*, each on the next of the target's batches; too many learn the validation examples by
            heart. By default as many, up to 16 (for pairs 24), as lower the loss of a held-out quarter of the target's
            rows most; theta* is then made with all rows.
        path_rate (`float`, *optional*):
            Adam's learning rate there. By default, and in the same way, one of 3e-3, 1e-3 and 3e-4, for pairs of 1e-3,
            3e-4 and 1e-4. Where nothing can be held out, the first and all steps.
        path_beta (`float`, *optional*, defaults to 0.1):
            Beta of the DPO loss that leads to theta* where the target holds pairs, in 1 / nats.
        path_likelihood (`float`, *optional*, defaults to 1.0):
            Weight, beside it, of the mean negative log-likelihood of these pairs' chosen answers, at least 0.
        path_holdout (`float`, *optional*, defaults to 0.0):
            Share of each target batch, in [0, 1), that no step to theta* is taken on: theta* is then where the loss of
            these rows was lowest.
        path_every (`int`, *optional*):
            Optimizer steps after which theta* is made anew, from where the adapter then is. By default never.
        path_renewal_steps (`int`, *optional*, defaults to 8):
            Adam steps of each such renewal.
        path_renewal_rate (`float`, *optional*, defaults to 1e-3):
            Adam's learning rate in them.
        path_from (`str`, *optional*, defaults to `"present"`):
            Where the path that values are taken along begins: `"present"`, where the adapter is; or `"reference"`, for
            values that do not change as training goes, at the cost of a forward of the reference (none for pairs that
            bring `ref_chosen_logps` and `ref_rejected_logps`, with `threshold_scope="pair"`).
        path_kl (`float`, *optional*, defaults to 0.0):
            Weight of KL(theta* || model), the mean over response tokens, from the same extra forward. Losses of this
            library and its trainers add it; in a loop of your own add `kl` of the context to the loss.
        path_start (`bool`, *optional*, defaults to `False`):
            Begin training at theta*: the first training context writes it into the adapter.
    """

    rho: float = 0.5
    stability_weight: float = 1.5
    num_layers: int | Literal["all"] | None = None
    causal_window: int = 32
    estimator: str = "ghost"
    difference_rms: float | None = None
    threshold: Literal["quantile", "zero", "soft"] = "quantile"
    soft_temperature: float = 1.0
    threshold_scope: Literal["batch", "sequence", "pair"] = "batch"
    target_every: int = 1
    target_parts: int = 4
    target_decay: float | None = 0.5
    fisher: Literal["factored", "dense"] = "factored"
    path_steps: int | None = None
    path_rate: float | None = None
    path_beta: float = 0.1
    path_likelihood: float = 1.0
    path_holdout: float = 0.0
    path_every: int | None = None
    path_renewal_steps: int = 8
    path_renewal_rate: float = 1e-3
    path_from: Literal["present", "reference"] = "present"
    path_kl: float = 0.0
    path_start: bool = False

    def __post_init__(self) -> None:
        if not _is_number(self.rho) or not 0.0 < self.rho <= 1.0:
            raise ValueError(
                f"rho is {self.rho!r}; it is the share of response tokens to train on and must be in (0, 1]. "
                "Use rho=1.0 to keep every token."
            )
        if not _is_number(self.stability_weight) or not 0.0 <= self.stability_weight < float("inf"):
            raise ValueError(
                f"stability_weight is {self.stability_weight!r}; it must be a finite number of at least 0. "
                "Use 0 to value tokens by the target alone."
            )
        if self.num_layers is not None and self.num_layers != "all":
            _check_int("num_layers", self.num_layers, least=1, hint='Use "all" to score every block.')
        _check_int("causal_window", self.causal_window, least=0, hint="Use 0 to switch the causal terms off.")
        _check_int("target_every", self.target_every, least=1, hint="Use 1 to estimate it before every step.")
        _check_int("target_parts", self.target_parts, least=1, hint="Use 1 to take the whole target each time.")
        if self.target_decay is not None and not (_is_number(self.target_decay) and 0 <= self.target_decay < 1):
            raise ValueError(
                f"target_decay is {self.target_decay!r}; it is the share that a running average of the target keeps at "
                "each estimate and must be in [0, 1). Use None to estimate from the whole target each time."
            )
        _check_choice("estimator", self.estimator, tuple(ESTIMATORS))
        if self.difference_rms is not None and not (_is_number(self.difference_rms) and 0 < self.difference_rms <= 1):
            raise ValueError(
                f"difference_rms is {self.difference_rms!r}; it is the relative change that the nudge makes to the "
                "last hidden state and must be in (0, 1]. Use None for the default of the compute precision."
            )
        _check_choice("threshold", self.threshold, ("quantile", "zero", "soft"))
        if not _is_number(self.soft_temperature) or not 0 < self.soft_temperature < float("inf"):
            raise ValueError(
                f"soft_temperature is {self.soft_temperature!r}; it must be a finite number above 0. Use "
                'threshold="zero" for its limit, a weight of 0 or 1 by the sign of the value.'
            )
        _check_choice("threshold_scope", self.threshold_scope, ("batch", "sequence", "pair"))
        _check_choice("fisher", self.fisher, ("factored", "dense"))
        _check_path(self)

    @classmethod
    def paper(cls, **changes: Any) -> AlphaTokenConfig:
        """The paper's settings (arXiv 2606.01635), whatever the defaults are: position-local terms over the last three
        blocks with a causal window of 32, a dense Fisher, and a target from all validation examples at every step.

        Args:
            changes: other values for some of the fields.
        """
        settings: dict[str, Any] = {
            "rho": 0.5,
            "stability_weight": 1.5,
            "num_layers": 3,
            "causal_window": 32,
            "estimator": "ghost",
            "threshold": "quantile",
            "threshold_scope": "batch",
            "target_every": 1,
            "target_parts": 1,
            "target_decay": None,
            "fisher": "dense",
        }
        return cls(**{**settings, **changes})

    @classmethod
    def best(cls, *, pairs: bool = False, **changes: Any) -> AlphaTokenConfig:
        """What trained best in trials on the toy of benchmarks/tradeoff.py: the path estimator, with training that
        begins at theta* and a KL to it, which a loop of one's own adds to its loss (`step.kl`).

        Before there was a path, `best()` was `AlphaTokenConfig(estimator="difference", target_parts=1,
        target_decay=None)` with the optimizer given (`AlphaToken(..., optimizer=optimizer)`, `precondition=True`).

        Args:
            pairs (`bool`): for preferences: pairs whose labels theta* agrees with are kept, whole.
            changes: other values for some of the fields; with another `estimator`, only what that one has is set.
        """
        settings: dict[str, Any] = {"estimator": "path", "path_start": True, "path_kl": 0.6}
        if pairs:
            settings |= {"threshold": "zero", "threshold_scope": "pair", "path_from": "reference"}
        if changes.get("estimator", "path") != "path":
            settings = {"target_parts": 1, "target_decay": None}
        return cls(**{**settings, **changes})

    @property
    def scored_layers(self) -> int | Literal["all"]:
        """K with the default filled in."""
        if self.num_layers is not None:
            return self.num_layers
        layers = estimator_class(self.estimator).layers
        if layers == "all":
            return layers
        from .models.sites import AtMost

        return AtMost(layers)

    @property
    def scope(self) -> Scope:
        """Which trained parameters the estimator can score, see `find_scored`."""
        return estimator_class(self.estimator).scope


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _check_int(name: str, value: object, *, least: int, hint: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} is {value!r}; it must be an integer of at least {least}. {hint}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(map(repr, allowed))}.")


def _check_path(config: AlphaTokenConfig) -> None:
    for name, hint in (("path_steps", "Use None for the default."), ("path_every", "Use None to make it once.")):
        if getattr(config, name) is not None:
            _check_int(name, getattr(config, name), least=1, hint=hint)
    _check_int("path_renewal_steps", config.path_renewal_steps, least=1, hint="Use path_every=None for no renewal.")
    for name in ("path_rate", "path_renewal_rate", "path_beta"):
        value = getattr(config, name)
        if not (value is None and name == "path_rate") and not (_is_number(value) and 0 < value < float("inf")):
            raise ValueError(f"{name} is {value!r}; it must be a finite number above 0.")
    for name in ("path_likelihood", "path_kl"):
        value = getattr(config, name)
        if not _is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0. Use 0 for none.")
    if not _is_number(config.path_holdout) or not 0 <= config.path_holdout < 1:
        raise ValueError(
            f"path_holdout is {config.path_holdout!r}; it is the share of each target batch that is held out and "
            "must be in [0, 1). Use 0 to hold out nothing."
        )
    _check_choice("path_from", config.path_from, ("present", "reference"))
    if not isinstance(config.path_start, bool):
        raise ValueError(f"path_start is {config.path_start!r}; it must be True or False.")
    for name in ("path_kl", "path_start", "path_every", "path_from"):
        if getattr(config, name) not in (None, 0, "present") and config.estimator != "path":
            raise ValueError(
                f'{name} is {getattr(config, name)!r}, but estimator="{config.estimator}" has no theta*. Set '
                f'estimator="path", or leave {name} out.'
            )
