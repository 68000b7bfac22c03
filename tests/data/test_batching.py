from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from fastvae.data import (
    StreamingBatches,
    StreamingTextCorpus,
    TextBatch,
    TextCorpus,
    TokenBatchSampler,
    Vocabulary,
    collate,
)

LENGTHS = np.random.default_rng(7).poisson(12, size=4_001) + 3


def padding(batches, lengths):
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    return 1 - sum(lengths[batch].sum() for batch in batches) / padded


def as_lists(batches):
    return [list(map(int, batch)) for batch in batches]


def test_collate_pads_to_the_longest():
    batch = collate([torch.tensor([2, 5, 3]), torch.tensor([2, 5, 6, 7, 3])])
    assert batch.tokens.tolist() == [[2, 5, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert batch.lengths.tolist() == [3, 5]
    assert batch.tokens.dtype == batch.lengths.dtype == torch.int64
    with pytest.raises(ValueError, match="at least one sentence"):
        collate([])


def test_a_batch_moves_whole():
    moved = collate([torch.tensor([2, 3])]).to("meta")
    assert isinstance(moved, TextBatch)
    assert moved.tokens.device.type == moved.lengths.device.type == "meta"


def test_fixed_size_batches_hold_each_sentence_at_most_once():
    sampler = TokenBatchSampler(LENGTHS, batch_size=32)
    batches = as_lists(sampler)
    assert len(sampler) == len(batches) == 4_001 // 32
    assert {len(batch) for batch in batches} == {32}
    flat = list(chain.from_iterable(batches))
    assert len(set(flat)) == len(flat) == 4_000


def test_token_budget_counts_padding():
    sampler = TokenBatchSampler(LENGTHS, max_tokens=1_024)
    batches = sampler.global_batches()
    assert all(LENGTHS[batch].max() * len(batch) <= 1_024 for batch in batches)
    assert all(len(batch) % 8 == 0 for batch in batches)
    flat = np.concatenate(batches)
    assert len(np.unique(flat)) == len(flat) == 4_000
    # Nearly full: as many batches as the tokens need, and a tenth for rounding to multiples of 8.
    assert len(batches) < 1.1 * LENGTHS.sum() / 1_024
    sampler.set_epoch(5)
    assert len(sampler) == len(batches)


def test_bucketing_leaves_little_padding():
    unsorted = np.array_split(np.random.default_rng(0).permutation(4_001), 125)
    assert padding(unsorted, LENGTHS) > 0.3
    assert padding(TokenBatchSampler(LENGTHS, batch_size=32).global_batches(), LENGTHS) < 0.05
    assert padding(TokenBatchSampler(LENGTHS, max_tokens=1_024).global_batches(), LENGTHS) < 0.02


def test_shuffled_batches_are_random():
    sampler = TokenBatchSampler(LENGTHS, batch_size=32)
    first = sampler.global_batches()
    widths = np.array([LENGTHS[batch].max() for batch in first])
    assert abs(np.corrcoef(widths[:-1], widths[1:])[0, 1]) < 0.4  # batches do not come in order of length
    sampler.set_epoch(1)
    second = sampler.global_batches()
    together = {pair for batch in first for pair in pairwise(sorted(batch.tolist()))}
    again = {pair for batch in second for pair in pairwise(sorted(batch.tolist()))}
    assert len(together & again) < 0.1 * len(together)  # sentences meet others in the next epoch


def test_what_is_dropped_changes_and_is_not_biased_in_length():
    sampler = TokenBatchSampler(LENGTHS[:95], batch_size=32)
    dropped = []
    for epoch in range(40):
        sampler.set_epoch(epoch)
        dropped.append(set(range(95)) - set(np.concatenate(sampler.global_batches()).tolist()))
    assert {len(left) for left in dropped} == {31}
    ever = set.union(*dropped)
    assert len(ever) == 95
    assert abs(np.mean([LENGTHS[i] for left in dropped for i in left]) - LENGTHS[:95].mean()) < 0.5


@pytest.mark.parametrize("budget", [{"batch_size": 32}, {"max_tokens": 1_024}])
def test_evaluation_sees_every_sentence_once_longest_first(budget):
    batches = TokenBatchSampler(LENGTHS, **budget, shuffle=False).global_batches()
    flat = np.concatenate(batches)
    assert sorted(flat.tolist()) == list(range(4_001))
    assert (np.diff(LENGTHS[flat]) <= 0).all()
    assert min(map(len, batches)) >= 16
    if "max_tokens" in budget:
        assert all(LENGTHS[batch].max() * len(batch) <= 1_024 for batch in batches)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("budget", [{"batch_size": 32}, {"max_tokens": 1_024}])
def test_the_same_seed_and_epoch_give_the_same_batches(budget, shuffle):
    one = TokenBatchSampler(LENGTHS, **budget, shuffle=shuffle, seed=3)
    other = TokenBatchSampler(LENGTHS, **budget, shuffle=shuffle, seed=3)
    assert as_lists(one) == as_lists(other) == as_lists(one)
    one.set_epoch(1)
    assert (as_lists(one) == as_lists(other)) is not shuffle
    seeded = TokenBatchSampler(LENGTHS, **budget, shuffle=shuffle, seed=4)
    assert (as_lists(seeded) == as_lists(other)) is not shuffle


def test_a_run_resumes_from_seed_and_epoch():
    sampler = TokenBatchSampler(LENGTHS, batch_size=32, seed=11)
    epochs = []
    for epoch in range(3):
        sampler.set_epoch(epoch)
        epochs.append(as_lists(sampler))
        if epoch == 1:
            state = sampler.state_dict()
    resumed = TokenBatchSampler(LENGTHS, batch_size=32)
    resumed.load_state_dict(state)
    assert as_lists(resumed) == epochs[1]
    resumed.set_epoch(resumed.epoch + 1)
    assert as_lists(resumed) == epochs[2]


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("budget", [{"batch_size": 32}, {"max_tokens": 1_024, "multiple_of": 16}])
def test_processes_see_the_data_of_one(budget, shuffle, world_size):
    alone = as_lists(TokenBatchSampler(LENGTHS, **budget, shuffle=shuffle))
    samplers = [
        TokenBatchSampler(LENGTHS, **budget, shuffle=shuffle, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(sampler) for sampler in samplers} == {len(alone)}
    for batch, *shares in zip(alone, *samplers, strict=True):
        assert sorted(chain.from_iterable(shares)) == sorted(batch)
        sizes = {len(share) for share in shares}
        assert sizes == {len(batch) // world_size} if shuffle else max(sizes) - min(sizes) <= 1 <= min(sizes)


@pytest.mark.parametrize("sentences", [8, 33, 34, 47, 63, 65])
def test_no_process_is_left_without_a_sentence_in_evaluation(sentences):
    for world_size in (1, 2, 4, 8):
        for rank in range(world_size):
            sampler = TokenBatchSampler(
                LENGTHS[:sentences], batch_size=16, shuffle=False, rank=rank, world_size=world_size
            )
            assert all(sampler)
            assert len(list(sampler)) == len(sampler)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "give batch_size or max_tokens"),
        ({"batch_size": 8, "max_tokens": 100}, "give batch_size or max_tokens"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_tokens": -5}, "max_tokens must be at least 1, got -5"),
        ({"max_tokens": 100}, "max_tokens=100 cannot hold multiple_of=8 sentences of the longest length"),
        ({"max_tokens": 1000, "multiple_of": 0}, "multiple_of must be at least 1"),
        ({"batch_size": 5_000}, "4001 sentences make no batch, at least 5000 are needed: lower batch_size"),
        ({"batch_size": 32, "rank": 0, "world_size": 3}, "batch_size=32 must be a multiple of world_size=3"),
        ({"max_tokens": 999, "rank": 0, "world_size": 5}, "multiple_of=8 must be a multiple of world_size=5"),
        ({"batch_size": 2, "shuffle": False, "rank": 0, "world_size": 2}, "at least twice world_size=2"),
        ({"batch_size": 32, "rank": 3}, "go together"),
        ({"batch_size": 32, "seed": -1}, "seed must be at least 0, got -1"),
        ({"batch_size": 32, "pool_batches": 0}, "pool_batches must be at least 1"),
    ],
)
def test_nonsense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenBatchSampler(LENGTHS, **arguments)


def test_lengths_and_epoch_are_checked():
    with pytest.raises(ValueError, match="non-empty 1-D array"):
        TokenBatchSampler([], batch_size=2)
    with pytest.raises(ValueError, match="epoch must be at least 0"):
        TokenBatchSampler(LENGTHS, batch_size=2).set_epoch(-1)


@pytest.fixture
def text(tmp_path):
    random = np.random.default_rng(1)
    sentences = [f"s{i} " + "and so on " * random.integers(0, 6) for i in range(330)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(sentences))
    return path, Vocabulary.build(sentences)


def row_keys(batches):
    return [tuple(map(tuple, batch.tokens.tolist())) for batch in batches]


def test_a_loader_over_a_corpus(text):
    path, vocabulary = text
    corpus = TextCorpus(path, vocabulary)
    sampler = TokenBatchSampler(corpus.lengths, batch_size=16, shuffle=False)
    batches = list(DataLoader(corpus, batch_sampler=sampler, collate_fn=collate, num_workers=2))
    assert all(isinstance(batch, TextBatch) for batch in batches)
    rows = [row[:n] for tokens, lengths in batches for row, n in zip(tokens.tolist(), lengths, strict=True)]
    assert sorted(rows) == sorted(corpus[i].tolist() for i in range(len(corpus)))
    assert all(row[0] == 2 and row[-1] == 3 for row in rows)


@pytest.mark.parametrize("budget", [{"batch_size": 10}, {"max_tokens": 300, "multiple_of": 4}])
def test_streamed_batches_hold_the_text(text, budget):
    path, vocabulary = text
    corpus = TextCorpus(path, vocabulary)
    stream = StreamingTextCorpus(path, vocabulary)
    batches = list(StreamingBatches(stream, **budget, pool_sentences=100, drop_last=False))
    rows = [row[:n] for tokens, lengths in batches for row, n in zip(tokens.tolist(), lengths, strict=True)]
    assert sorted(rows) == sorted(corpus[i].tolist() for i in range(len(corpus)))
    assert all(tokens.numel() <= budget.get("max_tokens", 10**9) for tokens, _ in batches)


def test_streamed_batches_are_the_same_for_any_number_of_processes(text):
    path, vocabulary = text

    def batches(rank, world_size):
        stream = StreamingTextCorpus(path, vocabulary, rank=rank, world_size=world_size)
        return list(StreamingBatches(stream, batch_size=8, pool_sentences=80, seed=5))

    alone = batches(0, 1)
    for shares in zip(alone, batches(0, 2), batches(1, 2), strict=True):
        whole, left, right = ([tuple(filter(None, row)) for row in share.tokens.tolist()] for share in shares)
        assert len(left) == len(right) == 4
        assert sorted(left + right) == sorted(whole)


def test_streamed_batches_with_workers_that_live_on(text):
    path, vocabulary = text
    stream = StreamingTextCorpus(path, vocabulary)
    settings = {"batch_size": 10, "pool_sentences": 50, "seed": 2}
    shared, alone = StreamingBatches(stream, **settings), StreamingBatches(stream, **settings)
    loader = DataLoader(shared, batch_size=None, num_workers=2, persistent_workers=True)
    seen = []
    for epoch in range(2):
        shared.set_epoch(epoch)
        alone.set_epoch(epoch)
        seen.append(sorted(row_keys(loader)))
        assert seen[-1] == sorted(row_keys(alone))
    assert seen[0] != seen[1]


def test_streamed_batches_refuse_nonsense(text):
    path, vocabulary = text
    stream = StreamingTextCorpus(path, vocabulary)
    with pytest.raises(ValueError, match="pool_sentences must be a multiple of batch_size=16, got 100"):
        StreamingBatches(stream, batch_size=16, pool_sentences=100)
    with pytest.raises(ValueError, match="max_tokens=30 cannot hold"):
        list(StreamingBatches(stream, max_tokens=30))
    with pytest.raises(ValueError, match="330 sentences make no batch of 400"):
        list(StreamingBatches(stream, batch_size=400))
