"""The estimators: scikit-learn's own checks, its results, planted dictionaries, files, interruptions, processes."""

import math
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("sklearn")

import joblib
from sklearn import decomposition
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from fastvae import estimators
from fastvae.estimators import DictionaryLearning, MiniBatchDictionaryLearning, SparseCoder

LEARNERS = [DictionaryLearning, MiniBatchDictionaryLearning]
UNTIL_THE_END = {"tol": 0, "max_no_improvement": None}


def planted(features, atoms, nonzeros, samples, seed=0):
    random = np.random.default_rng(seed)
    dictionary = random.standard_normal((atoms, features))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = np.zeros((samples, atoms))
    for row in codes:
        row[random.choice(atoms, nonzeros, replace=False)] = random.standard_normal(nonzeros)
    return codes @ dictionary, dictionary


@pytest.fixture(scope="module")
def data():
    return planted(8, 12, 2, 150)[0]


def objective(x, codes, dictionary, alpha):
    return 0.5 * np.square(x - codes @ dictionary).sum() + alpha * np.abs(codes).sum()


@parametrize_with_checks(
    [
        DictionaryLearning(max_iter=5, transform_algorithm="lasso_cd"),
        MiniBatchDictionaryLearning(max_iter=3, batch_size=20),
    ]
)
def test_scikit_learn_checks(estimator, check):
    check(estimator)


def test_parameters_have_the_names_and_defaults_of_scikit_learn():
    for ours in (*LEARNERS, SparseCoder):
        theirs = getattr(decomposition, ours.__name__)
        given = [] if ours is not SparseCoder else [np.eye(2)]
        mine, expected = ours(*given).get_params(), theirs(*given).get_params()
        assert set(expected) <= set(mine)
        differ = {name for name in expected if name not in ("dictionary", "verbose") and mine[name] != expected[name]}
        assert not differ
        extra = {"transform_tol", "device"} | ({"constraint", "warm_start"} if ours is not SparseCoder else set())
        assert set(mine) - set(expected) == extra


@pytest.mark.parametrize("positive", [False, True])
def test_lasso_codes_are_those_of_scikit_learn(data, positive):
    dictionary = planted(8, 12, 2, 1, seed=5)[1]
    options = {"transform_alpha": 0.2, "positive_code": positive, "transform_algorithm": "lasso_cd"}
    ours, info = SparseCoder(dictionary, transform_tol=1e-11, **options).transform(data, return_info=True)
    expected = decomposition.SparseCoder(dictionary, **options).transform(data)
    np.testing.assert_allclose(ours, expected, atol=1e-4)
    exact, theirs = (objective(data, codes, dictionary, 0.2) for codes in (ours, expected))
    assert exact <= theirs + 1e-9
    assert info.gap.max() <= 1e-11
    assert not info.status.any()


@pytest.mark.parametrize("algorithm", ["omp", "threshold"])
def test_other_codes_are_those_of_scikit_learn(data, algorithm):
    dictionary = planted(8, 12, 2, 1, seed=5)[1]
    options = {"transform_n_nonzero_coefs": 2, "transform_alpha": 0.2, "transform_algorithm": algorithm}
    expected = decomposition.SparseCoder(dictionary, **options).transform(data)
    np.testing.assert_allclose(SparseCoder(dictionary, **options).transform(data), expected, atol=1e-8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("learner", LEARNERS)
def test_shapes_dtypes_and_names(data, learner, dtype):
    x = data.astype(dtype)
    model = learner(10, alpha=0.1, max_iter=3, transform_algorithm="lasso_lars", split_sign=True, random_state=0)
    codes = model.fit(x).transform(x)
    assert model.components_.shape == (10, 8)
    assert codes.shape == (150, 20)
    assert (codes >= 0).all()
    assert model.components_.dtype == codes.dtype == model.dual_gap_.dtype == dtype
    assert model.dual_gap_.shape == (150,)
    assert model.dual_gap_.max() <= 1e-4
    np.testing.assert_allclose(np.linalg.norm(model.components_, axis=1), 1, atol=1e-5)
    back = model.inverse_transform(codes)
    assert back.dtype == dtype
    np.testing.assert_allclose(back, (codes[:, :10] - codes[:, 10:]) @ model.components_, atol=1e-6)
    assert len(model.get_feature_names_out()) == 20
    assert model.get_feature_names_out()[3] == f"{learner.__name__.lower()}3"


@pytest.mark.parametrize("learner", LEARNERS)
def test_learns_as_well_as_scikit_learn(data, learner):
    options = {"n_components": 12, "alpha": 0.2, "max_iter": 30, "random_state": 0, "transform_algorithm": "lasso_cd"}
    if learner is MiniBatchDictionaryLearning:
        options |= UNTIL_THE_END | {"batch_size": 30}
    theirs = getattr(decomposition, learner.__name__)(fit_algorithm="cd", **options).fit(data)
    ours = learner(constraint="ball", **options).fit(data)
    costs = [objective(data, m.transform(data), m.components_, 0.2) for m in (ours, theirs)]
    assert costs[0] <= 1.02 * costs[1]
    assert (np.linalg.norm(ours.components_, axis=1) < 1 + 1e-12).all()


def test_full_iterations_lower_the_objective(data):
    model = DictionaryLearning(12, alpha=0.2, max_iter=20, random_state=0, transform_tol=1e-9).fit(data)
    assert model.n_iter_ == len(model.error_)
    assert (np.diff(model.error_) <= 1e-6 * model.error_[0]).all()
    assert DictionaryLearning(12, alpha=0.2, tol=1e-2, random_state=0).fit(data).n_iter_ < 20


def test_positive_codes_and_positive_dictionary(data):
    options = {"alpha": 0.1, "max_iter": 5, "random_state": 0, "transform_algorithm": "lasso_cd"}
    for learner in LEARNERS:
        model = learner(10, positive_code=True, positive_dict=True, **options).fit(data)
        assert (model.components_ >= 0).all()
        assert (model.transform(data) >= 0).all()


@pytest.mark.parametrize(
    "sizes",
    [
        (20, 30, 3, 6000),
        pytest.param((32, 64, 3, 10000), marks=pytest.mark.slow),
        pytest.param((64, 128, 4, 10000), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_planted_dictionaries_are_recovered(sizes):
    x, dictionary = planted(*sizes)
    passes = {"batch_size": 512, "max_iter": 40, "random_state": 0} | UNTIL_THE_END
    model = MiniBatchDictionaryLearning(sizes[1], alpha=0.1, **passes).fit(x)
    cosines = np.abs(dictionary @ model.components_.T).max(1)
    assert (cosines > 0.99).all(), f"{(cosines > 0.99).mean():.1%}"


@pytest.mark.parametrize("learner", LEARNERS)
def test_repeated_and_unused_atoms_are_replaced(data, learner):
    first = planted(8, 12, 2, 1, seed=5)[1]
    first[1], first[2] = first[0], -first[0]
    model = learner(12, alpha=0.2, max_iter=10, dict_init=first, random_state=0).fit(data)
    cosines = np.abs(model.components_ @ model.components_.T) - np.eye(12)
    assert cosines.max() < 0.999


@pytest.mark.gpu
@pytest.mark.parametrize("learner", LEARNERS)
def test_on_a_gpu_as_on_the_cpu(data, learner):
    options = {
        "alpha": 0.2,
        "max_iter": 3,
        "random_state": 0,
        "transform_tol": 1e-10,
        "transform_algorithm": "lasso_cd",
    }
    ours, expected = (learner(10, device=device, **options).fit(data) for device in ("cuda", "cpu"))
    np.testing.assert_allclose(ours.components_, expected.components_, atol=1e-4)
    np.testing.assert_allclose(ours.transform(data), expected.transform(data), atol=1e-3)
    assert pickle.loads(pickle.dumps(ours)).components_.shape == (10, 8)


# files and interruptions


@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_memory_mapped_data_is_read_batch_by_batch(tmp_path, monkeypatch, dtype):
    values = (np.random.default_rng(0).random((200, 6)) * 200).astype(dtype)
    np.save(tmp_path / "x.npy", values)
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    options = {"alpha": 20, "batch_size": 16, "max_iter": 2, "shuffle": False, "random_state": 0} | UNTIL_THE_END
    in_memory = MiniBatchDictionaryLearning(7, **options).fit(values)

    largest = 0
    read = estimators._SparseCoding._batch

    def batch(self, X, rows, dtype):
        nonlocal largest
        part = read(self, X, rows, dtype)
        largest = max(largest, len(part))
        return part

    monkeypatch.setattr(estimators._SparseCoding, "_batch", batch)
    model = MiniBatchDictionaryLearning(7, **options).fit(mapped)
    assert largest == 16
    np.testing.assert_allclose(model.components_, in_memory.components_, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.transform(mapped), in_memory.transform(values), rtol=1e-3, atol=1e-3)
    shuffled = MiniBatchDictionaryLearning(7, **options | {"shuffle": True}).fit(mapped)
    assert np.isfinite(shuffled.dual_gap_).all()  # every sample had its turn
    DictionaryLearning(7, alpha=20, max_iter=2).fit(mapped)


def test_bad_numbers_in_a_file_are_found(tmp_path):
    values = np.ones((50, 4), np.float32)
    values[40, 2] = np.nan
    np.save(tmp_path / "x.npy", values)
    with pytest.raises(ValueError, match="NaN"):
        MiniBatchDictionaryLearning(batch_size=8, max_iter=1).fit(np.load(tmp_path / "x.npy", mmap_mode="r"))


def test_wrong_settings_are_named(data):
    broken = np.eye(data.shape[1])
    broken[2, 2] = np.nan
    for algorithm in ("threshold", "omp", "lasso_cd"):
        with pytest.raises(ValueError, match="dictionary: expected finite numbers, got nan or inf"):
            SparseCoder(broken, transform_algorithm=algorithm).transform(data)
    coder = SparseCoder(np.eye(data.shape[1]), transform_algorithm="lasso_cd", transform_tol=1e-9)
    with pytest.raises(ValueError, match=r"transform_tol: expected at least 3e-06, .* of torch.float32, got 1e-09"):
        coder.transform(data.astype(np.float32))
    for learner in LEARNERS:
        model = learner(6, max_iter=1, warm_start=True, random_state=0).fit(data)
        with pytest.raises(ValueError, match=r"n_components: expected 6 as in the fit that warm_start .*, got 9"):
            model.set_params(n_components=9).fit(data)


@pytest.mark.parametrize("module", ["pickle", "joblib"])
def test_saved_and_loaded_they_transform_alike(data, tmp_path, module):
    options = {"alpha": 0.2, "max_iter": 3, "random_state": 0, "transform_algorithm": "lasso_cd"}
    models = [learner(10, warm_start=True, **options).fit(data) for learner in LEARNERS]
    models.append(SparseCoder(models[0].components_, transform_algorithm="lasso_cd", transform_alpha=0.2).fit(data))
    for n, model in enumerate(models):
        if module == "pickle":
            loaded = pickle.loads(pickle.dumps(model))
        else:
            path = tmp_path / f"{n}.joblib"
            joblib.dump(model, path)
            loaded = joblib.load(path)
        np.testing.assert_array_equal(loaded.transform(data), model.transform(data))
        assert loaded.get_params().keys() == model.get_params().keys()
        loaded.fit(data)  # goes on where it can


@pytest.mark.parametrize("learner", LEARNERS)
def test_interrupted_anywhere_atoms_and_statistics_belong_together(data, learner, monkeypatch):
    update, calls = estimators.dictionary_update, []

    def interrupted(*args, **options):
        calls.append(args)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return update(*args, **options)

    monkeypatch.setattr(estimators, "dictionary_update", interrupted)
    model = learner(10, alpha=0.2, max_iter=20, random_state=0, warm_start=True, transform_algorithm="lasso_cd")
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(data)
    assert model.interrupted_
    np.testing.assert_allclose(np.linalg.norm(model.components_, axis=1), 1, atol=1e-12)
    before = model.transform(data)
    steps, cost = model.n_steps_, objective(data, before, model.components_, 0.2)
    model.fit(data)
    assert not model.interrupted_
    assert model.n_steps_ > steps
    assert objective(data, model.transform(data), model.components_, 0.2) < cost


def interrupt_at(step):
    def callback(state):
        if state["step"] == step:
            raise KeyboardInterrupt

    return callback


@pytest.mark.parametrize("pickled", [False, True])
def test_an_interrupted_fit_is_usable_and_goes_on_exactly(data, pickled):
    options = {"alpha": 0.2, "batch_size": 40, "max_iter": 4, "random_state": 3, "transform_tol": 1e-9} | UNTIL_THE_END
    whole = MiniBatchDictionaryLearning(10, **options).fit(data)
    model = MiniBatchDictionaryLearning(10, warm_start=True, callback=interrupt_at(5), **options)
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(data)
    assert model.interrupted_
    assert (model.n_steps_, model.n_iter_) == (6, 2)
    assert model.transform(data).shape == (150, 10)
    model.callback = None
    model = pickle.loads(pickle.dumps(model)) if pickled else model
    model.fit(data)
    assert not model.interrupted_
    assert (model.n_steps_, model.n_iter_) == (whole.n_steps_, whole.n_iter_) == (16, 4)
    np.testing.assert_allclose(model.components_, whole.components_, atol=1e-5)
    assert len(model.objective_) == 16
    model.fit(data)  # was finished: as many passes more
    assert model.n_iter_ == 8


def test_other_data_after_an_interrupted_fit_are_passed_over_anew(data):
    options = {"alpha": 0.2, "batch_size": 40, "max_iter": 2, "random_state": 3} | UNTIL_THE_END
    model = MiniBatchDictionaryLearning(10, warm_start=True, callback=interrupt_at(2), **options)
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(data)
    more = np.concatenate([data, data])
    model.set_params(callback=None).fit(more)
    assert model.n_steps_ == 3 + 2 * math.ceil(len(more) / 40)
    assert len(model.dual_gap_) == len(more)


def test_full_iterations_can_be_interrupted_and_go_on(data):
    options = {"alpha": 0.2, "random_state": 3, "tol": 0, "transform_tol": 1e-9}
    whole = DictionaryLearning(10, max_iter=9, **options).fit(data)
    model = DictionaryLearning(10, max_iter=9, warm_start=True, callback=interrupt_at(5), **options)
    with pytest.warns(UserWarning, match="interrupted"):
        model.fit(data)
    assert model.n_iter_ == 6
    model.set_params(callback=None, max_iter=3).fit(data)
    np.testing.assert_allclose(model.components_, whole.components_, atol=1e-4)
    assert len(model.error_) == 9


def test_partial_fit_learns_and_counts(data):
    model = MiniBatchDictionaryLearning(10, alpha=0.2, random_state=0)
    for _ in range(3):
        for start in range(0, 150, 50):
            model.partial_fit(data[start : start + 50])
    assert model.n_steps_ == 9
    assert model.objective_[-1] < 0.9 * model.objective_[0]
    copy = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(
        copy.partial_fit(data[:50]).components_, model.partial_fit(data[:50]).components_
    )  # fmt: skip


def test_given_beginnings_are_used_and_kept(data):
    first, codes = planted(8, 12, 2, 1, seed=5)[1], np.zeros((150, 12))
    before = first.copy()
    model = DictionaryLearning(alpha=0.2, max_iter=2, dict_init=first, code_init=codes).fit(data)
    assert model.components_.shape == (12, 8)
    assert not codes.any()
    np.testing.assert_array_equal(first, before)
    none = MiniBatchDictionaryLearning(alpha=0.2, max_iter=0, dict_init=first).fit(data)
    np.testing.assert_allclose(none.components_, first)


def test_convergence_stops_as_in_scikit_learn(data):
    options = {"alpha": 0.2, "batch_size": 30, "max_iter": 200, "random_state": 0}
    assert MiniBatchDictionaryLearning(12, tol=0.05, **options).fit(data).n_iter_ < 20
    assert MiniBatchDictionaryLearning(12, tol=0, max_no_improvement=3, **options).fit(data).n_iter_ < 200


# messages


def test_missed_tolerances_are_told_once(data):
    coder = SparseCoder(
        planted(8, 12, 2, 1)[1], transform_algorithm="lasso_cd", transform_alpha=0.01, transform_max_iter=1
    )
    with pytest.warns(ConvergenceWarning, match="codes missed the tolerance within 1 iterations") as told:
        _, info = coder.transform(data, return_info=True)
    assert len(told) == 1
    assert info.status.any()


def test_mistakes_are_named(data):
    def fit(**options):
        return MiniBatchDictionaryLearning(**{"max_iter": 1} | options).fit(data)

    for options, message in [
        ({"n_components": 0}, "n_components: expected a whole number of at least 1, got 0"),
        ({"alpha": 0}, "alpha: expected a number above 0, got 0"),
        ({"batch_size": 2.5}, "batch_size: expected a whole number of at least 1, got 2.5"),
        ({"constraint": "cube"}, "constraint: expected one of 'sphere', 'ball', got 'cube'"),
        ({"transform_algorithm": "lars"}, "transform_algorithm: expected one of .*, got 'lars'"),
        ({"dict_init": np.ones((3, 5))}, r"dict_init: expected shape .* = \(3, 8\), got \(3, 5\)"),
        ({"dict_init": np.zeros((3, 8))}, "dict_init: atom 0 is zero"),
        ({"transform_tol": 0}, "tol: expected at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            fit(**options)
    with pytest.raises(ValueError, match=r"transform_algorithm: expected one of 'lasso_lars', .*, got 'lars'"):
        SparseCoder(np.ones((3, 8)), transform_algorithm="lars").transform(data)
    with pytest.raises(ValueError, match=r"code_init: expected shape \(150, 8\), got \(3, 8\)"):
        DictionaryLearning(code_init=np.ones((3, 8))).fit(data)
    with pytest.raises(ValueError, match="X: expected codes of 4 components, got 5"):
        fit(n_components=4).inverse_transform(np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"X: expected 5 features as the dictionary \(3, 5\), got 8"):
        SparseCoder(np.ones((3, 5))).transform(data)
    with pytest.raises(ValueError, match=r"dictionary: expected shape .*, got \(8,\)"):
        SparseCoder(np.ones(8)).fit(data)


def test_progress_bar(data, capfd, monkeypatch):
    pytest.importorskip("rich")

    def shown(**options):
        MiniBatchDictionaryLearning(5, max_iter=2, **options).fit(data)
        return capfd.readouterr().err

    assert "objective" in shown(verbose=True)
    assert shown() == ""  # no terminal
    assert shown(verbose=False) == ""
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert shown(verbose=True) == ""


def test_without_scikit_learn_the_remedy_is_told():
    program = "import sys; sys.modules['sklearn'] = None; sys.modules['sklearn.base'] = None; import fastvae.estimators"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "fastvae.estimators needs scikit-learn: pip install 'fastvae[estimators]'" in done.stderr


# many processes

PROCESS = """
import os, signal, sys, warnings
import numpy as np
import torch.distributed as dist
from fastvae.estimators import DictionaryLearning, MiniBatchDictionaryLearning

signal.signal(signal.SIGINT, signal.default_int_handler)  # which processes in the background may ignore
folder, rank = sys.argv[1], int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
x, first = np.load(f"{folder}/x{rank}.npy"), np.load(f"{folder}/first.npy")
options = dict(alpha=0.2, transform_tol=1e-10, dict_init=first if rank == 0 else -first)
settings = dict(batch_size=20, max_iter=4, shuffle=False, tol=0, max_no_improvement=None, **options)
batches = MiniBatchDictionaryLearning(**settings).fit(x)
partial = MiniBatchDictionaryLearning(**options).partial_fit(x[:20]).partial_fit(x[20:40])
whole = DictionaryLearning(max_iter=5, **options).fit(x)

def interrupt_the_second(state):
    if rank == 1 and state["step"] == 5:
        os.kill(os.getpid(), signal.SIGINT)

warnings.simplefilter("ignore")
resumed = MiniBatchDictionaryLearning(warm_start=True, callback=interrupt_the_second, **settings).fit(x)
steps, handler = resumed.n_steps_, signal.getsignal(signal.SIGINT)
assert resumed.interrupted_ and handler is signal.default_int_handler
resumed.set_params(callback=None).fit(x)
dictionaries = [model.components_ for model in (batches, partial, whole, resumed)]
np.savez(f"{folder}/result{rank}.npz", *dictionaries, batches.n_steps_, steps)
dist.destroy_process_group()
"""


def test_two_processes_learn_as_one(tmp_path, data):
    # A batch of 40 is the union of 20 of each process; of the last, of 10 samples, the second process has none.
    x = data[:130]
    first = planted(8, 12, 2, 1, seed=5)[1]
    first[1] = first[0]  # an atom that the worst sample of both processes replaces
    np.save(tmp_path / "first.npy", first)
    for rank in (0, 1):
        np.save(tmp_path / f"x{rank}.npy", np.concatenate([x[s : s + 20] for s in range(20 * rank, 130, 40)]))
    (tmp_path / "process.py").write_text(PROCESS)
    command = [sys.executable, str(tmp_path / "process.py"), str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank)], env=environment) for rank in (0, 1)]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    options = {"alpha": 0.2, "transform_tol": 1e-10, "dict_init": first}
    batches = MiniBatchDictionaryLearning(batch_size=40, max_iter=4, shuffle=False, **UNTIL_THE_END, **options).fit(x)
    partial = MiniBatchDictionaryLearning(**options).partial_fit(x[:40]).partial_fit(x[40:80])
    whole = DictionaryLearning(max_iter=5, **options).fit(x)
    assert np.abs(batches.components_ @ batches.components_.T - np.eye(12)).max() < 0.999
    results = [np.load(tmp_path / f"result{rank}.npz") for rank in (0, 1)]
    for n, one in enumerate([batches, partial, whole, batches]):
        ours, theirs = (result[f"arr_{n}"] for result in results)
        np.testing.assert_array_equal(ours, theirs)
        np.testing.assert_allclose(ours, one.components_, atol=1e-5)
    assert results[0]["arr_4"] == batches.n_steps_ == 16
    assert results[0]["arr_5"] == results[1]["arr_5"] == 6  # Ctrl-C of one ends both, in the next batch's message
