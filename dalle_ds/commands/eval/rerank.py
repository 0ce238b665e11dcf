"""`dalle-ds eval rerank`: does reranking by one scorer raise the score of an independent scorer?"""

from typing import Any

from dalle_ds.commands.settings import RerankConfig
from dalle_ds.evaluation.judge import judge


def run(config: RerankConfig) -> dict[str, Any]:
    return judge(config.chosen, config.judged)
