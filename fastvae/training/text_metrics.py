"""What texts are judged by: BLEU, self-BLEU, distinct n-grams, word frequencies, homogeneity, and language models.

Sentences are strings, tokenized already: words are what white space separates.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastvae.data import TextBatch, TokenBatchSampler, Vocabulary, collate
from fastvae.models.evidence import evaluating
from fastvae.nn import LSTMDecoder
from fastvae.training.metrics import perplexity

_LONGEST_NGRAM = 4  # of BLEU


def bleu(hypotheses: Sequence[str], references: Sequence[str]) -> float:
    """Corpus BLEU of sentences against one reference each, as sacrebleu has it with `tokenize="none"`.

    Args:
        hypotheses: what was written; an empty sentence matches nothing.
        references: what should have been, in the same order.

    Returns:
        0 to 100. Without any n-gram of four words that occurs in its reference the count is smoothed; a corpus whose
        sentences are all shorter than four words has no BLEU, and gets 0.

    Raises:
        ValueError: there are no sentences, or not as many references.

    Source: Papineni et al., BLEU (2002); Post, A Call for Clarity in Reporting BLEU Scores (2018).
    """
    from sacrebleu.metrics import BLEU

    _require_sentences("hypotheses", hypotheses)
    if len(hypotheses) != len(references):
        raise ValueError(
            f"references: expected one for each of the {len(hypotheses)} hypotheses, got {len(references)}"
        )
    return float(BLEU(tokenize="none", force=True).corpus_score(list(hypotheses), [list(references)]).score)


def self_bleu(sentences: Sequence[str]) -> float:
    """Mean BLEU of each sentence against all the others: the higher, the more alike they are.

    Each is sacrebleu's `sentence_bleu` with `tokenize="none"`. The clipped counts come from the two largest counts of
    an n-gram in any sentence, one of which is another's, so the work grows with the words and not with their square.

    Args:
        sentences: at least two.

    Returns:
        0 to 100.

    Raises:
        ValueError: there are fewer than two sentences.

    Source: Zhu et al., Texygen (2018).
    """
    from sacrebleu.metrics import BLEU

    if len(sentences) < 2:
        raise ValueError(f"sentences: expected at least 2, got {len(sentences)}")
    counts = [Counter(_ngrams(sentence, 1, _LONGEST_NGRAM)) for sentence in sentences]
    largest: dict[tuple[str, ...], list[int]] = {}
    for count in counts:
        for ngram, times in count.items():
            largest[ngram] = sorted([*largest.get(ngram, [0, 0]), times])[1:]
    lengths = [len(sentence.split()) for sentence in sentences]
    of_length = Counter(lengths)
    total = 0.0
    for count, length in zip(counts, lengths, strict=True):
        correct, possible = [0] * _LONGEST_NGRAM, [0] * _LONGEST_NGRAM
        for ngram, times in count.items():
            second, first = largest[ngram]
            correct[len(ngram) - 1] += min(times, second if times == first else first)
            possible[len(ngram) - 1] += times
        # The reference length of BLEU is the closest of the others', the shorter of two as close.
        others = (other for other, number in of_length.items() if number > (other == length))
        closest = min(others, key=lambda other: (abs(other - length), other))
        score = BLEU.compute_bleu(correct, possible, length, closest, smooth_method="exp", effective_order=True)
        total += score.score
    return total / len(sentences)


def distinct_n(sentences: Iterable[str], n: int) -> float:
    """Share of different n-grams among all n-grams of some sentences; 0 where there is none.

    Args:
        sentences: their number matters, since n-grams repeat sooner or later: compare as many.
        n: words of an n-gram, at least 1.

    Raises:
        ValueError: n is below 1.

    Source: Li et al., A Diversity-Promoting Objective Function for Neural Conversation Models (2016).
    """
    if n < 1:
        raise ValueError(f"n: expected at least 1, got {n}")
    ngrams = Counter(ngram for sentence in sentences for ngram in _ngrams(sentence, n, n))
    return len(ngrams) / max(ngrams.total(), 1)


def word_kl(samples: Iterable[str], text: Iterable[str], vocabulary: Vocabulary) -> float:
    """KL(p || q) between the word frequencies p of samples and q of a text, in nats.

    Args:
        samples: what a model wrote.
        text: what it was trained on.
        vocabulary: of the model; other words count as `<unk>` on both sides. `</s>` does not count.

    Returns:
        Infinite where the samples hold a word that the text has not.

    Raises:
        ValueError: one side has no word.

    Source: Shi et al., Dispersed Exponential Family Mixture VAEs for Interpretable Text Generation (2020).
    """
    p, q = (_word_frequencies(name, side, vocabulary) for name, side in (("samples", samples), ("text", text)))
    used = p > 0
    if (q[used] == 0).any():
        return float("inf")
    return float((p[used] * np.log(p[used] / q[used])).sum())


def homogeneity(labels: Any, codes: Any) -> float:
    """How far sentences of one code have one label: 1 - H(label | code) / H(label).

    Args:
        labels: of each sentence, `(sentences,)`.
        codes: of each sentence, integers `(sentences,)`, or `(sentences, variables)`, whose rows are one code each.

    Returns:
        0 to 1; 1 where all labels are the same.

    Raises:
        ValueError: there are no sentences, or not as many codes.

    Source: Rosenberg & Hirschberg, V-Measure (2007).
    """
    from sklearn.metrics import homogeneity_score

    labels, codes = np.asarray(labels), np.asarray(codes)
    if labels.ndim != 1 or not len(labels) or codes.ndim not in (1, 2) or len(codes) != len(labels):
        raise ValueError(
            "labels and codes: expected shapes (sentences,) and (sentences,) or (sentences, variables), "
            f"got {labels.shape} and {codes.shape}"
        )
    if codes.ndim == 2:
        codes = np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)
    return float(homogeneity_score(labels, codes))


@dataclass(frozen=True)
class LanguageModel:
    """An LSTM language model, p(x) = product over t of p(x_t | x_<t), and its words.

    Args:
        decoder: without latent vector, in evaluation mode.
        vocabulary: other words are `<unk>` to it, so perplexities compare under one vocabulary alone.
    """

    decoder: LSTMDecoder
    vocabulary: Vocabulary

    @torch.no_grad()
    def nll(self, sentences: Sequence[str]) -> tuple[Tensor, Tensor]:
        """-log p of each sentence in nats, float64, and its predicted tokens, `</s>` counted; each `(sentences,)`.

        Raises:
            ValueError: there are no sentences.
        """
        _require_sentences("sentences", sentences)
        encoded = _encoded(sentences, self.vocabulary)
        nll = torch.zeros(len(encoded), dtype=torch.float64)
        device = self.decoder.output.weight.device
        with evaluating(self.decoder):
            for rows, batch in _batches(encoded, 64, shuffle=False):
                batch = batch.to(device)
                nll[rows] = self.decoder(batch.tokens, None, batch.lengths).double().cpu()
        return nll, torch.tensor([len(sentence) - 1 for sentence in encoded])

    def perplexity(self, sentences: Sequence[str]) -> float:
        """exp(total NLL / predicted tokens), `</s>` counted."""
        nll, tokens = self.nll(sentences)
        return perplexity(float(nll.sum()), float(tokens.sum()))


def train_language_model(
    sentences: Sequence[str],
    vocabulary: Vocabulary | None = None,
    *,
    valid: Sequence[str] | None = None,
    embed_dim: int = 256,
    hidden_size: int = 256,
    num_layers: int = 1,
    dropout: float = 0.3,
    word_dropout: float = 0.0,
    epochs: int = 10,
    batch_size: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> LanguageModel:
    """Train an LSTM language model on sentences, and keep the epoch that is best on sentences held out.

    Adam; the learning rate is halved after an epoch that does not improve on the best, and training ends after the
    second such epoch in a row. The same seed gives the same model; torch's global generator stays as it was.

    Args:
        sentences: to train on; empty ones count, as `<s> </s>`.
        vocabulary: of the model; built from the sentences when None.
        valid: sentences that choose the epoch; each 20th of `sentences` is held out when None.
        embed_dim, hidden_size, num_layers, dropout, word_dropout: as `LSTMDecoder`; `dropout` is also the
            `layer_dropout`.
        epochs: most passes over the sentences.
        batch_size: sentences a step.
        lr: learning rate at first.
        seed: of everything random.
        device: where to train; the model stays there.

    Raises:
        ValueError: a size or rate out of range, or too few sentences: 20, or 1 where `valid` is given.
        FloatingPointError: the loss became NaN or infinite.
    """
    for name, size in (("epochs", epochs), ("batch_size", batch_size)):
        if size < 1:
            raise ValueError(f"{name}: expected at least 1, got {size}")
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr: expected a positive learning rate, got {lr}")
    least = 20 if valid is None else 1
    if len(sentences) < least:
        raise ValueError(f"sentences: expected at least {least} to train a language model on, got {len(sentences)}")
    if valid is None:
        sentences, valid = [sentences[i] for i in range(len(sentences)) if i % 20 != 19], sentences[19::20]
    _require_sentences("valid", valid)
    vocabulary = vocabulary or Vocabulary.build(sentences)
    cuda = [torch.device(device)] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(seed)
        decoder = LSTMDecoder(
            len(vocabulary),
            embed_dim,
            hidden_size,
            0,
            num_layers=num_layers,
            dropout=dropout,
            layer_dropout=dropout,
            word_dropout=word_dropout,
            pad_index=vocabulary.pad_index,
            bos_index=vocabulary.bos_index,
            eos_index=vocabulary.eos_index,
            unk_index=vocabulary.unk_index,
        ).to(device)
        model = LanguageModel(decoder, vocabulary)
        optimizer = torch.optim.Adam(decoder.parameters(), lr=lr, fused=True)
        encoded = _encoded(sentences, vocabulary)
        best, best_weights, failures = float("inf"), decoder.state_dict(), 0
        for epoch in range(epochs):
            decoder.train()
            for _, batch in _batches(encoded, batch_size, shuffle=True, seed=seed, epoch=epoch):
                batch = batch.to(device)
                optimizer.zero_grad(set_to_none=True)
                decoder(batch.tokens, None, batch.lengths).mean().backward()
                nn.utils.clip_grad_norm_(decoder.parameters(), 5.0)
                optimizer.step()
            nll = float(model.nll(valid)[0].mean())
            if not nll < float("inf"):
                raise FloatingPointError(f"the language model's loss became {nll} in epoch {epoch + 1}: lower lr")
            if nll < best:
                best, best_weights, failures = nll, copy.deepcopy(decoder.state_dict()), 0
                continue
            failures += 1
            if failures == 2:
                break
            for group in optimizer.param_groups:
                group["lr"] /= 2
    decoder.load_state_dict(best_weights)
    decoder.eval()
    return model


def reverse_perplexity(samples: Sequence[str], text: Sequence[str], vocabulary: Vocabulary, **settings: Any) -> float:
    """Perplexity of real text under a language model trained on samples: low where they are fluent and diverse.

    Args:
        samples: sentences drawn from a model; compare models by as many.
        text: real sentences, of a test set.
        vocabulary: of the language model, the same for all that are compared.
        settings: of `train_language_model`; the epoch is chosen by samples held out.

    Raises:
        As `train_language_model`.

    Source: Zhao et al., Adversarially Regularized Autoencoders (2018).
    """
    return train_language_model(samples, vocabulary, **settings).perplexity(text)


def _encoded(sentences: Iterable[str], vocabulary: Vocabulary) -> list[Tensor]:
    return [torch.tensor(vocabulary.encode(sentence)) for sentence in sentences]


def _batches(
    encoded: Sequence[Tensor], batch_size: int, *, shuffle: bool, seed: int = 0, epoch: int = 0
) -> Iterator[tuple[list[int], TextBatch]]:
    """Give batches of like length with the places of their sentences, every sentence once."""
    sampler = TokenBatchSampler(
        [len(sentence) for sentence in encoded],
        batch_size=batch_size,
        shuffle=shuffle,
        drop_last=False,
        seed=seed,
        rank=0,
        world_size=1,
    )
    sampler.set_epoch(epoch)
    for rows in sampler:
        yield rows, collate([encoded[row] for row in rows])


def _ngrams(sentence: str, shortest: int, longest: int) -> Iterator[tuple[str, ...]]:
    words = sentence.split()
    for n in range(shortest, longest + 1):
        for start in range(len(words) - n + 1):
            yield tuple(words[start : start + n])


def _word_frequencies(name: str, sentences: Iterable[str], vocabulary: Vocabulary) -> np.ndarray:
    counts = np.zeros(len(vocabulary))
    for sentence in sentences:
        for index in vocabulary.encode(sentence)[1:-1]:
            counts[index] += 1
    if not counts.any():
        raise ValueError(f"{name}: expected at least one word, got none")
    return counts / counts.sum()


def _require_sentences(name: str, sentences: Sequence[str]) -> None:
    if not len(sentences):
        raise ValueError(f"{name}: expected at least one sentence, got none")
