"""Answers of a `DialogueModel`, as strings, and what it is judged by."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastvae.data.dialogues import Exchange, ExchangeCorpus, collate_exchanges, encode_context, load_exchanges
from fastvae.models.evidence import evaluating
from fastvae.training.batches import ordered_batches
from fastvae.training.metrics import Figures, perplexity
from fastvae.training.mixture_metrics import code_probabilities
from fastvae.training.reports import ReportOptions, Rows
from fastvae.training.text_metrics import bleu, distinct_n

if TYPE_CHECKING:
    from fastvae.data import Vocabulary
    from fastvae.models import DialogueModel


_LIKELIEST = 200  # actions that are tried for answers that differ


class Answer(NamedTuple):
    """What is said for an action.

    Attributes:
        codes: the action, one value for each code.
        probability: that the policy gives it.
        text: the answer.
    """

    codes: tuple[int, ...]
    probability: float
    text: str


@dataclass(frozen=True, kw_only=True)
class DialogueEvaluation(Figures):
    """Figures of a `DialogueModel` on exchanges.

    Args:
        nll: -log p(x|context, c) of the real answer with its own code, nats an answer. ppl: a predicted token.
        policy_nll: cross-entropy of the policy with q(c|x), nats an answer.
        bleu: of the policy's answers against the real ones, in the words of the vocabulary.
        distinct_2: share of different word pairs in these answers.
        obeyed: share of the codes that are found again in the answer to an action drawn uniformly, by the VAE's
            likeliest code; 1 / components by chance.
        exchanges, tokens: how many were evaluated; tokens are those predicted, </s> included.
    """

    nll: float
    ppl: float
    policy_nll: float
    bleu: float
    distinct_2: float
    obeyed: float
    exchanges: int
    tokens: int


def answer(
    model: DialogueModel,
    vocabulary: Vocabulary,
    context: Sequence[str],
    *,
    codes: Sequence[Sequence[int]] | None = None,
    count: int = 5,
    most_words: int = 60,
    seed: int = 0,
    **options: Any,
) -> list[Answer]:
    """Answer one context by several actions.

    Args:
        model, vocabulary: what `load_run` gives.
        context: what was said before, the earliest first.
        codes: the actions; when None those of the policy's likeliest 200 whose answers differ, each with the
            probability of all that give this answer.
        count: most answers to give then, the likeliest.
        most_words: of the context, the last tokens that are read; 0 reads all.
        seed: of the draws where options say strategy="sample".
        options: arguments of `DialogueModel.respond`.

    Raises:
        ValueError: the context has no word, or the codes a wrong shape or value.
    """
    if not context or not all(said.split() for said in context):
        raise ValueError("context must be utterances, each with a word")
    row = encode_context(vocabulary, context, most_words)
    return _answers(model, vocabulary, row, codes=codes, count=count, seed=seed, **options)


def _answers(
    model: DialogueModel,
    vocabulary: Vocabulary,
    context: Tensor,
    *,
    codes: Sequence[Sequence[int]] | None = None,
    count: int = 5,
    seed: int = 0,
    **options: Any,
) -> list[Answer]:
    """Answer a context of tokens, int64 `(time,)`; arguments as `answer`."""
    device = model.policy.weight.device
    row = context.unsqueeze(0).to(device)
    if codes is None:
        found, log_p = model.actions(row, n=min(_LIKELIEST, model.vae.components**model.vae.variables))
        chosen, scores = found[0], log_p[0]
    else:
        chosen = torch.tensor([list(action) for action in codes], device=device)
        model.vae.code_mean(chosen)  # tells of wrong codes
        scores = model.code_log_probabilities(row)[0].gather(1, chosen.T).sum(0)
    options["generator"] = torch.Generator(device).manual_seed(seed)
    tokens, _ = model.respond(row.expand(len(chosen), -1), codes=chosen, **options)
    texts = [vocabulary.decode(line) for line in tokens]
    each = [Answer(tuple(c), p, t) for c, p, t in zip(chosen.tolist(), scores.exp().tolist(), texts, strict=True)]
    if codes is not None:
        return each
    different: dict[str, Answer] = {}
    for one in each:
        first = different.get(one.text)
        different[one.text] = one if first is None else first._replace(probability=first.probability + one.probability)
    return sorted(different.values(), key=lambda one: -one.probability)[:count]


@torch.no_grad()
def evaluate_dialogue(
    model: DialogueModel,
    vocabulary: Vocabulary,
    exchanges: Sequence[Exchange],
    *,
    batch_size: int = 64,
    context_words: int = 60,
    max_length: int = 40,
    seed: int = 0,
    data: str = "",
    split: str = "",
) -> DialogueEvaluation:
    """Evaluate a model on exchanges.

    Args:
        model, vocabulary: what `load_run` gives; the model is evaluated with dropout off and left as it was.
        exchanges: at least one.
        batch_size: exchanges at a time.
        context_words: of the context, the last tokens that are read; 0 reads all.
        max_length: most words of an answer that is written.
        seed: of the actions drawn.
        data, split: written into the result as they are.

    Raises:
        ValueError: there are no exchanges, or the model gives a figure that is not finite.
    """
    device = model.policy.weight.device
    generator = torch.Generator(device).manual_seed(seed)
    corpus = ExchangeCorpus(exchanges, vocabulary, context_words=context_words)
    sums = torch.zeros(3, dtype=torch.float64)
    real, written, asked = [], [], []
    drawn: list[Tensor] = []
    with evaluating(model):
        for batch in ordered_batches(corpus, batch_size, collate_exchanges):
            batch = batch.to(device)
            output = model(batch.tokens, batch.context, batch.lengths, batch.context_lengths)
            terms = (output.nll, output.policy_nll, output.tokens)
            sums += torch.stack([term.double().sum() for term in terms]).cpu()
            real += [vocabulary.decode(row) for row in batch.tokens]
            answers, _ = model.respond(batch.context, batch.context_lengths, max_length=max_length)
            written += [vocabulary.decode(row) for row in answers]
            shape = len(batch.tokens), model.vae.variables
            codes = torch.randint(model.vae.components, shape, generator=generator, device=device)
            answers, _ = model.respond(batch.context, batch.context_lengths, codes=codes, max_length=max_length)
            asked += [vocabulary.decode(row) or "<unk>" for row in answers]  # the VAE reads no empty sentence
            drawn.append(codes.cpu())
    nll, policy_nll, tokens = sums.tolist()
    if not math.isfinite(nll + policy_nll):
        raise ValueError(f"the NLL is {nll + policy_nll}: the model's weights are damaged or training diverged")
    again = code_probabilities(model.vae, vocabulary, asked, batch_size=batch_size).argmax(-1)
    return DialogueEvaluation(
        nll=nll / len(real),
        ppl=perplexity(nll, tokens),
        policy_nll=policy_nll / len(real),
        bleu=bleu(written, real),
        distinct_2=distinct_n(written, 2),
        obeyed=float((again == torch.cat(drawn)).double().mean()),
        exchanges=len(real),
        tokens=int(tokens),
        data=data,
        split=split,
    )


def report_dialogue(model: DialogueModel, vocabulary: Vocabulary, options: ReportOptions) -> tuple[Figures, str, Rows]:
    """Measure a `DialogueModel`; arguments and result as `fastvae.training.reports.report_sentences`."""
    exchanges = load_exchanges(options.data, options.split)
    how: dict[str, Any] = options.source | {"context_words": options.context_words}
    result = evaluate_dialogue(model, vocabulary, exchanges, batch_size=options.batch_size, **how)
    rows = [
        ("NLL", f"{result.nll:.4f}", "nats an answer, given its code"),
        ("PPL", f"{result.ppl:.4f}", "a predicted token"),
        ("policy", f"{result.policy_nll:.4f}", "nats an answer, of its code given the context"),
        ("BLEU", f"{result.bleu:.2f}", "of the policy's answers"),
        ("distinct-2", f"{result.distinct_2:.4f}", "of the policy's answers"),
        ("obeyed", f"{result.obeyed:.4f}", f"of the codes asked for; by chance {1 / model.vae.components:.2f}"),
    ]
    title = f"{result.data} ({result.split}): {result.exchanges:,} exchanges, {result.tokens:,} predicted tokens"
    return result, title, rows


def answers_text(
    model: DialogueModel, vocabulary: Vocabulary, exchanges: Sequence[tuple[Tensor, Tensor]], *, seed: int = 0
) -> str:
    """Return the answers to some contexts by their likeliest actions, as readable text.

    Args:
        model: in evaluation mode.
        vocabulary: of the model.
        exchanges: answers and contexts, 1-D int64.
        seed: as `answer`.
    """
    lines = []
    for real, context in exchanges:
        said = [vocabulary.decode(part) for part in _utterances(context, vocabulary)]
        lines += [" / ".join(filter(None, said)), f"  {vocabulary.decode(real)}"]
        for one in _answers(model, vocabulary, context, seed=seed):
            lines.append(f"    {'-'.join(map(str, one.codes))} ({one.probability:.2f}) -> {one.text}")
        lines.append("")
    return "\n".join(lines)


def _utterances(context: Tensor, vocabulary: Vocabulary) -> list[Tensor]:
    ends = ((context == vocabulary.eos_index).nonzero().flatten() + 1).tolist()
    return [context[start:end] for start, end in zip([0, *ends[:-1]], ends, strict=True)]
