"""The families of models that we support, one description each: all that they differ in stands here.

    family        a window                                   segments     positions      weights of the encoder
    BERT          [CLS] question [SEP] passage [SEP]         0 0 0 1 1    from 0         bert.*
    RoBERTa       <s> question </s> </s> passage </s>        none         after <pad>    roberta.*
    DistilBERT    as BERT                                    none         from 0         distilbert.*
    ELECTRA       as BERT                                    as BERT      from 0         electra.*

RoBERTa numbers its positions after the id of <pad>, which is 1: the first token has position 2. So 514 positions hold 512
tokens. All have the span head's weights in `qa_outputs.*`. The special tokens are not described here, but asked of the
tokenizer: Korean RoBERTas have BERT's.

Decoders differ in what transformers computes (Qwen2 has biases, Qwen3 norms of queries and keys), not in how we call them.
llama/exactness.py checks that. No other file asks for a family's name. Used by: weights.py, bert/model.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qa.schema import FLAG, OBJECT, TEXT, Rule, number, optional, whole

SIZES = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                       "max_position_embeddings"), whole(1))
SHARE, SMALL, SIZE = optional(number(0, 0.999)), optional(number(0, 1)), optional(whole(1))
ENCODER = SIZES | {"hidden_act": TEXT, "layer_norm_eps": SMALL, "initializer_range": SMALL, "hidden_dropout_prob": SHARE,
                   "attention_probs_dropout_prob": SHARE}
DECODER = SIZES | {"num_key_value_heads": SIZE, "head_dim": SIZE, "hidden_act": TEXT, "rms_norm_eps": SMALL,
                   "attention_dropout": SHARE, "rope_theta": optional(number(1)), "quantization_config": optional(OBJECT),
                   "sliding_window": SIZE, "use_sliding_window": optional(FLAG), "max_window_layers": optional(whole(0))}


@dataclass(frozen=True)
class Family:
    model_type: str  # transformers' name, in config.json
    reader: str  # "bert" or "llama": which of the two trains and reads it
    fields: dict[str, Rule]  # of config.json, in BERT's words; transformers checks the types of what is not here
    names: dict[str, str] = field(default_factory=dict)  # BERT's word -> the family's own, where they differ
    # encoders only
    encoder: str = ""  # its attribute in transformers' ...ForQuestionAnswering: the weights' names begin with it
    pretraining: tuple[str, ...] = ()  # what the weights of its pretraining heads begin with: these may be left behind
    has_segments: bool = False  # it is told which tokens are the passage's (`token_type_ids`)
    counts_from_pad: bool = False  # its positions begin after the id of the padding token

    @property
    def schema(self) -> dict[str, Rule]:
        """`fields`, in the family's own words."""
        return {self.name(word): rule for word, rule in self.fields.items()}

    def name(self, word: str) -> str:
        return self.names.get(word, word)

    def most_tokens(self, config) -> int:
        """How many tokens have a position."""
        return config.max_position_embeddings - (config.pad_token_id + 1 if self.counts_from_pad else 0)


def _roberta(model_type: str) -> Family:
    return Family(model_type, "bert", ENCODER | {"type_vocab_size": SIZE, "pad_token_id": whole(0)}, encoder="roberta",
                  pretraining=("lm_head.",), counts_from_pad=True)


SEGMENTS = {"type_vocab_size": optional(whole(2))}
FAMILIES = {family.model_type: family for family in (
    Family("bert", "bert", ENCODER | SEGMENTS, encoder="bert", pretraining=("cls.",), has_segments=True),
    _roberta("roberta"),
    _roberta("xlm-roberta"),
    _roberta("camembert"),
    Family("distilbert", "bert", ENCODER, encoder="distilbert", pretraining=("vocab_",), names={
        "hidden_size": "dim", "intermediate_size": "hidden_dim", "num_hidden_layers": "n_layers",
        "num_attention_heads": "n_heads", "hidden_act": "activation", "hidden_dropout_prob": "dropout",
        "attention_probs_dropout_prob": "attention_dropout"}),
    Family("electra", "bert", ENCODER | SEGMENTS | {"embedding_size": SIZE}, encoder="electra", has_segments=True,
           pretraining=("discriminator_predictions.", "generator_predictions.", "generator_lm_head.")),
    *(Family(model_type, "llama", DECODER) for model_type in ("llama", "mistral", "qwen2", "qwen3")),
)}


def names_for(reader: str) -> str:
    """To print: the families that a reader supports."""
    *others, last = (repr(name) for name, family in FAMILIES.items() if family.reader == reader)
    return f"{', '.join(others)} or {last}"
