"""Generation against its definition: every strategy, both types, layers, prefixes, odd sizes; the same in any batch."""

import functools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from fastvae.ops import generation
from fastvae.ops.backend import CORE
from fastvae.ops.generation import BEAM, GREEDY, SAMPLE, Decoder, Search, truncated
from fastvae.ops.random import uniform

PAD, BOS, EOS = 0, 2, 3

# batch, vocabulary, embed, hidden, layers: panels of the core are 12 to 48 words wide, tiles 2 to 8 rows high
SIZES = [(1, 5, 1, 1, 1), (9, 257, 3, 7, 1), (5, 49, 17, 33, 2), (2, 700, 7, 16, 3), (13, 96, 5, 33, 1)]
SEARCHES = {
    "greedy": Search(BOS, EOS, PAD, 12, GREEDY, False),
    "greedy, scored": Search(BOS, EOS, EOS, 12, GREEDY, True),
    "greedy, no bigram twice": Search(BOS, EOS, PAD, 20, GREEDY, False, no_repeat_ngram=2),
    "sample": Search(BOS, EOS, PAD, 12, SAMPLE, True),
    "sample, cold": Search(BOS, EOS, EOS, 12, SAMPLE, True, temperature=0.5),
    "sample, no word twice": Search(BOS, EOS, PAD, 9, SAMPLE, True, temperature=2.0, no_repeat_ngram=1),
    "top k": Search(BOS, EOS, PAD, 12, SAMPLE, True, top_k=3),
    "top many": Search(BOS, EOS, PAD, 12, SAMPLE, False, temperature=1.5, top_k=60),
    "top p": Search(BOS, EOS, PAD, 12, SAMPLE, True, temperature=2.0, top_p=0.9),
    "top k, top p": Search(BOS, EOS, PAD, 12, SAMPLE, True, top_k=20, top_p=0.7, no_repeat_ngram=3),
    "beam": Search(BOS, EOS, PAD, 9, BEAM, True, beam_size=5),
    "beam of one": Search(BOS, EOS, PAD, 9, BEAM, True, beam_size=1, no_repeat_ngram=2),
    "beam, n best": Search(BOS, EOS, EOS, 9, BEAM, True, beam_size=4, length_penalty=0.7, n_best=4),
    "beam, no trigram twice": Search(BOS, EOS, PAD, 15, BEAM, True, beam_size=3, n_best=2, no_repeat_ngram=3),
}


def operands(sizes, dtype=torch.float32, prefix_length=0, seed=0, sharpness=4.0, end_bias=1.0):
    batch, vocabulary, embed, hidden, layers = sizes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    decoder = Decoder(
        embedding=normal(vocabulary, embed),
        weight_input=normal(4 * hidden, embed, scale=sharpness * embed**-0.5),
        weight_hh=normal(layers, 4 * hidden, hidden, scale=sharpness * hidden**-0.5),
        weight_ih=normal(layers - 1, 4 * hidden, hidden, scale=sharpness * hidden**-0.5),
        bias=normal(layers - 1, 4 * hidden),
        static_gates=normal(batch, 4 * hidden),
        h0=normal(layers, batch, hidden),
        c0=normal(layers, batch, hidden),
        output_weight=normal(vocabulary, hidden, scale=sharpness * hidden**-0.5),
        output_bias=normal(vocabulary),
    )
    decoder.output_bias[EOS] += end_bias
    prefix = torch.randint(EOS + 1, max(vocabulary, EOS + 2), (batch, prefix_length), generator=generator)
    free = torch.randint(0, prefix_length + 1, (batch, 1), generator=generator)
    prefix = prefix.masked_fill(torch.arange(prefix_length) >= free, -1)
    seeds = torch.randint(-(2**62), 2**62, (batch,), generator=generator)
    return decoder, prefix, seeds


def rows_of(decoder, rows):
    return decoder._replace(static_gates=decoder.static_gates[rows], h0=decoder.h0[:, rows], c0=decoder.c0[:, rows])


def needs_core():
    if CORE is None:
        pytest.skip("the C++ core is not built")


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("prefix_length", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("name", SEARCHES)
def test_the_core_writes_what_the_definition_writes(name, sizes, dtype, prefix_length):
    """Word by word: the seeds hold no case whose choice hangs on the last digit."""
    needs_core()
    decoder, prefix, seeds = operands(sizes, dtype, prefix_length)
    ours = generation.generate(*decoder, prefix, seeds, *SEARCHES[name])
    expected = generation.reference(*decoder, prefix, seeds, *SEARCHES[name])
    for mine, theirs in zip(ours[:2], expected[:2], strict=True):
        assert torch.equal(mine, theirs)
    torch.testing.assert_close(ours[2], expected[2])
    assert ours[2].any() == SEARCHES[name].log_probs


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("name", SEARCHES)
def test_a_sentence_is_the_same_to_the_bit_in_any_batch_on_any_threads(name, threads, with_threads):
    needs_core()
    search, (decoder, prefix, seeds) = SEARCHES[name], operands((13, 700, 5, 33, 2), prefix_length=2, end_bias=6.0)

    def write(rows):
        return generation.generate(*rows_of(decoder, rows), prefix[rows], seeds[rows], *search)

    whole = with_threads(2, lambda: write(torch.arange(13)))
    assert len(set(whole[1][:, 0].tolist())) > 1, "the case must hold sentences that leave the batch early"
    # Up to 8 rows greedy sentences are found by screening.
    for rows in ([4], [0, 12, 5], [7, 7, 7, 7, 1, 2, 3, 4, 5, 6], [*range(12, -1, -1)]):
        part = with_threads(threads, functools.partial(write, torch.tensor(rows)))
        for mine, all_rows in zip(part, whole, strict=True):
            assert torch.equal(mine, all_rows[rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_log_probs_are_those_of_teacher_forcing(dtype, backend):
    decoder, prefix, seeds = operands((9, 257, 3, 33, 2), dtype, 2)
    for name in ("greedy, scored", "sample, cold", "top k, top p", "beam, no trigram twice"):
        search = SEARCHES[name]
        tokens, lengths, log_probs = generation.generate(*decoder, prefix, seeds, *search)
        step, static, start = generation.recurrence(Decoder(*(t.double() for t in decoder)))
        for place in range(search.n_best):
            states, words = start, torch.full((9,), BOS)
            for t in range(search.max_length):
                expected, states = step(words, static, states)
                words = tokens[:, place, t]
                expected = expected.gather(1, words[:, None])[:, 0].masked_fill(t >= lengths[:, place], 0)
                torch.testing.assert_close(log_probs[:, place, t].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 12, 1.0), (1.5, 0, 0.8), (1.0, 20, 0.7)]
)
def test_sampled_frequencies(temperature, top_k, top_p, backend):
    """Chi-square of 20,000 first words against the tempered and truncated distribution."""
    count = 20_000
    decoder, prefix, seeds = operands((1, 60, 3, 7, 1), sharpness=1.0)
    decoder = rows_of(decoder, torch.zeros(count, dtype=torch.int64))
    search = Search(BOS, EOS, PAD, 1, SAMPLE, False, temperature, top_k, top_p)
    seeds, prefix = torch.arange(count), prefix.expand(count, -1)
    words = generation.generate(*decoder, prefix, seeds, *search)[0][:, 0, 0]
    step, static, states = generation.recurrence(rows_of(decoder, torch.zeros(1, dtype=torch.int64)))
    log_probs = step(torch.full((1,), BOS), static, states)[0][0]
    weights = (
        (generation._allowed(log_probs[None], words.new_empty(1, 0), torch.tensor(0), search) / temperature)
        .double()
        .softmax(-1)
    )
    if top_k or top_p < 1:
        kept, order = truncated(weights, top_k, top_p)
        weights = torch.zeros_like(weights).scatter(-1, order, kept)
    expected = count * (weights / weights.sum())[0]
    observed = words.bincount(minlength=60)
    assert not observed[expected == 0].any()
    likely = expected > 5
    chi_square = ((observed - expected)[likely].square() / expected[likely]).sum()
    freedom = int(likely.sum()) - 1
    assert freedom > 5
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5


def test_the_number_of_step_t_is_element_t_of_the_seed(backend):
    """Words of equal weight, drawn by hand."""
    decoder, prefix, seeds = operands((3, 12, 2, 3, 1))
    decoder = decoder._replace(output_weight=torch.zeros(12, 3), output_bias=torch.zeros(12))
    decoder.output_bias[EOS] = -1e4
    tokens = generation.generate(*decoder, prefix, seeds, *Search(BOS, EOS, PAD, 40, SAMPLE, False))[0][:, 0]
    words = torch.tensor([w for w in range(12) if w not in (PAD, BOS, EOS)])
    for row in range(3):
        assert torch.equal(tokens[row], words[(uniform(seeds[row], torch.arange(40)) * 9).long()])


def test_a_prefix_that_the_sentence_had_anyway_changes_nothing(backend):
    for name in ("greedy, scored", "sample", "top k, top p", "sample, no word twice"):
        decoder, prefix, seeds = operands((9, 257, 3, 7, 1))
        free = generation.generate(*decoder, prefix, seeds, *SEARCHES[name])
        forced = free[0][:, 0, :4].masked_fill(torch.arange(4) >= free[1] - 1, -1)
        again = generation.generate(*decoder, forced, seeds, *SEARCHES[name])
        for before, after in zip(free, again, strict=True):
            assert torch.equal(before, after)


@pytest.mark.parametrize("strategy", [GREEDY, SAMPLE, BEAM])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_no_ngram_repeats(strategy, size, backend):
    decoder, prefix, seeds = operands((9, 12, 3, 7, 1), prefix_length=2)
    decoder.output_bias[EOS] -= 20
    prefix = prefix.masked_fill(prefix < 0, 5)
    if size == 1:
        prefix[:, 1:] = -1
    beams = 3 if strategy == BEAM else 1
    search = Search(BOS, EOS, PAD, 30, strategy, True, beam_size=beams, n_best=beams, no_repeat_ngram=size)
    tokens, lengths, _ = generation.generate(*decoder, prefix, seeds, *search)
    for row, length in zip(tokens.flatten(0, 1).tolist(), lengths.flatten().tolist(), strict=True):
        grams = [tuple(row[i : i + size]) for i in range(length - size + 1)]
        own = grams[max(prefix.shape[1] - size + 1, 0) :]
        assert all(gram not in grams[: grams.index(gram)] for gram in own)
        assert len(set(own)) == len(own)
    free = generation.generate(*decoder, prefix, seeds, *search._replace(no_repeat_ngram=0))[0]
    assert not torch.equal(free, tokens), "the case must hold repetitions to avoid"


@pytest.mark.parametrize("wide", [1.0, 1e3])
def test_screening_misses_no_word(wide):
    """Close calls on purpose: pairs of words whose logits differ by a few last digits, and by none."""
    needs_core()
    decoder, prefix, seeds = operands((8, 500, 5, 33, 1))
    weight, bias = wide * decoder.output_weight, wide * 0.1 * decoder.output_bias
    bias[EOS] = float("-inf")
    weight[250:] = weight[:250] * (1 + 2e-7 * torch.randint(0, 3, (250, 1)))
    bias[250:] = bias[:250]
    decoder = decoder._replace(output_weight=weight, output_bias=bias)
    search = Search(BOS, EOS, PAD, 60, GREEDY, False)
    screened = generation.generate(*decoder, prefix, seeds, *search)
    whole = generation.generate(*decoder, prefix, seeds, *search._replace(log_probs=True))
    assert torch.equal(screened[0], whole[0])
    assert screened[0].unique().numel() > 8


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e-38])
def test_screening_of_weights_that_are_no_numbers(value):
    needs_core()
    decoder, prefix, seeds = operands((3, 100, 5, 7, 1))
    decoder.output_weight[[40, 77]] = value
    search = Search(BOS, EOS, PAD, 20, GREEDY, False)
    screened = generation.generate(*decoder, prefix, seeds, *search)
    whole = generation.generate(*decoder, prefix, seeds, *search._replace(log_probs=True))
    assert torch.equal(screened[0], whole[0])


@pytest.mark.parametrize("name", ["greedy", "greedy, scored", "sample", "top k", "top p"])
def test_where_no_logit_is_a_number_the_sentence_ends(name, backend):
    decoder, prefix, seeds = operands((3, 100, 5, 7, 1))
    decoder.static_gates[1] = float("nan")
    tokens, lengths, log_probs = generation.generate(*decoder, prefix, seeds, *SEARCHES[name])
    assert tokens[1, 0, 0] == EOS
    assert lengths[1] == 1
    assert log_probs[1].isnan().any() == SEARCHES[name].log_probs
    assert (lengths[[0, 2]] > 0).all()


def test_in_steps_as_at_once():
    needs_core()
    for search in SEARCHES.values():
        decoder, prefix, seeds = operands((9, 49, 3, 7, 2), prefix_length=2)
        steps = generation.Steps(decoder, prefix, seeds, search)
        while steps.advance(2):
            pass
        for mine, expected in zip(steps.finish(), generation.generate(*decoder, prefix, seeds, *search), strict=True):
            assert torch.equal(mine, expected)


def test_a_table_of_words_that_is_full_is_begun_again():
    """More words than its 64 MiB hold, with 16 bytes of gates a unit and word."""
    needs_core()
    decoder, prefix, seeds = operands((600, 12000, 1, 512, 1))
    decoder.output_bias[EOS] = -1e4
    search = Search(BOS, EOS, PAD, 24, SAMPLE, True, temperature=100.0)
    tokens, _, log_probs = generation.generate(*decoder, prefix, seeds, *search)
    assert tokens.unique().numel() > 8200, "the table holds 8192 words"
    last = rows_of(decoder, slice(590, 600))
    alone = generation.generate(*last, prefix[590:], seeds[590:], *search)
    assert torch.equal(alone[0], tokens[590:])
    assert torch.equal(alone[2], log_probs[590:])


def test_prefix_out_of_range_is_refused():
    needs_core()
    decoder, prefix, seeds = operands((3, 49, 3, 7, 1), prefix_length=1)
    prefix[1] = 49
    with pytest.raises(IndexError, match="prefix: expected words in"):
        generation.generate(*decoder, prefix, seeds, *SEARCHES["greedy"])


def test_opcheck():
    decoder, prefix, seeds = operands((3, 49, 3, 7, 2), prefix_length=1)
    for name in ("greedy", "sample", "beam, n best"):
        torch.library.opcheck(generation.generate, (*decoder, prefix, seeds, *SEARCHES[name]))
    torch.library.opcheck(generation.linear_rows, (torch.randn(3, 5), torch.randn(7, 5), torch.randn(7)))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (7, 33, 257), (9, 0, 5), (0, 3, 4), (33, 7, 100)], ids=str)
def test_linear_rows(sizes, dtype):
    rows, inner, columns = sizes
    x, weight, bias = (torch.randn(shape, dtype=dtype) for shape in ((rows, inner), (columns, inner), (columns,)))
    out = generation.linear_rows(x, weight, bias)
    torch.testing.assert_close(out, F.linear(x, weight, bias))
    for row in range(rows):
        assert torch.equal(generation.linear_rows(x[row : row + 1], weight, bias)[0], out[row])


def test_truncation_keeps_the_exact_set():
    probs = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for top_k, top_p, kept in [
        (0, 1.0, [1, 3, 2, 0]),
        (2, 1.0, [1, 3]),
        (9, 1.0, [1, 3, 2, 0]),
        (0, 0.3, [1]),
        (0, 0.69, [1, 3]),
        (0, 0.71, [1, 3, 2]),
        (2, 0.5, [1]),  # 0.4 / 0.7 holds half of what top_k left
        (0, 1e-9, [1]),
    ]:
        weights, order = truncated(probs, top_k, top_p)
        assert order[weights > 0].tolist() == kept, (top_k, top_p)


def test_top_k_keeps_the_first_k_of_equal_words():
    weights, order = truncated(torch.full((1, 8), 0.125), 3, 1.0)
    assert order[weights > 0].tolist() == [0, 1, 2]


COMPARE = """
import sys, torch
sys.path.insert(0, {here!r})
import fastvae._C as core
from fastvae.ops import generation
from test_generation import SEARCHES, operands
assert core.isa() == {isa!r}
for name, search in SEARCHES.items():
    for sizes in ((5, 257, 3, 33, 2), (11, 49, 5, 7, 1)):
        decoder, prefix, seeds = operands(sizes, prefix_length=2)
        ours = generation.generate(*decoder, prefix, seeds, *search)
        expected = generation.reference(*decoder, prefix, seeds, *search)
        assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1]), name
        torch.testing.assert_close(ours[2], expected[2])
"""


@pytest.mark.parametrize("isa", ["baseline", "avx2"])
def test_other_instruction_sets(isa):
    needs_core()
    if isa not in CORE.isas():
        pytest.skip(f"this machine or build has no {isa}")
    code = COMPARE.format(here=os.path.dirname(__file__), isa=isa)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTVAE_CPU_ISA": isa}
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert process.returncode == 0, process.stderr
