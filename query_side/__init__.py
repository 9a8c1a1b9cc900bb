"""What runs on the phone: a light encoder and a mapper, together the query model.

    encoder = query_side.build("efficientnet_b2", pretrained="imagenet")
    feature_map = encoder(query_side.preprocess(encoder, pil)[None])  # [1, 1408, 7, 7]
    learner = isa.AdaptiveTokenLearner(encoder.out_channels, blip.word_dim)
    query_model = isa.QueryModel(encoder, learner)
    query_model, settings = query_side.load_query_model("runs/pocket/isa.pt", blip)
"""

from .encoders import NAMES, PocketNet, as_map, build, preprocess
from .layers import DepthwiseConv2d
from .mappers import MLP, Phi, TwoSidedModel
from .query_model import MAPPERS, MAY_CHANGE, build_query_model, load_query_model, read_checkpoint
