"""Named sizes of the prior. The paper's table 1 names three of them by "effective" parameters: 12 * d_model^2 per layer."""

from dalle_ds.models.prior import PriorConfig

PRESETS: dict[str, PriorConfig] = {
    # trains on CPUs in minutes; grid and n_codes are the demo's, whose recipe has a text_len of 30 and a vocab_size of 440
    "tiny": PriorConfig(n_layers=4, n_heads=3, text_len=32, grid=8, vocab_size=1024, n_codes=512, conv_kernel=5),
    # trains on one GPU in days; not in the paper; heads have width 64 as in the other sizes
    "0.3b": PriorConfig(n_layers=24, n_heads=16),
    # the paper trained models of "up to 1.2 billion" parameters on Conceptual Captions, but does not state their shape
    "1.2b": PriorConfig(n_layers=24, n_heads=32),
    "2.8b": PriorConfig(n_layers=64, n_heads=30),
    "5.6b": PriorConfig(n_layers=64, n_heads=42),
    "12b": PriorConfig(n_layers=64, n_heads=62),
}


def n_effective_parameters(config: PriorConfig) -> int:
    """Parameters as the paper counts them: the six matrices of every layer, without biases, norms, embeddings, unembeddings."""
    return 12 * config.d_model**2 * config.n_layers
