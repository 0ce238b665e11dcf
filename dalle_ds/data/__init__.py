"""Token data sets. `dalle_ds.data.open` is public; the modules of this package are private."""

from dalle_ds.lazy import lazy_names

__all__ = ["TokenBatch", "TrainBatches", "ValidationBatches", "open"]  # noqa: F822

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "open": "dalle_ds.data.tokens.loading",
        "TrainBatches": "dalle_ds.data.tokens.loading",
        "ValidationBatches": "dalle_ds.data.tokens.loading",
        "TokenBatch": "dalle_ds.data.tokens.batches",
    },
)
