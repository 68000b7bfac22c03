import json
import subprocess
import sys

import pytest
import torch
from torch import nn

from fastvae.models import IWAE, VAE, DenoisingAutoEncoder, LinearAutoEncoder, SentenceVAE
from fastvae.models.pretrained import Pretrained
from fastvae.nn import ConvDecoder, ConvEncoder, MLPDecoder, MLPEncoder, OneHot

TOKENS = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])


def sentence_vae(**changes):
    return SentenceVAE(11, embed_dim=6, hidden_size=6, latent_dim=3, **changes)


def categorical_vae():
    encoder = nn.Sequential(nn.Flatten(1, 2), OneHot(4), ConvEncoder((4, 6, 5), (3,)))
    decoder = nn.Sequential(ConvDecoder(2, (4, 6, 5), (3,)), nn.Unflatten(2, (1, 6)))
    return VAE(encoder, decoder, 2, likelihood="categorical", estimator="score_function_baseline")


def denoising():
    encoder = nn.Sequential(nn.Linear(7, 5, bias=False), nn.ReLU(), nn.Linear(5, 2))
    return DenoisingAutoEncoder(encoder, nn.Linear(2, 7), level=0.3)


MODELS = {
    "sentence": sentence_vae,
    "tied and shared": lambda: sentence_vae(tie_weights=True, share_embedding=True, num_layers=2),
    "categorical": categorical_vae,
    "iwae": lambda: IWAE(MLPEncoder((7,), (5,)), MLPDecoder(2, (7,), (5,)), 2, num_samples=3, posterior="full"),
    "denoising": denoising,
    "linear": lambda: LinearAutoEncoder(7, 2, tied=False),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_is_loaded_is_what_was_saved(name, dtype, tmp_path):
    torch.manual_seed(0)
    model = MODELS[name]().to(dtype)
    model.save_pretrained(tmp_path / "deep" / "folder")
    loaded = type(model).from_pretrained(tmp_path / "deep" / "folder")
    assert not loaded.training
    assert loaded.config == model.config
    assert str(loaded) == str(model.eval())
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        assert torch.equal(before[key], after[key]), key


def test_tied_tensors_are_stored_once_and_stay_tied(tmp_path):
    MODELS["tied and shared"]().save_pretrained(tmp_path)
    loaded = SentenceVAE.from_pretrained(tmp_path)
    assert loaded.decoder.output.weight is loaded.decoder.embedding.weight is loaded.encoder.embedding.weight
    apart = tmp_path / "apart"
    sentence_vae(num_layers=2).save_pretrained(apart)
    saved = (apart / "model.safetensors").stat().st_size - (tmp_path / "model.safetensors").stat().st_size
    assert saved > 2 * 4 * 11 * 6  # two embeddings less
    loaded(TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in loaded.parameters())


def test_a_process_that_never_trained_loads_it_without_lightning(tmp_path):
    torch.manual_seed(1)
    model = sentence_vae().eval()
    model.save_pretrained(tmp_path)
    code = """
import sys
for name in ("lightning", "rich", "matplotlib", "yaml", "sklearn", "sacrebleu"):
    sys.modules[name] = None
import torch
from fastvae.models import SentenceVAE
model = SentenceVAE.from_pretrained(sys.argv[1])
print(model.encode(torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]]))[0].double().tolist())
"""
    finished = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    torch.testing.assert_close(torch.tensor(json.loads(finished.stdout)), model.encode(TOKENS)[0])


def test_a_network_that_cannot_be_described_is_asked_for(tmp_path):
    class Own(nn.Sequential):
        pass

    decoder = nn.Linear(2, 7)
    VAE(nn.Sequential(Own(nn.Linear(7, 4))), decoder, 2, features=4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"does not describe the model's encoder: give it as encoder=, untrained"):
        VAE.from_pretrained(tmp_path)
    loaded = VAE.from_pretrained(tmp_path, encoder=nn.Sequential(Own(nn.Linear(7, 4))))
    assert torch.equal(loaded.decoder.weight, decoder.weight)
    with pytest.raises(TypeError, match="VAE takes no network prior"):
        VAE.from_pretrained(tmp_path, prior=decoder)
    with pytest.raises(ValueError, match=r"model.safetensors: expected encoder.0.0.bias of shape \(5,\), got \(4,\)"):
        VAE.from_pretrained(tmp_path, encoder=nn.Sequential(Own(nn.Linear(7, 5))))


def test_damaged_files_and_the_wrong_class_are_told(tmp_path):
    model = sentence_vae()
    with pytest.raises(FileNotFoundError, match=r"no saved model in .*nowhere: there is no such folder"):
        SentenceVAE.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"model\.json is missing"):
        SentenceVAE.from_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a SentenceVAE, not a LinearAutoEncoder"):
        LinearAutoEncoder.from_pretrained(tmp_path)
    tensors, description = tmp_path / "model.safetensors", tmp_path / "model.json"
    whole, text = tensors.read_bytes(), description.read_text()
    tensors.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match="is corrupt or not a safetensors file"):
        SentenceVAE.from_pretrained(tmp_path)
    tensors.unlink()
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors is missing"):
        SentenceVAE.from_pretrained(tmp_path)
    tensors.write_bytes(whole)
    description.write_text(text.replace('"hidden_size"', '"size_of_hidden"'))
    with pytest.raises(ValueError, match=r"does not fit this version's SentenceVAE: .*size_of_hidden"):
        SentenceVAE.from_pretrained(tmp_path)
    description.write_text(text.replace('"num_layers": 1', '"num_layers": 2'))
    with pytest.raises(ValueError, match=r"does not fit this version's SentenceVAE: decoder.* and 5 more in only one"):
        SentenceVAE.from_pretrained(tmp_path)
    for wrong, message in (("{", "is corrupt"), ("[]", "does not describe a model")):
        description.write_text(wrong)
        with pytest.raises(ValueError, match=message):
            SentenceVAE.from_pretrained(tmp_path)


def test_a_setting_that_json_has_no_form_for_leaves_the_old_files(tmp_path):
    class Odd(Pretrained):
        def __init__(self, scale):
            super().__init__()
            self.config = {"scale": scale}

    Odd(2.0).save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(TypeError, match="not JSON serializable"):
        Odd(torch.ones(1)).save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_every_model_of_text_can_be_saved():
    from fastvae.training.text_models import TEXT_MODELS

    assert all(issubclass(parts.get("model"), Pretrained) for parts in TEXT_MODELS.values())
