"""Models in a line of Python: what load finds, what pictures and numbers are taken for, what is saved with a card."""

import importlib
import json
import sys

import huggingface_hub.hub_mixin
import numpy as np
import pytest
import torch
from digit_runs import train_on_digits, write_digits
from helices import helix, write_helix
from image_models import CODES, write_gpt, write_tokenizer
from PIL import Image
from structure_models import build

from autoregressive.api import ImageGenerator
from protein.api import StructureTokens
from protein.inference import encode_chains
from protein.pretrained import save_pretrained as save_structures
from protein.structure_io import read_structure
from tokenizer import hub, provq
from tokenizer.api import ImageTokenizer
from tokenizer.pretrained import load_tokenizer, to_llamagen_state_dict, tokenizer_hash
from tokenizer.runtime.checkpoint import Checkpointer
from tokenizer.vq_model import VQModel, VQModelConfig


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """run/ of a tokenizer at 16 pixels, pictures/, exports tokenizer/, colour/, gpt/ and structures/."""
    base = tmp_path_factory.mktemp("api")
    train_on_digits(base / "run")
    write_digits(base / "pictures", 3, (20, 18))
    write_tokenizer(base / "tokenizer")
    write_tokenizer(base / "colour", channels=3)
    write_gpt(base / "gpt", base / "tokenizer", trained_classes=[0, 1, 3])
    save_structures(build(), base / "structures")
    return base


@pytest.fixture
def tokenizer(base):
    return provq.load(base / "colour")


# ------------------------------------------------------------------------------------------------------------ finding

def test_load_finds_out_what_is_there(base, tmp_path, monkeypatch):
    model = load_tokenizer(base / "tokenizer")
    torch.save(to_llamagen_state_dict(model), tmp_path / "llamagen.pt")
    gpt = provq.load(base / "gpt").loaded.model
    torch.save({"model": gpt.state_dict()}, tmp_path / "gpt.pt")
    structures = build()
    Checkpointer(tmp_path / "structures" / "checkpoints").save(7, {
        "model": structures.state_dict(), "ema": None, "step": 7, "config": structures.config.to_dict()})
    for path, kind in ((base / "run", "images"), (base / "tokenizer", "images"), (base / "gpt", "gpt"),
                       (base / "structures", "structures"), (base / "structures" / "model.safetensors", "structures"),
                       (base / "gpt" / "model.safetensors", "gpt"), (tmp_path / "llamagen.pt", "images"),
                       (tmp_path / "gpt.pt", "gpt"), (tmp_path / "structures", "structures"),
                       (next((base / "run" / "checkpoints").glob("0*.pt")), "images")):
        assert hub.kind_of(path) == kind, path
    assert isinstance(provq.load(str(tmp_path / "structures")), StructureTokens)
    assert isinstance(provq.load(base / "gpt" / "model.safetensors"), ImageGenerator)
    same = provq.load(tmp_path / "llamagen.pt", codebook_l2_norm=False)
    assert tokenizer_hash(same.model) == tokenizer_hash(model)
    monkeypatch.chdir(base)
    assert provq.load("run").num_codes == 64


def test_every_class_of_the_table_is_there():
    for module, name in hub.KINDS.values():
        assert issubclass(getattr(importlib.import_module(module), name), hub.Pretrained)
    formats = {importlib.import_module(m).EXPORT_FORMAT: kind for kind, m in (
        ("images", "tokenizer.pretrained"), ("gpt", "autoregressive.pretrained"), ("structures", "protein.pretrained"))}
    assert formats == hub._FORMATS


def test_ids_of_the_hub_are_asked_for_only_where_nothing_is_here(base, tmp_path, monkeypatch):
    asked = []

    def download(source, **options):
        asked.append((source, options["revision"]))
        if source == "nobody/nothing":
            raise OSError("offline")
        return str(base / "colour")

    monkeypatch.setattr(hub, "snapshot_download", download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for typo in ("runs/typo", "/no/such", "word", base / "typo"):
        with pytest.raises(FileNotFoundError, match="no model at"):
            provq.load(typo)
    assert asked == []
    assert provq.load("somebody/model", revision="v1").num_codes == CODES
    with pytest.raises(FileNotFoundError, match=r"no file or folder nobody/nothing here, .* \(OSError: offline\)"):
        provq.load("nobody/nothing")
    assert asked == [("somebody/model", "v1"), ("nobody/nothing", None)]


def test_without_the_repository_load_says_where_it_is(monkeypatch):
    for absent in ("tokenizer.hub", "tokenizer"):  # a host may have a folder of that name
        def missing(_name, absent=absent):
            raise ModuleNotFoundError(f"No module named {absent!r}", name=absent)

        monkeypatch.setattr(provq.importlib, "import_module", missing)
        with pytest.raises(ImportError, match=r"^load is in hub\.py: run in a checkout of ProVQ, which has"):
            _ = provq.load

    def broken(_name):
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(provq.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        _ = provq.load
    assert "load" not in provq.__all__
    assert sys.modules["tokenizer.provq"] is provq


def test_a_run_in_its_warmup_has_no_codes_yet(tmp_path):
    train_on_digits(tmp_path / "early", "--stop-after", "warmup")
    with pytest.raises(ValueError, match="continuous warm-up: it has no codes yet"):
        provq.load(tmp_path / "early")


# ------------------------------------------------------------------------------------------------------------- images

def test_one_picture_in_every_form_gives_the_same_codes(tokenizer, base):
    picture = Image.open(base / "pictures" / "000.png").convert("RGB").resize((16, 16))
    array = np.asarray(picture)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    codes = tokenizer.encode(picture)
    assert (codes.shape, codes.dtype) == ((4, 4), torch.int64)
    assert torch.equal(codes, tokenizer.model.encode(tensor[None].float() / 127.5 - 1)[0])
    for same in (array, tensor, tensor / 255, tensor.double() / 255, (array / 255).astype(np.float32)):
        assert torch.equal(tokenizer.encode(same), codes)
    assert torch.equal(tokenizer.encode(tensor / 127.5 - 1, value_range=(-1, 1)), codes)
    for batch in (array[None], tensor[None], [picture], (tensor / 255)[None]):
        assert torch.equal(tokenizer.encode(batch), codes[None])
    assert tokenizer.latents(picture).shape == (4, 4, 4)
    assert tokenizer.codebook().shape == (CODES, 4)
    assert not tokenizer.codebook().requires_grad


def test_files_are_cropped_as_in_training(base):
    tokenizer = provq.load(base / "run")
    files = sorted((base / "pictures").iterdir())
    codes = tokenizer.encode(files)
    assert codes.shape == (3, 4, 4)
    assert torch.equal(tokenizer.encode(str(files[1])), codes[1])
    assert torch.equal(tokenizer.encode(Image.open(files[2])), codes[2])
    assert tokenizer.encode(files[0], size=32).shape == (8, 8)
    with pytest.raises(ValueError, match="size 18 must be a multiple of 4"):
        tokenizer.encode(files[0], size=18)
    (base / "junk.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"junk.png cannot be read: none of"):
        tokenizer.encode(base / "junk.png")
    with pytest.raises(FileNotFoundError, match=r"none\.png"):
        tokenizer.encode("none.png")


def test_decode_gives_pictures(tokenizer, base):
    codes = tokenizer.encode([base / "pictures" / "000.png"] * 2)
    first, second = tokenizer.decode(codes)
    assert (first.size, first.mode) == ((16, 16), "RGB")
    assert first.tobytes() == second.tobytes() == tokenizer.decode(codes[0]).tobytes()
    assert tokenizer.decode(codes[0].numpy().astype(np.uint16)).tobytes() == first.tobytes()  # as codes.npy has them
    assert tokenizer.reconstruct(base / "pictures" / "000.png").tobytes() == first.tobytes()
    x_hat = tokenizer.model.decode_code(codes[:1])[0]
    np.testing.assert_allclose(np.asarray(first), ((x_hat + 1) * 127.5).clamp(0, 255).movedim(0, -1).detach(), atol=1)


IMAGE = torch.rand(3, 16, 16)


@pytest.mark.parametrize(("images", "options", "said"), [
    (IMAGE * 255, {}, r"pixels span \[.*, 25.*\], beyond value_range \(0, 1\); for 0 to 255 convert to uint8"),
    (IMAGE * 2 - 1, {}, r"for images in \[-1, 1\] give value_range=\(-1, 1\)"),
    (IMAGE * 255, {"value_range": (-1, 1)}, "for 0 to 255 convert to uint8"),
    (IMAGE * torch.nan, {}, r"pixels span \[nan, nan\]"),
    (IMAGE, {"value_range": (0, 255)}, r"value_range is \(0, 1\) or \(-1, 1\)"),
    ((IMAGE * 255).long(), {}, "pixels are uint8 or floating point, got torch.int64"),
    (np.full((16, 16, 3), 7, np.uint16), {}, r"pixels are uint8 or floating point, got uint16; convert with astype"),
    (IMAGE.permute(1, 2, 0), {}, r"takes 3 channels, images are \(C, H, W\).*got \(16, 16, 3\)"),
    (IMAGE.numpy(), {}, r"takes 3 channels, images are \(H, W\), .*got \(3, 16, 16\)"),
    (IMAGE[:1], {}, r"takes 3 channels"),
    (IMAGE[0], {}, r"a tensor of images is \(C, H, W\) or"),
    (IMAGE[:, :15], {}, "downsampling factor 4"),
    (IMAGE, {"size": 16}, "size is for paths and PIL images"),
    (np.array(["a"]), {}, "an array of images is"),
    ([IMAGE], {}, "a list holds paths and PIL images, not Tensor: stack"),
    ([], {}, "no images: give a path"),
    (5, {}, "not int"),
    ("x.png", {"value_range": (-1, 1)}, "value_range is for arrays and tensors"),
])
def test_what_is_no_image_is_said(tokenizer, images, options, said):
    with pytest.raises(ValueError, match=said):
        tokenizer.encode(images, **options)


@pytest.mark.parametrize(("codes", "said"), [
    (torch.zeros(4, 4), "codes must be integers"), (torch.zeros(4, dtype=torch.int64), "codes must be integers"),
    (torch.full((4, 4), CODES), rf"codes span \[{CODES}, {CODES}\]; this tokenizer has 0 to {CODES - 1}"),
    (np.full((4, 4), -1), r"codes span \[-1, -1\]"), ([[0.5]], "codes must be integers"),
])
def test_what_is_no_code_is_said(tokenizer, codes, said):
    with pytest.raises(ValueError, match=said):
        tokenizer.decode(codes)


# ---------------------------------------------------------------------------------------------------------- model cards

def test_saved_with_a_card_that_says_how_it_was_trained(base, tmp_path):
    (base / "run" / "evaluation").mkdir(exist_ok=True)
    (base / "run" / "evaluation" / "reconstruction.json").write_text(json.dumps(
        {"metrics": {"rfid": 12.5}, "protocol": {"id": "0123456789ab", "samples": 16}}))
    tokenizer = provq.load(base / "run")
    assert tokenizer.save_pretrained(tmp_path / "saved") == tmp_path / "saved"
    card = (tmp_path / "saved" / "README.md").read_text()
    for line in ("library_name: provq", "| preset | digits |", "| global_seed | 0 |", "| warmup_steps | 2 |",
                 "| transition_steps | 2 |", "## Evaluation: reconstruction, protocol 0123456789ab", "| rfid | 12.5 |",
                 f"| tokenizer_hash | {tokenizer_hash(tokenizer.model)} |", "| data_fingerprint | "):
        assert line in card, line
    last = json.loads((base / "run" / "validation.jsonl").read_text().splitlines()[-1])
    assert f"| psnr | {last['psnr']:.6g} |" in card
    curriculum = card.partition("## Curriculum")[2].partition("##")[0]
    assert "| recluster | False |" in curriculum
    assert "codebook_size" not in curriculum, "it stands under Model"
    again = ImageTokenizer.from_pretrained(tmp_path / "saved")
    assert torch.equal(again.encode(base / "pictures" / "000.png"), tokenizer.encode(base / "pictures" / "000.png"))
    again.save_pretrained(tmp_path / "twice")
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "README.md").read_text() == card
    before = (base / "run" / "config.json").read_bytes()
    with pytest.raises(ValueError, match="name a new folder"):
        tokenizer.save_pretrained(base / "run")
    assert (base / "run" / "config.json").read_bytes() == before
    with pytest.raises(ValueError, match="written from the model itself"):
        tokenizer.save_pretrained(tmp_path / "other", config={"a": 1})


def test_paths_stay_private(tmp_path):
    run = tmp_path / "run"
    Checkpointer(run / "checkpoints").save(1, {"config": {"global_seed": 4}})
    (run / "config.json").write_text(json.dumps({"data_path": "/home/somebody/secret/images"}))
    facts = hub.run_facts(run)  # no curriculum, as of a GPT: nothing is said of one
    assert facts == {"Data": {"data": "images"}, "Seeds": {"global_seed": 4}}
    assert "secret" not in hub.model_card("What", {}, facts)


def test_push_to_hub_sends_the_three_files(base, monkeypatch):
    sent = {}

    class Api:
        def __init__(self, token=None):
            pass

        def create_repo(self, repo_id, **_options):
            return type("Url", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, **_options):
            sent[repo_id] = sorted(path.name for path in folder_path.iterdir())

    monkeypatch.setattr(huggingface_hub.hub_mixin, "HfApi", Api)
    for name in ("run", "gpt", "structures"):
        provq.load(base / name).push_to_hub(f"me/{name}")
    assert sent == {f"me/{name}": ["README.md", "config.json", "model.safetensors"]
                    for name in ("run", "gpt", "structures")}


# --------------------------------------------------------------------------------------------------- GPT and structures

def test_gpt_samples_classes(base):
    generator = provq.load(base / "gpt", tokenizer=base / "tokenizer")
    codes = generator.sample_codes([3, 0], n=2, temperature=9.0, seed=1)
    assert (codes.shape, codes.dtype) == ((4, 4, 4), torch.int64)
    images = generator.sample([3, 0], n=2, temperature=9.0, seed=1)
    assert [image.size for image in images] == [(16, 16)] * 4
    assert images[0].tobytes() == generator.tokenizer.decode(codes[0]).tobytes()
    assert torch.equal(generator.sample_codes([3, 0], n=2, temperature=9.0, seed=1), codes)
    assert not torch.equal(generator.sample_codes([3, 0], n=2, temperature=9.0, seed=2), codes)
    assert len(generator.sample(1, n=3, temperature=0)) == 3
    many = generator.sample_codes(1, n=33, temperature=9.0)  # more than one batch
    assert many.shape == (33, 4, 4)
    assert len({row.numpy().tobytes() for row in many}) == 33
    for classes, n, options, said in ((7, 1, {}, "classes from 0 to 4"), (0, 0, {}, "n >= 1"), ([], 1, {}, "classes"),
                                      (2, 1, {}, "no training image of class 2"), (0, 1, {"top_p": 0}, "top-p is 0")):
        with pytest.raises(ValueError, match=said):
            generator.sample(classes, n, **options)
    with pytest.raises(ValueError, match="does not say where its tokenizer is: load it with tokenizer=PATH"):
        provq.load(base / "gpt").sample(0)
    other = VQModel(VQModelConfig("VQ-4", image_channels=1, image_size=16, codebook_size=CODES, codebook_embed_dim=4))
    with pytest.raises(ValueError, match="trained on codes of another tokenizer than the one given is now"):
        provq.load(base / "gpt", tokenizer=ImageTokenizer(other))


def test_structures_to_tokens_and_back(base, tmp_path):
    tokenizer = provq.load(base / "structures")
    write_helix(tmp_path, "1abc", suffix=".cif")
    (found,) = tokenizer.encode(tmp_path / "1abc.cif")
    expected = encode_chains(tokenizer.tokenizer, read_structure(tmp_path / "1abc.cif"), torch.device("cpu"))
    np.testing.assert_array_equal(found.tokens, expected[0])
    np.testing.assert_array_equal(found.embeddings, tokenizer.codebook().numpy()[found.tokens])
    assert found.chain.name == "1abc"
    latents = tokenizer.encode(str(tmp_path / "1abc.cif"), embeddings="continuous")[0].embeddings
    assert latents.shape == found.embeddings.shape
    assert not np.array_equal(latents, found.embeddings)
    gap = helix("2gap", 10)
    gap.coords[4] = np.nan
    both = tokenizer.encode([gap, tmp_path / "1abc.cif"])
    assert both[0].tokens[4] == -1
    assert np.isnan(both[0].embeddings[4]).all()
    np.testing.assert_array_equal(both[1].tokens, found.tokens)
    backbone = tokenizer.decode(found.tokens)
    assert (backbone.shape, backbone.dtype) == ((12, 3, 3), np.float32)
    assert [len(chain) for chain in tokenizer.decode([both[0].tokens, found.tokens])] == [10, 12]
    with pytest.raises(ValueError, match="is a folder: give its files, or use"):
        tokenizer.encode(tmp_path)
    with pytest.raises(ValueError, match=r"tokens are integers \(L,\), got float64"):
        tokenizer.decode(np.zeros(3))
    with pytest.raises(FileNotFoundError):
        tokenizer.encode("none.cif")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = StructureTokens.from_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(again.encode(tmp_path / "1abc.cif")[0].tokens, found.tokens)
