"""Text in, padded batches out: vocabularies, corpora, batching and a corpus of known entropy; vectors and images."""

from fastvae.data.arrays import Samples, Scaling, load_array
from fastvae.data.assistant import AssistantGrammar, Utterance
from fastvae.data.batching import StreamingBatches, TextBatch, TokenBatchSampler, collate
from fastvae.data.corpus import StreamingTextCorpus, TextCorpus, load_text, read_sentences
from fastvae.data.labeled import LabeledBatch, LabeledCorpus, LabeledText, collate_labeled, load_labeled
from fastvae.data.vocabulary import SPECIAL_TOKENS, Vocabulary

__all__ = [
    "SPECIAL_TOKENS",
    "AssistantGrammar",
    "LabeledBatch",
    "LabeledCorpus",
    "LabeledText",
    "Samples",
    "Scaling",
    "StreamingBatches",
    "StreamingTextCorpus",
    "TextBatch",
    "TextCorpus",
    "TokenBatchSampler",
    "Utterance",
    "Vocabulary",
    "collate",
    "collate_labeled",
    "load_array",
    "load_labeled",
    "load_text",
    "read_sentences",
]
