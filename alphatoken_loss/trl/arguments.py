"""The arguments of the trainers: TRL's, with the library's settings as further fields of the command line."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_type_hints

from trl import DPOConfig, SFTConfig

from ..config import AlphaTokenConfig
from ..losses.kl import check_kl_coef, check_kl_options
from ..selection import make_selection
from ..selection.base import Selection

_Arguments = TypeVar("_Arguments", bound="AlphaTokenArguments")


def _as_argument(setting: dataclasses.Field[Any], hint: Any, about: str) -> tuple[str, Any, Any]:
    """A setting as a field that `HfArgumentParser` can read; one that may be a number or a word is read as a word."""
    kinds = [kind for kind in get_args(hint) if kind is not NoneType]
    several = NoneType in get_args(hint) and len(kinds) > 1
    help = about.replace("%", "%%") or None
    return setting.name, str | None if several else hint, field(default=setting.default, metadata={"help": help})


def _about(of: type) -> dict[str, str]:
    """What the docstring of a class says of each of its fields."""
    found = re.findall(r"^    (\w+) \(.*\):\n((?: {8}.*\n?)+)", inspect.cleandoc(of.__doc__ or ""), re.M)
    return {name: " ".join(text.split()) for name, text in found}


def _settings() -> list[tuple[str, Any, Any]]:
    """The fields of `AlphaTokenConfig`."""
    about, hints = _about(AlphaTokenConfig), get_type_hints(AlphaTokenConfig)
    return [_as_argument(f, hints[f.name], about.get(f.name, "")) for f in dataclasses.fields(AlphaTokenConfig)]


def _told(arguments: type[_Arguments]) -> type[_Arguments]:
    """Give each field its text from the docstring, for the command line."""
    for name, text in _about(arguments).items():
        default = getattr(arguments, name)
        setattr(arguments, name, field(default=default, metadata={"help": text.replace("%", "%%")}))
    return arguments


_GAIN_ROWS = 64
_Settings: Any = dataclasses.make_dataclass("_Settings", _settings())


@dataclass
@_told
class AlphaTokenArguments(_Settings):
    """The fields of [`AlphaTokenConfig`], and where a trainer takes target and Fisher from.

    Mix it into the arguments of any trainer that [`AlphaTokenMixin`] is mixed into.

    Args:
        selection (`str`, *optional*, defaults to `"alphatoken"`):
            What chooses the tokens that are trained on: `"alphatoken"`, their values. The others need no target, no
            Fisher and no held-out rows: `"random"`, `"excess_loss"`, `"log_ratio"` (preference pairs), `"stm"`,
            `"eaft"`, `"dft"`, `"low_loss"`, `"high_loss"`. For each, see the function of this name with `_weights`.
        selection_options (`dict` or `str`, *optional*):
            Options of that selection (JSON on a command line): `{"perplexity": 2.5}` for `"stm"`.
        negative_weights (`bool`, *optional*, defaults to `False`):
            Allow token weights below 0, from a column or a function.
        kl_coef (`float`, *optional*, defaults to 0.0):
            Weight of a KL to the reference over all response tokens, kept or not. It is added to the loss of SFT
            training steps and has the same divisor. Also with `rho=1.0`. Other trainers have no such penalty.
        kl_on (`str`, *optional*, defaults to `"all"`):
            Take that KL, and the one to theta*, on `"all"` response tokens or on the `"dropped"` alone.
        kl_over (`str`, *optional*, defaults to `"vocabulary"`):
            Take them over the whole `"vocabulary"`, or `"without_label"`: each token's label is left out.
        precondition (`bool`, *optional*, defaults to `False`):
            Value tokens by the step that the trainer's Adam will take, not by one along the gradient.
        target_size (`int`, *optional*, defaults to 32):
            Rows of the training data that are held out as the target if no `target_dataset` is given.
        gain_rows (`int`, *optional*, defaults to 0; 64 in `AlphaTokenSFTConfig.best()` where no `rho` is given):
            When training starts, so many training rows are compared with the target (`shared_gain`), and `rho` is what
            this tells: 1 if there is nothing to mask. `path_kl` is changed with it, so that its balance with the loss
            stays. For SFT with `estimator="path"`. With 0, `rho` stays as it is.
        target_batch_size (`int`, *optional*):
            Target rows run together; one step to theta* (`estimator="path"`) takes as many, at least 8, in each
            process. By default `per_device_train_batch_size`.
        fisher_path (`str`, *optional*):
            A saved Fisher. By default it is estimated when training starts, and saved in `output_dir`.
        fisher_prompts (`int`, *optional*, defaults to 1000):
            Prompts of the training data that the Fisher is estimated from.
        fisher_prompt_length (`int`, *optional*, defaults to 256):
            Of a longer prompt the last so many tokens are used.
        fisher_new_tokens (`int`, *optional*, defaults to 128):
            Tokens sampled after each of them, at most.
        fisher_batch_size (`int`, *optional*, defaults to 8):
            Prompts sampled together.
        precompute_path_log_probs (`bool`, *optional*, defaults to `False`):
            For `estimator="path"`: compute the training data's log-probabilities at theta* once, when training starts,
            so that a step needs no second forward. The data must be a `Dataset`. Not with `path_kl` or `path_every`.
        sample_every (`int`, *optional*, defaults to 50):
            Optimizer steps between two valued batches that are recorded in `output_dir`, for
            `python -m alphatoken_loss report`; 0 records nothing.
    """

    selection: str = "alphatoken"
    selection_options: dict[str, Any] | str | None = None
    negative_weights: bool = False
    kl_coef: float = 0.0
    kl_on: str = "all"
    kl_over: str = "vocabulary"
    precondition: bool = False
    target_size: int = 32
    gain_rows: int = 0
    target_batch_size: int | None = None
    fisher_path: str | None = None
    fisher_prompts: int = 1000
    fisher_prompt_length: int = 256
    fisher_new_tokens: int = 128
    fisher_batch_size: int = 8
    precompute_path_log_probs: bool = False
    sample_every: int = 50

    for_pairs: ClassVar[bool] = False  # what `best` is for

    @classmethod
    def best(cls: type[_Arguments], **options: Any) -> _Arguments:
        """Arguments with the settings of `AlphaTokenConfig.best()`, or in `AlphaTokenDPOConfig` of `best(pairs=True)`.

        A trainer's supervised loss is divided by all response tokens, kept or not. Beside its gradient a KL weighs
        about 1 / rho times what it weighs beside that of `sft_loss`. So the preset's `path_kl` is multiplied by rho
        here, for the same balance. And if no `rho` is given, it is found when training starts, from `gain_rows=64`.

        Args:
            options: further arguments, as of the class itself; they win over the preset's.

        Example:
            >>> args = AlphaTokenSFTConfig.best(output_dir="out")
        """
        names = {setting.name for setting in dataclasses.fields(AlphaTokenConfig)}
        preset = AlphaTokenConfig.best(pairs=cls.for_pairs, **{k: v for k, v in options.items() if k in names})
        settings = dataclasses.asdict(preset)
        if not cls.for_pairs:
            settings["path_kl"] *= preset.rho
            own = options.get("selection", "alphatoken") == "alphatoken" and options.get("kl_on", "all") == "all"
            if "rho" not in options and preset.estimator == "path" and own:
                settings["gain_rows"] = _GAIN_ROWS
        return cls(**{**settings, **options})

    def __post_init__(self) -> None:
        for setting in dataclasses.fields(AlphaTokenConfig):
            value = getattr(self, setting.name)
            if isinstance(value, str) and value.isdecimal():
                setattr(self, setting.name, int(value))
        if isinstance(self.selection_options, str):
            self.selection_options = _read_options(self.selection_options)
        check_kl_coef(self.kl_coef)
        check_kl_options(self.kl_on, self.kl_over)
        if self.precondition and self.estimator == "path":
            raise ValueError(
                'precondition is True, but estimator="path" values tokens by where the path ends, not by a step. Set '
                "precondition=False."
            )
        if self.precompute_path_log_probs:
            self._check_precomputed()
        if self.gain_rows:
            check_gain(self)
        for name in ("target_size", "fisher_prompts", "fisher_prompt_length", "fisher_new_tokens", "fisher_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 1.")
        if self.target_batch_size is not None and self.target_batch_size < 1:
            raise ValueError(
                f"target_batch_size is {self.target_batch_size!r}; it must be at least 1. Leave it out for "
                "per_device_train_batch_size."
            )
        for name, what in (("sample_every", "records nothing"), ("gain_rows", "leaves rho as it is")):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be at least 0, which {what}.")
        _ = self.alphatoken_selection  # errors now, not at the first step
        if hasattr(super(), "__post_init__"):
            super().__post_init__()

    def _check_precomputed(self) -> None:
        if self.estimator != "path":
            raise ValueError(
                f'precompute_path_log_probs is True, but estimator="{self.estimator}" has no theta*. Set '
                'estimator="path", or leave it out.'
            )
        for name in ("path_kl", "path_every"):
            if getattr(self, name):
                raise ValueError(
                    f"precompute_path_log_probs is True, but {name}={getattr(self, name)} needs theta* itself at later "
                    f"steps. Set {name} to its default, or precompute_path_log_probs=False."
                )

    @property
    def alphatoken_config(self) -> AlphaTokenConfig:
        """The settings of the library itself."""
        return AlphaTokenConfig(**{f.name: getattr(self, f.name) for f in dataclasses.fields(AlphaTokenConfig)})

    def check_unchanged(self, made: AlphaTokenConfig) -> None:
        """Check that the settings are `made`, those that a trainer was made with.

        Raises:
            ValueError: one was changed since.
        """
        for setting in dataclasses.fields(made):
            before, now = getattr(made, setting.name), getattr(self, setting.name)
            if before != now:
                raise ValueError(
                    f"args.{setting.name} is {now} now, and was {before} when the trainer was made, which reads it "
                    "then. Make the trainer with it."
                )

    @property
    def alphatoken_selection(self) -> Selection:
        """What chooses the tokens."""
        options = self.selection_options
        assert not isinstance(options, str)
        return make_selection(self.selection, self.alphatoken_config, options)


def _read_options(text: str) -> dict[str, Any] | None:
    try:
        options = json.loads(text)
    except ValueError:
        options = text
    if not isinstance(options, dict | None):
        raise ValueError(
            f"selection_options is {text!r}; it must be a JSON object of option names and values, such as "
            '{"perplexity": 2.5}.'
        )
    return options


def check_gain(args: AlphaTokenArguments) -> None:
    """Check that rho can be found by `gain_rows`.

    Raises:
        ValueError: it cannot.
    """
    asked = f"gain_rows is {args.gain_rows}, by which rho is found"
    if args.for_pairs:
        raise ValueError(
            f"{asked}, but pairs are kept or dropped by a sign (best(pairs=True)), not by a share. Set gain_rows=0."
        )
    if args.estimator != "path" or args.selection != "alphatoken":
        raise ValueError(
            f'{asked}, and that is told along the way to theta*; here estimator="{args.estimator}" and '
            f'selection="{args.selection}". Set estimator="path" with selection="alphatoken", or gain_rows=0.'
        )
    if args.rho != AlphaTokenConfig.rho:
        raise ValueError(f"{asked}, but rho={args.rho} was given too. Leave rho out, or set gain_rows=0.")
    if args.kl_on == "dropped":
        raise ValueError(
            f'{asked}, but kl_on is "dropped", and where rho is found to be 1 none is. Give rho with gain_rows=0, '
            'or set kl_on="all".'
        )


@dataclass
class AlphaTokenSFTConfig(AlphaTokenArguments, SFTConfig):
    """[`~trl.SFTConfig`] with the fields of [`AlphaTokenArguments`]."""


@dataclass
class AlphaTokenDPOConfig(AlphaTokenArguments, DPOConfig):
    """[`~trl.DPOConfig`] with the fields of [`AlphaTokenArguments`]."""

    for_pairs: ClassVar[bool] = True
