"""What was gained and what was lost."""

from adept_fast.evaluation.alpha import largest_alpha
from adept_fast.evaluation.corpora import EvaluationCorpus, corpus
from adept_fast.evaluation.evaluate import evaluate

__all__ = ["EvaluationCorpus", "corpus", "evaluate", "largest_alpha"]
