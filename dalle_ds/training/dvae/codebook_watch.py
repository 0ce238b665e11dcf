"""Notice a codebook that begins to collapse, and say how training answers."""

# K codes

import logging
from typing import Any, Literal

import numpy as np
from pydantic import Field

from dalle_ds.data.reconstruction import codebook_usage
from dalle_ds.recipes import Config

log = logging.getLogger(__name__)

State = Literal["good", "falling", "collapsing"]
_GOOD = 0.8
"""Share of the best perplexity from which a state is good enough to return to."""
_FEW = 0.05
"""Share of the codes; a codebook that uses fewer, although it had the time, has collapsed from the start."""


class CollapseConfig(Config):
    """What training does when codes fall out of use faster than data explain."""

    every: int = Field(50, ge=1, description="updates between two looks at the codes in use")
    fall: float = Field(
        0.5, gt=0, lt=1, description="a perplexity of the codes in use below this share of its best is a collapse that begins"
    )
    returns: int = Field(
        0,
        ge=0,
        description="how often training may return to its last good state, each time with half of the learning rate and twice "
        "the usage weight; 0: a collapse is only told, as in the paper's recipe",
    )


class CodebookWatch:
    """Compares the codes in use with the best before. Every rank has the same counts, so all come to the same result."""

    def __init__(self, config: CollapseConfig, n_codes: int) -> None:
        self.config, self._n_codes = config, n_codes
        self._best, self._n_looks, self.n_returns = 0.0, 0, 0

    @property
    def learning_rate_factor(self) -> float:
        return 0.5**self.n_returns

    @property
    def usage_factor(self) -> float:
        return 2.0**self.n_returns

    def look(self, counts_K: np.ndarray, update: int) -> State:
        """Call it every `every` updates with how often each code was chosen. A collapse that begins is logged."""
        usage = codebook_usage(counts_K)
        self._n_looks += 1
        is_fall = usage.perplexity < self.config.fall * self._best
        is_few = self._n_looks > 1 and usage.n_used < _FEW * self._n_codes
        if is_fall or is_few:
            log.warning(
                "update %d: the codebook is collapsing: perplexity %.0f after %.0f at its best, %d of %d codes in use",
                *(update, usage.perplexity, self._best, usage.n_used, self._n_codes),
            )
            return "collapsing"
        is_good = usage.perplexity >= _GOOD * self._best
        self._best = max(self._best, usage.perplexity)
        return "good" if is_good else "falling"

    def may_return(self) -> bool:
        """Whether training returns to the last good state this time; counted and logged if so."""
        if self.n_returns == self.config.returns:
            return False
        self.n_returns += 1
        self._n_looks = 0
        log.warning(
            "training returns to the weights of its last good state (%d of at most %d times) and goes on with %g of the "
            "learning rate and %g times the usage weight",
            *(self.n_returns, self.config.returns, self.learning_rate_factor, self.usage_factor),
        )
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"best": self._best, "n_looks": self._n_looks, "n_returns": self.n_returns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._best, self._n_looks, self.n_returns = state["best"], state["n_looks"], state["n_returns"]
