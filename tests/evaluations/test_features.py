"""Feature extractors: Inception against torch-fidelity's own run of the same file, TorchScript, and wrong files."""

import argparse
import zipfile

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from evaluations.extractor_flags import add_extractor_flags
from evaluations.features import INCEPTION_FILE, find_inception_weights, open_extractor

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")


def pictures(n, size=40):
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights in torch-fidelity's format: it always reads a file, so one is made of its parameters' shapes."""
    seen = {}

    def remember(self, *_args, **_kwargs):
        seen.update(self.state_dict())

    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "empty.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", remember)
        FeatureExtractorInceptionV3("inception", ["2048"], str(folder / "empty.pth"))
    random = torch.Generator().manual_seed(0)
    state = {}
    for name, tensor in seen.items():
        if not tensor.is_floating_point():
            state[name] = tensor
        elif name.endswith("running_var"):
            state[name] = torch.rand(tensor.shape, generator=random) + 0.5
        else:
            fan_in = max(1, tensor[0].numel()) if tensor.dim() > 1 else 25
            state[name] = torch.randn(tensor.shape, generator=random) * (2 / fan_in) ** 0.5
    torch.save(state, folder / "random.pth")
    return folder / "random.pth"


def test_inception_is_torch_fidelitys(weights):
    extractor = open_extractor("inception", weights)
    images = pictures(2)
    found = extractor(images)
    assert (found.pooled.shape, found.logits.shape, found.spatial.shape) == ((2, 2048), (2, 1008), (2, 2023))
    peer = FeatureExtractorInceptionV3("inception", ["2048", "logits_unbiased"], str(weights))
    inside = {}
    peer.Mixed_6d.branch1x1.bn.register_forward_hook(lambda _m, _a, out: inside.update(bn=out))
    with torch.no_grad():
        pooled, logits = peer(images)
    assert torch.equal(found.pooled, pooled)
    assert torch.equal(found.logits, logits)
    assert torch.equal(found.spatial, F.relu(inside["bn"])[:, :7].flatten(1))
    assert found.spatial.std() > 0
    assert not extractor.train().network.training  # stays in eval mode
    torch.testing.assert_close(extractor(images[1:]).pooled, pooled[1:], rtol=1e-4, atol=1e-4)


class ThreeTensors(nn.Module):
    def forward(self, x):
        flat = x.float().flatten(1)
        return flat[:, :5], flat[:, :3], flat


class OneTensor(nn.Module):
    def forward(self, x):
        return x.double().flatten(1)[:, :5]


class TwoTensors(nn.Module):
    def forward(self, x):
        return x.float().flatten(1)[:, :5], x.float().flatten(1)[:, :3]


class WholeNumbers(nn.Module):
    def forward(self, x):
        return x.flatten(1)


class Map(nn.Module):
    def forward(self, x):
        return x.float()


def script(module, path):
    torch.jit.script(module).save(str(path))
    return f"torchscript:{path}"


@pytest.mark.parametrize(("module", "present"), [(OneTensor(), 1), (TwoTensors(), 2), (ThreeTensors(), 3)])
def test_torchscript_returns_one_to_three_tensors(tmp_path, module, present):
    extractor = open_extractor(script(module, tmp_path / "net.pt"))
    images = pictures(4, 6)
    found = extractor(images)
    assert [part is not None for part in found] == [i < present for i in range(3)]
    assert all(part.dtype == torch.float32 for part in found if part is not None)
    assert torch.equal(found.pooled, images.float().flatten(1)[:, :5])


@pytest.mark.parametrize("module", [WholeNumbers(), Map()])
def test_another_contract_is_refused(tmp_path, module):
    extractor = open_extractor(script(module, tmp_path / "net.pt"))
    with pytest.raises(ValueError, match=r"net.pt returned \[.*\] for 4 images; expected \(N, D\)"):
        extractor(pictures(4, 6))


@pytest.mark.parametrize("images", [
    torch.zeros(2, 3, 8, 8), torch.zeros(2, 1, 8, 8).byte(), torch.zeros(3, 8, 8).byte(),
])
def test_only_bytes_are_pictures(tmp_path, images):
    with pytest.raises(ValueError, match=r"uint8 \(N, 3, H, W\)"):
        open_extractor(script(OneTensor(), tmp_path / "net.pt"))(images)


def test_weights_are_hashed(tmp_path):
    first, second = (open_extractor(script(m, tmp_path / f"{i}.pt")) for i, m in enumerate([OneTensor(), TwoTensors()]))
    assert first.sha256 != second.sha256
    assert len(first.sha256) == 64


class Wide(torch.nn.Module):
    """Twice the means of images wider than two pixels."""

    def forward(self, x):
        if x.size(3) > 2:
            twice = True
        else:
            twice = False
        means = x.float().mean((2, 3))
        return means * 2 if twice else means


def test_code_is_hashed_in_its_order(tmp_path):
    plain, flipped = tmp_path / "plain.pt", tmp_path / "flipped.pt"
    torch.jit.script(Wide()).save(str(plain))
    with zipfile.ZipFile(plain) as archive, zipfile.ZipFile(flipped, "w") as changed:
        for name in archive.namelist():
            content = archive.read(name)
            if name.endswith(".py"):
                content = (content.replace(b"twice = True", b"twice = ?").replace(b"twice = False", b"twice = True")
                           .replace(b"twice = ?", b"twice = False"))
            changed.writestr(name, content)
    one, other = (open_extractor(f"torchscript:{path}") for path in (plain, flipped))
    torch.testing.assert_close(one(pictures(4, 6)).pooled, 2 * other(pictures(4, 6)).pooled)
    assert one.sha256 != other.sha256


def test_damaged_weights_are_named(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.script(torch.nn.Linear(100, 100)).save(str(path))
    content = bytearray(path.read_bytes())
    at = content.find(torch.jit.load(str(path)).weight.detach().numpy().tobytes())
    content[at + 1000] ^= 1
    path.write_bytes(content)
    torch.jit.load(str(path))
    with pytest.raises(ValueError, match=r"torchscript:\S+net.pt: damaged \(Bad CRC-32"):
        open_extractor(f"torchscript:{path}")


def test_missing_weights_say_where_they_belong(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="--inception-weights PATH") as caught:
        find_inception_weights()
    assert str(tmp_path / "hub" / "checkpoints" / INCEPTION_FILE) in str(caught.value)
    with pytest.raises(FileNotFoundError, match=r"mine.pth does not exist"):
        open_extractor("inception", tmp_path / "mine.pth")


def test_foreign_files_are_named(tmp_path):
    (tmp_path / "text.pth").write_text("no weights")
    torch.save({"conv": torch.zeros(1)}, tmp_path / "other.pth")
    for name in ("text.pth", "other.pth"):
        with pytest.raises(ValueError, match=f"{name} is not torch-fidelity's"):
            open_extractor("inception", tmp_path / name)
    with pytest.raises(ValueError, match=r"text.pth: not a TorchScript file"):
        open_extractor(f"torchscript:{tmp_path / 'text.pth'}")
    with pytest.raises(FileNotFoundError, match="no such file"):
        open_extractor(f"torchscript:{tmp_path / 'nothing.pt'}")
    with pytest.raises(ValueError, match="none of inception, timm:NAME:PATH and torchscript:PATH"):
        open_extractor("vgg")


@pytest.fixture(scope="module", params=["test_resnet", "test_vit"])
def timm_file(request, tmp_path_factory):
    """A model's name, a file of random weights, and the model."""
    torch.manual_seed(0)
    model = timm.create_model(request.param, pretrained=False).eval()
    path = tmp_path_factory.mktemp("timm") / f"{request.param}.pth"
    torch.save(model.state_dict(), path)
    return request.param, path, model


def test_a_model_of_timms_sees_what_timm_would_show_it(timm_file):
    name, path, model = timm_file
    extractor = open_extractor(f"timm:{name}:{path}")
    config = timm.data.resolve_model_data_config(model)
    images = pictures(3, config["input_size"][1])
    found = extractor(images)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        shown = (images / 255.0 - mean) / std
        torch.testing.assert_close(found.logits, model(shown), rtol=1e-4, atol=1e-5)
        model.reset_classifier(0)
        torch.testing.assert_close(found.pooled, model(shown), rtol=1e-4, atol=1e-5)
    assert extractor.name == f"timm:{name}"
    assert not extractor.widths
    larger = F.interpolate(images.float(), scale_factor=2, mode="nearest").byte()
    near, other = extractor(larger).pooled, extractor(pictures(3, 300)).pooled  # any size; the same pictures stay near
    assert (near - found.pooled).norm() < 0.5 * (other - found.pooled).norm()


@pytest.mark.parametrize(("spec", "message"), [
    ("timm:test_vit", "--features timm:test_vit: name the file of weights as well, timm:test_vit:PATH"),
    ("timm:", "name the file of weights as well, timm:NAME:PATH"),
    ("timm:no_model:w.pth", "has no model 'no_model'"),
    ("timm:test_vit:no.pth", "no such file; nothing is downloaded"),
    ("dino", "--features 'dino' is none of inception, timm:NAME:PATH and torchscript:PATH"),
])
def test_specs_of_timm_that_cannot_work(spec, message):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        open_extractor(spec)
    assert message in str(error.value)


def test_weights_of_another_model_are_refused(timm_file):
    name, path, _ = timm_file
    other = "test_vit" if name == "test_resnet" else "test_resnet"
    with pytest.raises(ValueError, match="not the weights of that model"):
        open_extractor(f"timm:{other}:{path}")


def test_help_names_the_file_of_weights():
    parser = argparse.ArgumentParser()
    add_extractor_flags(parser)
    assert INCEPTION_FILE in next(action.help for action in parser._actions if action.dest == "inception_weights")
