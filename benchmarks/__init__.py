"""CIRR, FashionIQ and CIRCO: annotations, exact ranking, metrics, prediction files."""

from .layout import CHECKED, check_benchmark, check_layout, expected_tree, find_root, missing_images, require_images
from .metrics import HEADLINE, aspect_scores, average, average_precision, score, score_by_kind
from .predictions import SUBMITTED, predictions, read_predictions, write_predictions
from .ranking import rank, rank_subsets, top_k
from .readers import CATEGORIES, TREES, Benchmark, Query, annotation_files, load
