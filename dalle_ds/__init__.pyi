from dalle_ds import data as data
from dalle_ds.errors import UserError as UserError
from dalle_ds.interface.loading import load as load
from dalle_ds.interface.loading import load_scorer as load_scorer
from dalle_ds.interface.model import Loss as Loss
from dalle_ds.interface.model import Model as Model
from dalle_ds.interface.model import Sample as Sample
from dalle_ds.sampling.scorer import Scorer as Scorer

__version__: str
