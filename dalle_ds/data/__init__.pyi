from dalle_ds.data.loading import TrainBatches as TrainBatches
from dalle_ds.data.loading import ValidationBatches as ValidationBatches
from dalle_ds.data.loading import open as open
from dalle_ds.data.tokens import TokenBatch as TokenBatch
