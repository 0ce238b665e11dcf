from dalle_ds.data.tokens.batches import TokenBatch as TokenBatch
from dalle_ds.data.tokens.loading import TrainBatches as TrainBatches
from dalle_ds.data.tokens.loading import ValidationBatches as ValidationBatches
from dalle_ds.data.tokens.loading import open as open
