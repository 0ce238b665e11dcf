"""`dalle-ds eval rerank`: does one scorer's choice raise the scores of another one?"""

from typing import Any

from dalle_ds.commands.settings import RerankConfig
from dalle_ds.evaluation.judge import judge


def run(config: RerankConfig) -> dict[str, Any]:
    return judge(config.chosen, config.judged)
