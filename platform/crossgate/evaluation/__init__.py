"""Measurement: retrieval, probes, classification, gate diagnostics, intervals, figures, the report.

Takes arrays (`Predictions`), knows nothing of data, models or clusters. Thresholds, fixed weights and regularisation
are chosen on validation; test clips are only scored.
"""

from crossgate.evaluation.classifier import classifier_scores, evaluate_classifier
from crossgate.evaluation.comparison import compare_gates, positive_class
from crossgate.evaluation.evaluation import Evaluation
from crossgate.evaluation.predictions import Predictions, collect, concatenate
from crossgate.evaluation.pretrain import evaluate_pretrain, retrieval_scores
from crossgate.evaluation.report import Section, write_report
from crossgate.evaluation.results import read_results, write_results
from crossgate.evaluation.training import training_section

__all__ = [
    "Evaluation",
    "Predictions",
    "Section",
    "classifier_scores",
    "collect",
    "compare_gates",
    "concatenate",
    "evaluate_classifier",
    "evaluate_pretrain",
    "positive_class",
    "read_results",
    "retrieval_scores",
    "training_section",
    "write_report",
    "write_results",
]
