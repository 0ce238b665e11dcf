"""CLIP's loss over the batch of all ranks."""

# B pairs of all ranks, b of this rank, D features

import torch
from torch import Tensor
from torch.nn import functional as F

from dalle_ds.parallel.ranks import ALONE, Ranks


def contrastive_loss(
    text_bD: Tensor,
    image_bD: Tensor,
    log_scale: Tensor,
    groups_b: Tensor,
    copies: tuple[Tensor, Tensor] | None = None,
    ranks: Ranks = ALONE,
) -> Tensor:
    """Mean cross-entropy of finding the image of each caption and the caption of each image. Same on every rank.

    Pairs of the same group are no negatives for each other. All ranks must call it together, with equally many pairs. The sum
    over ranks of the gradients is the gradient of one process that has all pairs.

    Args:
        text_bD, image_bD: features of length 1.
        log_scale: logarithm of the factor of the cosines.
        groups_b: int64, equal for pairs of the same group.
        copies: features (b, D) of damaged copies of the images, and bool (b,): whether the copy differs from its image. Those
            that do are negatives of every caption.
    """
    text_BD, image_BD, groups_B = (_of_all_ranks(own, ranks) for own in (text_bD, image_bD, groups_b))
    if ranks.world_size > 1:
        # every rank computes its whole gradient, and the sum over ranks must count it once
        log_scale = log_scale.detach() + (log_scale - log_scale.detach()) / ranks.world_size
    logits_BB = text_BD.float() @ image_BD.float().T * log_scale.exp()
    same_BB = (groups_B[:, None] == groups_B) & ~torch.eye(len(groups_B), dtype=torch.bool, device=groups_B.device)
    logits_BB = logits_BB.masked_fill(same_BB, -torch.inf)
    right_B = torch.arange(len(logits_BB), device=logits_BB.device)
    of_captions = logits_BB
    if copies is not None:
        copies_BD, differs_B = (_of_all_ranks(own, ranks) for own in (copies[0], copies[1].long()))
        of_copies_BB = (text_BD.float() @ copies_BD.float().T * log_scale.exp()).masked_fill(differs_B == 0, -torch.inf)
        of_captions = torch.cat([logits_BB, of_copies_BB], 1)
    return (F.cross_entropy(of_captions, right_B) + F.cross_entropy(logits_BB.T, right_B)) / 2


def _of_all_ranks(own: Tensor, ranks: Ranks) -> Tensor:
    """The values of all ranks in rank order. Gradients flow to those of this rank."""
    if ranks.world_size == 1:
        return own
    start, end = ranks.rank * len(own), (ranks.rank + 1) * len(own)
    all_values = own.new_zeros(ranks.world_size * len(own), *own.shape[1:])
    all_values[start:end] = own.detach()
    ranks.sum(all_values)
    return torch.cat([all_values[:start], own, all_values[end:]])
