"""Parameter groups: which parameters have weight decay and low-bit moments."""

from dalle_ds.models.prior import Prior, PriorConfig
from dalle_ds.optim.groups import decay_groups, describe_groups

CONFIG = PriorConfig(n_layers=1, n_heads=1, d_head=8, text_len=4, grid=2, vocab_size=5, n_codes=7)


def test_matrices_decay_and_nothing_else() -> None:
    prior = Prior(CONFIG)
    decayed, rest = decay_groups(prior.named_parameters(), 0.045)
    assert decayed["weight_decay"] == 0.045 and rest["weight_decay"] == 0.0
    assert all(p.dim() == 2 for p in decayed["params"])
    assert {name.split(".")[0] for name in decayed["names"]} == {"layers", "heads"}
    assert len(decayed["params"]) + len(rest["params"]) == len(list(prior.parameters()))
    assert "weight decay 0.045, moments fp32, 1 x the rate: 6 tensors" in describe_groups([decayed, rest])


def test_low_bit_moments_are_the_layers_matrices_alone() -> None:
    prior = Prior(CONFIG)
    matrices, unembeddings, rest = groups = decay_groups(prior.named_parameters(), 0.045, "low_bit")
    assert [(g["weight_decay"], g["moments"]) for g in groups] == [(0.045, "low_bit"), (0.045, "fp32"), (0.0, "fp32")]
    assert sorted(matrices["names"]) == [
        f"layers.0.{name}.weight"
        for name in ("attention.branch.project", "attention.branch.qkv", "mlp.branch.expand", "mlp.branch.project")
    ]
    assert sorted(unembeddings["names"]) == ["heads.image.weight", "heads.text.weight"]
    assert sum(len(g["params"]) for g in groups) == len(list(prior.parameters()))
    assert all("moments" not in g for g in decay_groups(prior.named_parameters(), 0.045))
    assert "moments low_bit, 1 x the rate: 4 tensors" in describe_groups(groups)


def test_embeddings_with_another_rate_are_a_group_of_their_own() -> None:
    prior = Prior(CONFIG)
    unembeddings, matrices, embeddings, rest = groups = decay_groups(prior.named_parameters(), 0.045, embedding_rate=3.0)
    assert [(g["weight_decay"], g["relative_rate"]) for g in groups] == [(0.045, 3.0), (0.045, 1.0), (0.0, 3.0), (0.0, 1.0)]
    assert sorted(unembeddings["names"]) == ["heads.image.weight", "heads.text.weight"]
    assert sorted(embeddings["names"]) == sorted(name for name, _ in prior.named_parameters() if name.startswith("embed."))
    assert all(name.startswith("layers.") for name in matrices["names"])
    assert sum(len(g["params"]) for g in groups) == len(list(prior.parameters()))
    assert "3 x the rate" in describe_groups(groups)
    low_bit = decay_groups(prior.named_parameters(), 0.045, "low_bit", embedding_rate=3.0)
    assert [(g["moments"], g["relative_rate"]) for g in low_bit] == [
        ("low_bit", 1.0),
        ("fp32", 3.0),
        ("fp32", 3.0),
        ("fp32", 1.0),
    ]
