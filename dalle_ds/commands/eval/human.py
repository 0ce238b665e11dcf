"""`dalle-ds eval human`: human evaluation with the paper's two questions: build the pages, then count the votes."""

from typing import Any

from dalle_ds.commands.settings import HumanBuildConfig, HumanTallyConfig
from dalle_ds.evaluation.human_page import build_pages
from dalle_ds.evaluation.human_votes import TallyConfig, tally


def build(config: HumanBuildConfig) -> dict[str, Any]:
    return build_pages(config.ours, config.theirs, config.out, limit=config.limit, per_page=config.per_page, seed=config.seed)


def count(config: HumanTallyConfig) -> dict[str, Any]:
    rule = TallyConfig(fast_seconds=config.fast_seconds, fast_share=config.fast_share, disagreement=config.disagreement)
    return tally(config.votes, config.key, n_votes=config.n_votes, rule=rule)
