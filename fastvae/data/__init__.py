"""Text in, padded batches out: vocabularies, corpora, batching and a corpus of known entropy."""

from fastvae.data.assistant import AssistantGrammar, Utterance
from fastvae.data.batching import StreamingBatches, TextBatch, TokenBatchSampler, collate
from fastvae.data.corpus import StreamingTextCorpus, TextCorpus, load_text, read_sentences
from fastvae.data.vocabulary import SPECIAL_TOKENS, Vocabulary

__all__ = [
    "SPECIAL_TOKENS",
    "AssistantGrammar",
    "StreamingBatches",
    "StreamingTextCorpus",
    "TextBatch",
    "TextCorpus",
    "TokenBatchSampler",
    "Utterance",
    "Vocabulary",
    "collate",
    "load_text",
    "read_sentences",
]
