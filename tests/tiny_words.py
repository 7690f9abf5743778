"""A random three-headed model with a tokenizer of forty words, which is saved and loaded in no time."""
import torch
from tokenizers import Tokenizer, models as token_models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, XLMRobertaConfig, XLMRobertaModel

from bgem3_nb.model import init_heads, M3Config, M3Model, ProjectionHead
from bgem3_nb.projection import M3WithHead

D, WORDS = 32, 40
TEXTS = ["w5 w6 w7 w5", "w9", "w1 w2 w3 w30 w31 w32 w33 w34 w35 w36 w37 w38 w39 w8 w8", "unknown words w3"]
PROMPTS = dict(query_prompt="w11 w12 ", passage_prompt="w13 ", max_length=12)


def tiny_tokenizer():
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = {w: i for i, w in enumerate([*special, *(f"w{i}" for i in range(WORDS))])}
    rules = Tokenizer(token_models.WordLevel(words, unk_token="<unk>"))
    rules.pre_tokenizer = pre_tokenizers.Whitespace()
    rules.post_processor = processors.TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>",
                                                         special_tokens=[("<s>", 0), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=rules, bos_token="<s>", eos_token="</s>", cls_token="<s>",
                                   sep_token="</s>", pad_token="<pad>", unk_token="<unk>")


def tiny(tokenizer, pooling="mean", positions=42, heads=4, **settings):
    torch.manual_seed(0)
    config = XLMRobertaConfig(vocab_size=WORDS + 4, hidden_size=D, num_hidden_layers=2, num_attention_heads=heads,
                              intermediate_size=48, max_position_embeddings=positions, pad_token_id=1, bos_token_id=0,
                              eos_token_id=2)
    model = M3Model(XLMRobertaModel(config, add_pooling_layer=False), tokenizer,
                    M3Config(pooling, **PROMPTS, **settings))
    init_heads(model, "random")
    return model.eval()


def projected(tokenizer, bias):
    "A tiny model with a projection, with bias and layer norm or with neither."
    head = ProjectionHead(D, 12, bias, layer_norm=bias)
    for name, p in head.named_parameters():
        if name != "linear.weight": torch.nn.init.normal_(p)
    return M3WithHead(tiny(tokenizer), head)


def expanding(tokenizer):
    "A tiny model whose lexical head expands to a part of the words."
    model = tiny(tokenizer, "cls", lexical="expansion", lexical_terms=5)
    model.lexical_head.restrict_vocabulary(torch.arange(6, 30))
    torch.nn.init.normal_(model.lexical_head.bias)
    return model
