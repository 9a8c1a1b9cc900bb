"""CIRR, FashionIQ and CIRCO: annotations, exact ranking, metrics, prediction files.

- Images are compared by name, never by path, so annotations are enough to score a ranking.
  CIRR and FashionIQ: names as in their files. CIRCO: decimal COCO ids without padding ("243611").
- Rankings: dict query id -> names, best first. Every query has one; it may be short.
- The reference image is removed from rankings in CIRR and kept in FashionIQ and CIRCO.
- Metrics are percentages.

CIRR: Liu et al., ICCV 2021. FashionIQ: Wu et al., CVPR 2021. CIRCO: Baldrati et al., ICCV 2023.
"""

from .layout import check_benchmark, missing_images, require_images
from .metrics import HEADLINE, aspect_scores, average, average_precision, score, score_by_kind
from .predictions import predictions, read_predictions, write_predictions
from .ranking import rank, rank_subsets, top_k
from .readers import CATEGORIES, NAMES, PAPERS, Benchmark, Query, load
from .reranking import check_reranking, matching_probabilities, reorder, rerank
