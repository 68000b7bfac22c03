"""The dictionary's update against scikit-learn's sequential one, and the replacement of atoms."""

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from fastvae.ops import dictionary as dictionary_module
from fastvae.ops.dictionary import dictionary_update, replace_atoms

SIZES = [(1, 1, 7), (7, 5, 30), (33, 16, 100), (65, 33, 257)]  # atoms, features, samples


def problem(atoms, features, samples, dtype=torch.float64):
    generator = torch.Generator().manual_seed(atoms)
    dictionary = normalize(torch.randn(atoms, features, dtype=torch.float64, generator=generator))
    codes = torch.randn(samples, atoms, dtype=torch.float64, generator=generator)
    codes *= torch.rand(codes.shape, generator=generator) < 0.3
    codes[0] = 1  # every atom is used
    x = torch.randn(samples, features, dtype=torch.float64, generator=generator)
    return [t.to(dtype) for t in (dictionary, codes.T @ codes, codes.T @ x, x, codes)]


def objective(dictionary, code_gram, cross):
    return 0.5 * torch.trace(dictionary.T @ code_gram @ dictionary) - (dictionary * cross).sum()


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_ball_is_the_sequential_update(sizes, positive):
    update = pytest.importorskip("sklearn.decomposition._dict_learning")._update_dict
    dictionary, code_gram, cross, x, codes = problem(*sizes)
    expected = dictionary.numpy().copy()
    update(expected, x.numpy(), codes.numpy(), code_gram.numpy(), cross.T.numpy(), positive=positive)
    ours = dictionary_update(dictionary, code_gram, cross, constraint="ball", positive=positive)
    definition = dictionary_module.reference(dictionary, code_gram, cross, False, positive)
    for result in (ours, definition):
        np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_sphere_has_unit_atoms_and_each_sweep_improves(sizes):
    dictionary, code_gram, cross, _, _ = problem(*sizes)
    before = objective(dictionary, code_gram, cross)
    for _ in range(3):
        dictionary = dictionary_update(dictionary, code_gram, cross)
        torch.testing.assert_close(dictionary.norm(dim=1), torch.ones(sizes[0], dtype=torch.float64))
        after = objective(dictionary, code_gram, cross)
        assert after <= before + 1e-12
        before = after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_other_types_are_near_float64(dtype):
    exact = problem(33, 16, 100)[:3]
    stored = exact[0].to(dtype)
    ours = dictionary_update(stored, exact[1].float(), exact[2].float())
    assert ours.dtype == dtype
    expected = dictionary_update(stored.double(), *exact[1:])
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps + 1e-5)


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu():
    inputs = problem(65, 33, 257)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        ours = dictionary_update(*[t.to("cuda", dtype) for t in inputs[:3]])
        expected = dictionary_update(*inputs[:3])
        torch.testing.assert_close(ours.cpu().double(), expected, rtol=0, atol=tolerance)
    assert len(replace_atoms(*[t.cuda() for t in inputs]).replaced) == 0


@pytest.mark.parametrize("constraint", ["sphere", "ball"])
def test_unused_atoms_stay(constraint):
    dictionary, code_gram, cross, _, _ = problem(7, 5, 30)
    for dead in (2, 6):
        code_gram[dead], code_gram[:, dead], cross[dead] = 0, 0, 0
    code_gram[2, 2] = 1e-7 * code_gram.diagonal().mean()
    dictionary[6] = 0
    ours = dictionary_update(dictionary, code_gram, cross, constraint=constraint)
    assert torch.equal(ours[[2, 6]], dictionary[[2, 6]])
    assert not torch.equal(ours[3], dictionary[3])
    assert torch.equal(dictionary_update(dictionary, 0 * code_gram, 0 * cross), dictionary)


def test_is_an_op_and_leaves_its_inputs_alone():
    dictionary, code_gram, cross, _, _ = problem(33, 16, 100)
    before = [t.clone() for t in (dictionary, code_gram, cross)]
    ours = dictionary_update(dictionary, code_gram, cross)
    assert all(torch.equal(a, b) for a, b in zip(before, (dictionary, code_gram, cross), strict=True))
    strided = [t.T.contiguous().T for t in before]
    torch.testing.assert_close(dictionary_update(*strided), ours)
    torch.library.opcheck(dictionary_module._update, (dictionary, code_gram, cross, True, False))
    assert not dictionary_update(dictionary.requires_grad_(), code_gram, cross).requires_grad
    compiled = torch.compile(dictionary_update, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(dictionary.detach(), code_gram, cross), ours)
    empty = [torch.empty(0, 5), torch.empty(0, 0), torch.empty(0, 5)]
    assert dictionary_update(*empty).shape == (0, 5)


def test_dead_and_repeated_atoms_give_way_to_the_worst_samples():
    dictionary, code_gram, cross, x, codes = problem(7, 5, 30)
    dictionary[4] = -dictionary[1]
    code_gram[4, 4], code_gram[1, 1] = 3, 5  # the one used less goes
    code_gram[6, 6] = 0
    worst = torch.linalg.vector_norm(x - codes @ dictionary, dim=1).argsort(descending=True)[:2]
    new = replace_atoms(dictionary, code_gram, cross, x, codes)
    assert new.replaced.tolist() == [4, 6]
    torch.testing.assert_close(new.dictionary[[4, 6]], normalize(x[worst]))
    for dead in (4, 6):
        assert not new.code_gram[dead].any()
        assert not new.code_gram[:, dead].any()
        assert not new.cross[dead].any()
    kept = [0, 1, 2, 3, 5]
    assert torch.equal(new.dictionary[kept], dictionary[kept])
    assert torch.equal(new.code_gram[kept][:, kept], code_gram[kept][:, kept])
    assert torch.equal(new.cross[kept], cross[kept])


def test_nothing_is_replaced_without_need_or_by_samples_without_error():
    dictionary, code_gram, cross, x, codes = problem(7, 5, 30)
    assert replace_atoms(dictionary, code_gram, cross, x, codes).dictionary is dictionary
    code_gram[2, 2] = 0
    for samples in (codes @ dictionary, 0 * x):
        exact = codes if samples.any() else 0 * codes
        assert len(replace_atoms(dictionary, code_gram, cross, samples, exact).replaced) == 0
    assert replace_atoms(dictionary, code_gram, cross, x[:1], codes[:1]).replaced.tolist() == [2]


def test_mistakes_are_named():
    dictionary, code_gram, cross, x, codes = problem(7, 5, 30)
    with pytest.raises(ValueError, match=r"code_gram: expected shape \(atoms, atoms\) = \(7, 7\), got \(5, 5\)"):
        dictionary_update(dictionary, code_gram[:5, :5], cross)
    with pytest.raises(ValueError, match=r"cross: expected shape \(atoms, features\) = \(7, 5\), got \(5, 7\)"):
        dictionary_update(dictionary, code_gram, cross.T)
    with pytest.raises(ValueError, match="constraint: expected one of 'sphere', 'ball', got 'cube'"):
        dictionary_update(dictionary, code_gram, cross, constraint="cube")
    with pytest.raises(TypeError, match=r"dictionary: expected float32.*, got torch.int64"):
        dictionary_update(dictionary.long(), code_gram, cross)
    with pytest.raises(TypeError, match=r"cross: expected torch\.float64 as code_gram, got torch.float32"):
        dictionary_update(dictionary, code_gram, cross.float())
    with pytest.raises(ValueError, match=r"codes: expected shape \(samples, atoms\) = \(30, 7\), got \(29, 7\)"):
        replace_atoms(dictionary, code_gram, cross, x, codes[1:])
