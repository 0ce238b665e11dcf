"""dalle_ds: train the original DALL-E (Ramesh et al. 2021) from raw pictures to samples."""

__version__ = "0.1.0"
