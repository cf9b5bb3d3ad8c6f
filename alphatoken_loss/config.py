"""What a user can set, validated where it is set."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from .checks import check_choice, check_int, is_number
from .estimators import ESTIMATORS, estimator_class

if TYPE_CHECKING:
    from .models.sites import Scope


@dataclass(frozen=True)
class AlphaTokenConfig:
    """Settings of token valuation and selection (arXiv 2606.01635).

    Defaults are the paper's, except for the target's schedule and the form of the Fisher. `paper()` has all settings of
    the paper, `best()` those that trained best. What was measured of them is in docs/which-estimator.md and
    docs/evidence.md.

    Args:
        rho (`float`, *optional*, defaults to 0.5):
            Share of response tokens that is trained on, in (0, 1]. With `rho=1.0` all are, whatever the threshold, and
            nothing is scored or hooked, unless `path_start` or `path_kl` ask for theta*.
        stability_weight (`float`, *optional*, defaults to 1.5):
            lambda of Eq. 12, the weight of the drift terms, at least 0. With 0 no Fisher is needed.
        num_layers (`int` or `"all"`, *optional*):
            K: the adapters of the last K transformer blocks are scored. By default 3 for the ghost estimator (or as
            many as there are), all for the others. With all blocks, the ghost agrees better with exact values and
            trains better, at the cost of a whole backward.
        causal_window (`int`, *optional*, defaults to 32):
            W of Eq. 9 in tokens: how far ahead a position is credited through attention. 0 switches the causal
            terms and all attention work off, and agrees as well with exact values. For the ghost estimator alone: the
            others follow every path.
        estimator (`str`, *optional*, defaults to `"ghost"`):
            How a batch is valued.
            `"ghost"`: the position-local terms of Eqs. 8 to 11. The default, since it costs least and has the four
            terms.
            `"difference"`: by how much a token's loss changes when the adapter is nudged. One more forward without
            grad; it trains better than the ghost.
            `"exact"`: the derivative that the difference approximates, by forward-mode differentiation.
            `"path"`: by how much a token's loss changes between the adapter and theta*, where a few steps on the
            target and the drift lead. One more forward without grad (none, with `path_logps` in the batch).
        difference_rms (`float`, *optional*):
            Size of the nudge, measured by its effect: the root mean square change of the last hidden state over
            response positions, divided by the root mean square of that state. By default the square root of the unit
            roundoff of the coarsest precision in use (2^-12 for float32, 2^-4 for bf16): a smaller nudge has more
            rounding error, a larger one more curvature.
        threshold (`str`, *optional*, defaults to `"quantile"`):
            `"quantile"` keeps the top `rho` share; `"zero"` drops every token whose value is below 0; `"soft"` drops
            none, and weighs each by the sigmoid of its value. For the last two, `rho` only has to be below 1.
        soft_temperature (`float`, *optional*, defaults to 1.0):
            For the soft threshold: before the sigmoid, a value is divided by this number times the root mean square of
            all values of its `threshold_scope`. The smaller it is, the nearer to `"zero"`.
        threshold_scope (`str`, *optional*, defaults to `"batch"`):
            What the (1 - rho) quantile, or the root mean square of a soft threshold, is taken over. `"batch"`: all
            response tokens of the micro-batch (for pairs, of each branch). `"sequence"`: those of each sequence.
            `"pair"`, for preferences: a pair counts by the sum of its values, and is kept or dropped whole.
        smoothing (`int`, *optional*, defaults to 0):
            Choose tokens by their values averaged with those of this many neighbours on either side (see
            `selection.thresholds.smoothed`): what leads away from the task comes in runs. With 0, each token is chosen
            by its own value. Values are reported as they are. Not with `threshold_scope="pair"`.
        target_every (`int`, *optional*, defaults to 1):
            Optimizer steps between two estimates of the target gradient in a training loop, at least 1.
        target_parts (`int`, *optional*, defaults to 4):
            The target's sequences are divided into so many parts. The first estimate takes all of them; each later
            one takes one part, in turn, into a running average. Overhead a step: a forward and a backward of
            1 / (target_parts * target_every) of the sequences. With 32 of them, the defaults take 8 a step.
        target_decay (`float` or `None`, *optional*, defaults to 0.5):
            Share of its old content that the running average keeps, in [0, 1). With `None` there is no average: every
            estimate is made anew from all sequences, whatever `target_parts` says. That is best (with
            `target_parts=1`) and costs most. At equal cost, a part at every step follows exact values better than all
            of them at every fourth.
        fisher (`str`, *optional*, defaults to `"factored"`):
            Form of the Fisher that this library estimates: `"dense"`, d_out x d_in numbers a layer; or `"factored"`,
            the rank-one matrix with the same row and column sums, d_out + d_in numbers a layer. The two rank tokens
            nearly alike.
        path_steps (`int`, *optional*):
            Adam steps to theta*, each on the next of the target's batches, or the next few until they are 8 rows
            (pairs). By default it is found by a trial, with at most 16 of them (for pairs 24): a quarter of the
            target's rows is held out, and the step behind which their loss is lowest counts. theta* itself is then made
            with no row held out.
        path_rate (`float`, *optional*):
            Adam's learning rate in these steps. By default the same trial chooses 3e-3, 1e-3 or 3e-4 (for pairs 1e-3,
            3e-4 or 1e-4). If no row can be held out, it is the first of them, and all steps are taken.
        path_beta (`float`, *optional*, defaults to 0.1):
            Where the target holds pairs, these steps are on a DPO loss: its beta, in 1 / nats.
        path_likelihood (`float`, *optional*, defaults to 1.0):
            Weight of a term that is added to that loss: the mean negative log-likelihood of the chosen answers. At
            least 0.
        path_holdout (`float`, *optional*, defaults to 0.0):
            Share of each target batch, in [0, 1), that is held out of these steps. If it is not 0, theta* is the step
            at which the loss of the held-out rows was lowest.
        path_every (`int`, *optional*):
            Optimizer steps after which theta* is made anew, from where the adapter then is. By default never.
        path_renewal_steps (`int`, *optional*, defaults to 8):
            Adam steps of each such renewal.
        path_renewal_rate (`float`, *optional*, defaults to 1e-3):
            Adam's learning rate in them.
        path_from (`str`, *optional*, defaults to `"present"`):
            Where the path begins: `"present"`, at the adapter as it is; or `"reference"`. From the reference, values
            do not change as training goes, at the cost of a forward of the reference (none with
            `threshold_scope="pair"`, for pairs with `ref_chosen_logps` and `ref_rejected_logps`).
        path_kl (`float`, *optional*, defaults to 0.0):
            Weight of KL(theta* || model), the mean over response tokens, made in the same extra forward. Losses and
            trainers of this library add it. In a loop of your own, add it to the loss: `step.kl` of the context.
        path_start (`bool`, *optional*, defaults to `False`):
            Begin training at theta*, which the first training context writes into the adapter.
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
    smoothing: int = 0
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
        if not is_number(self.rho) or not 0.0 < self.rho <= 1.0:
            raise ValueError(
                f"rho is {self.rho!r}; it is the share of response tokens to train on and must be in (0, 1]. "
                "Use rho=1.0 to keep every token."
            )
        if not is_number(self.stability_weight) or not 0.0 <= self.stability_weight < float("inf"):
            raise ValueError(
                f"stability_weight is {self.stability_weight!r}; it must be a finite number of at least 0. "
                "Use 0 to value tokens by the target alone."
            )
        if self.num_layers is not None and self.num_layers != "all":
            check_int("num_layers", self.num_layers, least=1, hint='Use "all" to score every block.')
        check_int("causal_window", self.causal_window, least=0, hint="Use 0 to switch the causal terms off.")
        check_int("target_every", self.target_every, least=1, hint="Use 1 to estimate it before every step.")
        check_int("target_parts", self.target_parts, least=1, hint="Use 1 to take the whole target each time.")
        if self.target_decay is not None and not (is_number(self.target_decay) and 0 <= self.target_decay < 1):
            raise ValueError(
                f"target_decay is {self.target_decay!r}; it is the share that a running average of the target keeps at "
                "each estimate and must be in [0, 1). Use None to estimate from the whole target each time."
            )
        check_choice("estimator", self.estimator, tuple(ESTIMATORS))
        if self.difference_rms is not None and not (is_number(self.difference_rms) and 0 < self.difference_rms <= 1):
            raise ValueError(
                f"difference_rms is {self.difference_rms!r}; it is the relative change that the nudge makes to the "
                "last hidden state and must be in (0, 1]. Use None for the default of the compute precision."
            )
        check_choice("threshold", self.threshold, ("quantile", "zero", "soft"))
        if not is_number(self.soft_temperature) or not 0 < self.soft_temperature < float("inf"):
            raise ValueError(
                f"soft_temperature is {self.soft_temperature!r}; it must be a finite number above 0. Use "
                'threshold="zero" for its limit, a weight of 0 or 1 by the sign of the value.'
            )
        check_choice("threshold_scope", self.threshold_scope, ("batch", "sequence", "pair"))
        check_int("smoothing", self.smoothing, least=0, hint="Use 0 to choose each token by its own value.")
        if self.smoothing and self.threshold_scope == "pair":
            raise ValueError(
                f'smoothing is {self.smoothing}, but with threshold_scope="pair" pairs are kept whole or not, by the '
                "sum of their values. Set smoothing=0, or another scope."
            )
        check_choice("fisher", self.fisher, ("factored", "dense"))
        _check_path(self)

    @classmethod
    def paper(cls, **changes: Any) -> AlphaTokenConfig:
        """The paper's settings (arXiv 2606.01635): position-local terms over the last three blocks with a causal window
        of 32, a dense Fisher, and a target from all validation examples at every step.

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
        """What trained best in trials on the toy of benchmarks/tradeoff.py: the path estimator. Training begins at
        theta*, and a KL holds it there; in a loop of your own, add that KL to the loss (`step.kl`).

        `best(estimator="difference")` is what trained best without a path: a target from all validation examples at
        every step. Give it the optimizer: `AlphaToken(..., optimizer=optimizer)`, or `precondition=True` in a trainer.

        Args:
            pairs (`bool`): for preferences. Pairs are kept or dropped whole: those are kept whose labels theta* agrees
                with.
            changes: other values for some of the fields. With another `estimator`, the settings of the path are left
                out.
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
    def off(self) -> bool:
        """Whether there is nothing to do: every token is kept, and theta* is not asked for."""
        return self.rho >= 1.0 and not (self.path_start or self.path_kl > 0)

    @property
    def scope(self) -> Scope:
        """Which trained parameters the estimator can score, see `find_scored`."""
        return estimator_class(self.estimator).scope


def read_config(config: AlphaTokenConfig | None) -> AlphaTokenConfig:
    """The settings that were given, or the default ones."""
    if config is not None and not isinstance(config, AlphaTokenConfig):
        raise TypeError(f"config is a {type(config).__name__}; it must be an AlphaTokenConfig.")
    return config or AlphaTokenConfig()


def _check_path(config: AlphaTokenConfig) -> None:
    for name, hint in (("path_steps", "Use None for the default."), ("path_every", "Use None to make it once.")):
        if getattr(config, name) is not None:
            check_int(name, getattr(config, name), least=1, hint=hint)
    check_int("path_renewal_steps", config.path_renewal_steps, least=1, hint="Use path_every=None for no renewal.")
    for name in ("path_rate", "path_renewal_rate", "path_beta"):
        value = getattr(config, name)
        if not (value is None and name == "path_rate") and not (is_number(value) and 0 < value < float("inf")):
            raise ValueError(f"{name} is {value!r}; it must be a finite number above 0.")
    for name in ("path_likelihood", "path_kl"):
        value = getattr(config, name)
        if not is_number(value) or not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value!r}; it must be a finite number of at least 0. Use 0 for none.")
    if not is_number(config.path_holdout) or not 0 <= config.path_holdout < 1:
        raise ValueError(
            f"path_holdout is {config.path_holdout!r}; it is the share of each target batch that is held out and "
            "must be in [0, 1). Use 0 to hold out nothing."
        )
    check_choice("path_from", config.path_from, ("present", "reference"))
    if not isinstance(config.path_start, bool):
        raise ValueError(f"path_start is {config.path_start!r}; it must be True or False.")
    for name in ("path_kl", "path_start", "path_every", "path_from"):
        if getattr(config, name) not in (None, 0, "present") and config.estimator != "path":
            raise ValueError(
                f'{name} is {getattr(config, name)!r}, but estimator="{config.estimator}" has no theta*. Set '
                f'estimator="path", or leave {name} out.'
            )
