"""What runs on the phone: light encoders, mapping networks, and the query model's checkpoint."""

from .efficientvit import CascadedGroupAttention, EfficientViT, SqueezeExcite, WindowAttention
from .encoders import (
    NAMES,
    BlipEncoder,
    BlipFeature,
    PocketNet,
    TunedBlipEncoder,
    as_map,
    build,
    preprocess,
)
from .mappers import MLP, Phi, TwoSidedModel
from .mobilevitv2 import LinearTransformerLayer, MobileViTBlock, MobileViTV2, SeparableSelfAttention
from .query_model import MAPPERS, MAY_CHANGE, build_query_model, load_query_model, read_checkpoint
from .weights import IMAGENET, load_weights, resize_biases
