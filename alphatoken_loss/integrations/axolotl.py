"""Axolotl: a plugin that trains on the tokens of value, for SFT and DPO with LoRA.

In the YAML:

    plugins:
      - alphatoken_loss.integrations.axolotl.AlphaTokenPlugin
    alphatoken:
      target: clean.jsonl
      rho: 0.5

`target` (with `target_split`) is read as `alphatoken score` reads one; without it, rows of the training data are held
out. The other keys are the fields of `AlphaTokenArguments`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from axolotl.integrations.base import BasePlugin
from datasets import Dataset
from pydantic import BaseModel, field_validator

from ..tools.score.rows import form_of, load_rows, tokenised
from ..trl.arguments import AlphaTokenArguments
from ..trl.mixin import AlphaTokenMixin

_OWN = {"target": None, "target_split": "train"}  # keys that are not fields of AlphaTokenArguments
_KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class AlphaTokenInput(BaseModel):
    """The key `alphatoken` of an Axolotl configuration."""

    alphatoken: dict[str, Any] | None = None

    @field_validator("alphatoken")
    @classmethod
    def _check(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        fields = {field.name for field in dataclasses.fields(AlphaTokenArguments)}
        unknown = sorted(set(given or {}) - fields - set(_OWN))
        if unknown:
            raise ValueError(
                f"alphatoken: {', '.join(unknown)} is no setting of token values. There are "
                f"{', '.join(sorted(fields | set(_OWN)))}."
            )
        AlphaTokenArguments(**_settings(given))  # whose errors say what is allowed
        return given


class AlphaTokenPlugin(BasePlugin):
    """Axolotl's own SFT or DPO trainer with [`AlphaTokenMixin`] in front."""

    model: Any = None

    def register(self, cfg: dict[str, Any]) -> None:
        """Switch off the fused LoRA kernels that Axolotl switches on by itself: they compute an adapter without calling
        its linears, where ghost values are taken.

        Raises:
            ValueError: the configuration asks for them.
        """
        if cfg.get("alphatoken") is None:
            return
        asked = [name for name in _KERNELS if cfg.get(name)]
        if asked:
            raise ValueError(
                f"{', '.join(asked)}: Axolotl's LoRA kernels pass by the adapter's linears, so their tokens cannot be "
                "valued. Set them to false, or leave them out."
            )
        for name in _KERNELS:
            cfg[name] = False

    def get_input_args(self) -> str:
        return f"{__name__}.AlphaTokenInput"

    def get_training_args_mixin(self) -> str:
        return f"{AlphaTokenArguments.__module__}.AlphaTokenArguments"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {} if cfg.alphatoken is None else _settings(cfg.alphatoken)

    def post_model_load(self, cfg: Any, model: Any) -> None:
        self.model = model

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Axolotl's trainer with token values, or None if the configuration has no `alphatoken`.

        Raises:
            ValueError: the configuration asks for other training than SFT, DPO or IPO, or for DPO without adapter.
        """
        if cfg.alphatoken is None:
            return None
        if cfg.rl is None and not (cfg.reward_model or cfg.process_reward_model):
            from axolotl.core.trainers.base import AxolotlTrainer

            return _with_values(AxolotlTrainer, cfg)
        if str(getattr(cfg.rl, "value", cfg.rl)) in ("dpo", "ipo"):
            if not cfg.adapter:
                raise ValueError(
                    "alphatoken: Axolotl gives a plugin's trainer no reference model, so DPO needs adapter: lora or "
                    "qlora, with which the reference is the base model."
                )
            from axolotl.core.trainers.dpo.trainer import AxolotlDPOTrainer

            return _with_values(AxolotlDPOTrainer, cfg, self)
        raise ValueError(
            f"alphatoken: rl is {cfg.rl} and reward_model is {bool(cfg.reward_model)}; token values train SFT, "
            "rl: dpo and rl: ipo. Remove the key alphatoken for others."
        )


def _settings(given: Any) -> dict[str, Any]:
    """The keys that are fields of AlphaTokenArguments."""
    return {name: value for name, value in dict(given or {}).items() if name not in _OWN}


def _with_values(trainer: Any, cfg: Any, plugin: AlphaTokenPlugin | None = None) -> type:
    """The trainer with token values. Axolotl 0.19 calls a plugin's DPO trainer without a model, which `plugin` has."""
    settings = {**_OWN, **dict(cfg.alphatoken)}

    class AlphaTokenTrainer(AlphaTokenMixin, trainer):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            if plugin is not None and not args and "model" not in kwargs:
                args = (plugin.model,)
            tokenizer = kwargs.get("processing_class", kwargs.get("tokenizer"))
            target = _target(settings, tokenizer, cfg.sequence_len)
            super().__init__(*args, target_dataset=target, **kwargs)

    AlphaTokenTrainer.__name__ = AlphaTokenTrainer.__qualname__ = f"AlphaToken{trainer.__name__}"
    return AlphaTokenTrainer


def _target(settings: dict[str, Any], tokenizer: Any, max_length: int) -> Dataset | None:
    """The tokenised target, or None where none is named."""
    if settings["target"] is None:
        return None
    option = "alphatoken: target"
    rows = load_rows(settings["target"], settings["target_split"], option)
    if form_of(rows, option) != "sft":
        raise ValueError(f"{option} {settings['target']} holds preference pairs; it must be in SFT form.")
    options: dict[str, Any] = {"max_length": max_length, "assistant_only": False, "option": option}
    found = tokenised(rows, range(len(rows)), tokenizer, **options)
    return Dataset.from_list([{"input_ids": row[0].ids, "labels": row[0].labels} for row in found])
