"""User-aware recommendation with language models: users become tokens, a language model ranks their candidates.

The names below are loaded when first used, so that importing the package is quick.
"""

import importlib
from typing import Any

_MODULE_OF = {
    "LetterVerbalizer": "verbalizer",
    "RankingMetrics": "metrics",
    "Report": "report",
    "ULMRecCollator": "tasks.collators",
    "ULMRecTrainer": "trainer",
    "ULMRecTrainingArguments": "trainer",
    "UserIndex": "user_index",
    "UserIndexer": "indexing.indexer",
    "UserRanker": "ranker",
    "UserTokenizer": "tokenization_user",
    "load_retriever": "retrieval.base",
}

__version__ = "0.1.0"
__all__ = [*_MODULE_OF, "__version__"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULE_OF})
