import pytest
import torch

from fastvae.data import Vocabulary
from fastvae.models import SentenceVAE
from fastvae.training.checkpoint import load_run, read_checkpoint


def write_run(folder, vocab_size=6):
    (folder / "checkpoints").mkdir(parents=True)
    vocabulary = Vocabulary(["one", "two"])
    model = SentenceVAE(vocab_size, embed_dim=4, hidden_size=5, latent_dim=3)
    vocabulary.save(folder / "vocabulary.txt")
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    checkpoint = {"state_dict": state, "model_config": model.config, "train_config": {"data": "x"}}
    torch.save(checkpoint, folder / "checkpoints" / "best.ckpt")
    return model, vocabulary


def test_load_run_gives_back_the_model(tmp_path):
    model, vocabulary = write_run(tmp_path / "run")
    loaded, words, config = load_run(tmp_path / "run")
    assert words == vocabulary
    assert config == {"data": "x"}
    assert not loaded.training
    tokens = torch.tensor([[2, 4, 5, 3]])
    for ours, theirs in zip(loaded.encode(tokens), model.eval().encode(tokens), strict=True):
        assert torch.equal(ours, theirs)


def test_load_run_names_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no run at .*absent"):
        load_run(tmp_path / "absent")
    write_run(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match=r"last\.ckpt is missing; there is a 'best' one"):
        load_run(tmp_path / "run", which="last")
    with pytest.raises(ValueError, match="which must be 'best' or 'last', got 'first'"):
        load_run(tmp_path / "run", which="first")
    (tmp_path / "run" / "vocabulary.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"vocabulary\.txt is missing"):
        load_run(tmp_path / "run")


def test_corrupt_checkpoints_are_named(tmp_path):
    write_run(tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "best.ckpt"
    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"best\.ckpt is corrupt"):
            load_run(tmp_path / "run")
    torch.save({"weights": 1}, path)
    with pytest.raises(ValueError, match="not a checkpoint of a fastvae run"):
        load_run(tmp_path / "run")


def test_vocabulary_of_another_run(tmp_path):
    write_run(tmp_path / "run", vocab_size=9)
    with pytest.raises(ValueError, match=r"trained with 9 words but .* holds 6"):
        load_run(tmp_path / "run")


class Evil:
    def __reduce__(self):
        return (print, ("ran code",))


def test_a_checkpoint_cannot_run_code(tmp_path, capsys):
    torch.save({"state_dict": {}, "model_config": {}, "train_config": Evil()}, tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match="corrupt or not a checkpoint"):
        read_checkpoint(tmp_path / "a.ckpt")
    assert "ran code" not in capsys.readouterr().out
