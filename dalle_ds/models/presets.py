"""Named sizes of the prior. The paper's table 1 names three by their "effective" count, 12 * d_model^2 a layer."""

from dalle_ds.models.prior import PriorConfig

PRESETS: dict[str, PriorConfig] = {
    # CPU minutes: text, grid and vocabularies come from the demo's data
    "tiny": PriorConfig(n_layers=4, n_heads=3, text_len=32, grid=8, vocab_size=1024, n_codes=512, conv_kernel=5),
    # what one GPU trains in days; ours, its heads of 64 like the others'
    "0.3b": PriorConfig(n_layers=24, n_heads=16),
    # the paper explored "up to 1.2 billion" on Conceptual Captions; the shape is ours
    "1.2b": PriorConfig(n_layers=24, n_heads=32),
    "2.8b": PriorConfig(n_layers=64, n_heads=30),
    "5.6b": PriorConfig(n_layers=64, n_heads=42),
    "12b": PriorConfig(n_layers=64, n_heads=62),
}


def effective_parameters(config: PriorConfig) -> int:
    """The paper's count: the six matrices of every layer, without biases, norms, embeddings and unembeddings."""
    return 12 * config.d_model**2 * config.n_layers
