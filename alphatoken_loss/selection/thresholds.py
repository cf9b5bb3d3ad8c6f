"""From token values to the tokens that are kept; tensors in, tensors out."""

from __future__ import annotations

import torch

from ..batches.batch import Batch
from ..config import AlphaTokenConfig
from ..values import TokenValues


def keep_mask(values: torch.Tensor, groups: torch.Tensor, *, rho: float) -> torch.Tensor:
    """Keep, in each group, the tokens whose value is at least the group's (1 - rho) quantile.

    The quantile interpolates linearly between neighbours, as `torch.quantile` does. Ties with the threshold are
    kept, so a group in which every token has the same value is kept whole.

    Args:
        values (`torch.Tensor`): `(B, T)` float; higher is better.
        groups (`torch.Tensor`): `(B, T)` int64; tokens with the same number share a threshold, -1 takes no part.
        rho (`float`): share to keep, in (0, 1].

    Returns:
        `torch.Tensor`: `(B, T)` bool; False wherever `groups` is -1.
    """
    taken = groups >= 0
    if rho >= 1.0 or not values.numel():
        return taken
    flat_groups = groups.flatten()
    # Sort by value, then stably by group: each group is one ascending run. Tokens outside form the last run.
    # No shape here depends on the data, so a GPU is never waited for.
    count = flat_groups.numel() + 1
    keys = torch.where(flat_groups >= 0, flat_groups, count - 1)
    by_value = values.flatten().argsort(stable=True)
    order = by_value[keys[by_value].argsort(stable=True)]
    sizes = torch.zeros(count, dtype=torch.long, device=values.device).scatter_add_(0, keys, torch.ones_like(keys))
    starts = sizes.cumsum(0) - sizes
    # 1 - rho carries rounding noise (1 - 0.9 < 0.1) that must not move a rank off a whole number.
    rank = ((sizes - 1).clamp(min=0).double() * (1.0 - rho)).mul(1e6).round().div(1e6)
    low = rank.floor().long()
    high = torch.minimum(low + 1, (sizes - 1).clamp(min=0))
    ascending = values.flatten()[order]
    last = ascending.numel() - 1
    below = ascending[(starts + low).clamp(max=last)]
    above = ascending[(starts + high).clamp(max=last)]
    thresholds = torch.lerp(below, above, (rank - low).to(values.dtype))
    return taken & (values >= thresholds[keys].view_as(values))


def keep_share(values: torch.Tensor, batch: Batch, rho: float, scope: str) -> torch.Tensor:
    """`(B, T)` float32 at the labels: 1 for the top `rho` share by `values`, 0 elsewhere."""
    return keep_mask(values.to(batch.labels.device), _groups(batch, scope), rho=rho).float()


def select(values: TokenValues, batch: Batch, config: AlphaTokenConfig) -> torch.Tensor:
    """`(B, T)` at the labels: bool, True for tokens that are kept; for a soft threshold, float weights in (0, 1)."""
    if config.rho >= 1.0:
        return batch.at_labels(batch.rows)
    if config.threshold_scope == "pair":
        return _whole_pairs(values.total, batch, config)
    groups, total = _groups(batch, config.threshold_scope), values.total
    if config.smoothing:
        total = smoothed(total, groups, batch.segments.roll(1, 1), reach=config.smoothing)
    if config.threshold == "zero":
        return (groups >= 0) & (total >= 0)  # all, where theta is theta*
    if config.threshold == "soft":
        return soft_weights(total, groups, temperature=config.soft_temperature)
    return keep_mask(total, groups, rho=config.rho)


def smoothed(
    values: torch.Tensor,
    groups: torch.Tensor,
    sequences: torch.Tensor,
    *,
    reach: int,
    scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each token's value with those of its neighbours: what helps and what does harm comes in runs.

    A value v counts as v / (|v| + m), m the mean of |v| in its group, so that no single one decides. Of these the mean
    is taken over the `reach` places before and behind in the same sequence, with weights that fall from reach + 1 at
    the token itself to 1. Places that take no part are left out.

    Args:
        values (`torch.Tensor`): `(B, T)` float.
        groups (`torch.Tensor`): `(B, T)` int64, see `keep_mask`.
        sequences (`torch.Tensor`): `(B, T)` int64, the sequence that each token belongs to.
        reach (`int`): at least 1.
        scale (`torch.Tensor`, *optional*): m, where it is that of more than these values; broadcasts to `(B, T)`.

    Returns:
        `torch.Tensor`: `(B, T)` of the values' dtype, between -1 and 1; 0 where all values of a group are, and wherever
        `groups` is -1.
    """
    taken = groups >= 0
    scale = _mean_of_group(values.abs(), groups) if scale is None else scale
    bounded = (values / (values.abs() + torch.where(scale > 0, scale, 1))).masked_fill(~taken, 0)
    total, weight = (reach + 1) * bounded, (reach + 1) * taken.to(bounded)
    for distance in range(1, min(reach, values.shape[1] - 1) + 1):
        early, late = slice(None, -distance), slice(distance, None)
        near = (reach + 1 - distance) * (taken[:, early] & taken[:, late] & (sequences[:, early] == sequences[:, late]))
        total[:, late] += near * bounded[:, early]
        total[:, early] += near * bounded[:, late]
        weight[:, late] += near
        weight[:, early] += near
    return total / weight.clamp(min=1)


def soft_weights(values: torch.Tensor, groups: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """A weight for each token: sigmoid(value / (temperature * s)), s the root mean square of the values of its group.

    The weight is 0.5 at a value of 0. It does not change when all values are scaled. As the temperature goes to 0 it
    goes to 1 for positive and to 0 for negative values.

    Args:
        values (`torch.Tensor`): `(B, T)` float.
        groups (`torch.Tensor`): `(B, T)` int64, see `keep_mask`.
        temperature (`float`): above 0.

    Returns:
        `torch.Tensor`: `(B, T)` of the values' dtype; 0 wherever `groups` is -1, and 0.5 for a group without values.
    """
    spread = _mean_of_group(values.square(), groups).sqrt()
    scaled = values / torch.where(spread > 0, spread * temperature, 1.0)
    return scaled.sigmoid().masked_fill(groups < 0, 0)


def _mean_of_group(values: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    """`(B, T)`: for each token the mean over its group."""
    taken, keys = groups >= 0, groups.flatten().clamp(min=0)
    summed = values.masked_fill(~taken, 0).flatten()
    sums = summed.new_zeros(keys.numel()).scatter_add_(0, keys, summed)
    counts = summed.new_zeros(keys.numel()).scatter_add_(0, keys, taken.flatten().to(summed))
    return (sums / counts.clamp(min=1))[keys].view_as(values)


def _whole_pairs(values: torch.Tensor, batch: Batch, config: AlphaTokenConfig) -> torch.Tensor:
    """`(B, T)`: each pair counts by the sum of its values, and all of its tokens have one weight."""
    if not batch.pairs:
        raise ValueError(
            'threshold_scope is "pair", but the batch holds no preference pairs. Use "batch" or "sequence" for SFT.'
        )
    totals = values.sum(1).view(2, -1).sum(0, keepdim=True)
    groups = torch.where(batch.rows.any(1).view(2, -1).any(0, keepdim=True), 0, -1)
    if config.threshold == "soft":
        kept = soft_weights(totals, groups, temperature=config.soft_temperature)
    elif config.threshold == "zero":
        kept = (groups >= 0) & (totals >= 0)
    else:
        kept = keep_mask(totals, groups, rho=config.rho)
    return batch.rows.roll(1, 1) * kept[0].repeat(2)[:, None]


def _groups(batch: Batch, scope: str) -> torch.Tensor:
    if scope == "pair":
        raise ValueError('threshold_scope is "pair", which only values have. Use "batch" or "sequence".')
    return batch.groups(scope).roll(1, 1)  # the last column predicts nothing
