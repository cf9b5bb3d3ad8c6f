"""What a trainer may not be set up for."""

from __future__ import annotations

from typing import Any


def refuse_what_is_not_modelled(trainer: Any) -> None:
    """Raise an error if a trainer is set up for what token values and KLs do not work under.

    Raises:
        ValueError: it is; the message says what to change.
    """
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    parallel = getattr(trainer.accelerator, "parallelism_config", None)
    refused = {
        "FSDP": trainer.is_fsdp_enabled,
        "DeepSpeed ZeRO-3": trainer.is_deepspeed_enabled and plugin is not None and plugin.zero_stage == 3,
        "tensor, context or sequence parallelism": parallel is not None
        and (parallel.tp_enabled or parallel.cp_enabled or parallel.sp_enabled),
        "nn.DataParallel": trainer.args.n_gpu > 1,
        "torch_compile=True": trainer.args.torch_compile,
    }
    if trainer.is_deepspeed_enabled and trainer.alphatoken_args.precondition:
        raise ValueError(
            "precondition=True reads the optimizer's second moments, which DeepSpeed keeps in its own shards. Set "
            "precondition=False, or train without DeepSpeed."
        )
    if trainer.is_deepspeed_enabled and trainer.alphatoken_args.path_start:
        raise ValueError(
            "path_start is True, but under DeepSpeed the optimizer has copies of the parameters of its own, which "
            "would overwrite theta*. Set path_start=False, or train without DeepSpeed."
        )
    losses, smoothing = getattr(trainer.args, "loss_type", ()), getattr(trainer.args, "label_smoothing", 0)
    if "robust" in losses and smoothing >= 0.5:
        raise ValueError(
            f'label_smoothing is {smoothing!r}; for loss_type="robust" it must be in [0, 0.5): the loss is divided by '
            "1 - 2 * label_smoothing."
        )
    for what in (what for what, used in refused.items() if used):
        raise ValueError(
            f"Training uses {what}, under which neither token values nor a KL can be taken: they need whole blocks "
            "and their whole activations in each process, run as they are. Use one process per device "
            "(DistributedDataParallel), or set rho=1.0, without kl_coef, path_kl and path_start."
        )
