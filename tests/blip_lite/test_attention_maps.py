"""TextEncoder.attention_maps, which Figures 5 and 6 draw, against transformers."""

import torch
from conftest import with_large_weights

from blip_lite.bert import TextEncoder


def test_attention_maps_equal_transformers():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=128, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=512, attn_implementation="eager", type_vocab_size=1,
    )
    theirs = with_large_weights(BertModel(config))
    torch.nn.init.zeros_(theirs.embeddings.token_type_embeddings.weight)
    ours = TextEncoder(50, 512, 128, 3, 64)
    ours.load_state_dict(theirs.state_dict(), strict=False)
    words = torch.randn(3, 9, 128)
    mask = (torch.arange(9)[None] < torch.tensor([9, 5, 7])[:, None]).long()
    maps = ours.attention_maps(words, mask)
    want = theirs(inputs_embeds=words, attention_mask=mask, output_attentions=True).attentions
    torch.testing.assert_close(maps, torch.stack(want, dim=1), atol=1e-5, rtol=0)
    assert maps[1, ..., 5:].abs().max() == 0  # padding is not looked at
    assert maps.std(dim=-1).mean() > 0.05  # and they are not flat
