"""What decays."""

from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.optim.groups import decay_groups, describe_groups

CONFIG = PriorConfig(n_layers=1, n_heads=1, d_head=8, text_len=4, grid=2, text_vocab=5, image_vocab=7)


def test_matrices_decay_and_nothing_else() -> None:
    prior = Prior(CONFIG)
    decayed, rest = decay_groups(prior.named_parameters(), 0.045)
    assert decayed["weight_decay"] == 0.045 and rest["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert {name.split(".")[0] for name in decayed["names"]} == {"layers", "heads"}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(prior.parameters()))
    assert "weight decay 0.045: 6 tensors" in describe_groups([decayed, rest])
