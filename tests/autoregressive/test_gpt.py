"""The GPT against LlamaGen's numbers, its cache against the whole forward pass, its dropouts, and its files."""

import copy

import pytest
import torch
import torch.nn.functional as F
from golden_fill import fill_values, load_arrays, load_shapes, sums
from gpt_models import TINY, tiny

from autoregressive.gpt import GPT, GPTConfig, KVCache, apply_rope, rope_table
from autoregressive.gpt_config import GPT_PRESETS
from autoregressive.pretrained import LoadedGPT, export_gpt, infer_llamagen_config, load_gpt
from autoregressive.sampling import SamplingConfig, generate


@pytest.fixture(scope="module")
def golden():
    return load_arrays("gpt_b_golden")


@pytest.fixture(scope="module")
def gpt_b(golden):
    model = GPT(GPTConfig()).eval()
    values = fill_values(load_shapes("gpt_b_keys"))
    torch.testing.assert_close(sums(values), golden["param_sum_sumsq"], rtol=1e-6, atol=1e-6)
    model.load_state_dict(values)
    return model


# ---------------------------------------------------------------------------------------------------- LlamaGen


def test_keys_and_sizes_are_llamagens():
    for name, keys in (("GPT-B", "gpt_b_keys"), ("GPT-L", "gpt_l_keys")):
        with torch.device("meta"):
            state = GPT(GPT_PRESETS[name]).state_dict()
        assert {key: tuple(value.shape) for key, value in state.items()} == load_shapes(keys)
    published = {"GPT-B": 110_888_448, "GPT-L": 342_910_976, "GPT-XL": 774_699_520, "GPT-XXL": 1_410_972_672,
                 "GPT-3B": 3_096_659_200}
    assert {name: GPT_PRESETS[name].num_parameters for name in published} == published
    small = GPT(TINY)
    assert small.config.num_parameters == sum(p.numel() for p in small.parameters())


def test_logits_and_loss_are_llamagens(gpt_b, golden):
    with torch.no_grad():
        logits = gpt_b(golden["idx"], golden["class_labels"])
    torch.testing.assert_close(logits[:, golden["logits_pos"]], golden["logits"], atol=1e-4, rtol=0)
    torch.testing.assert_close(logits.logsumexp(-1), golden["logits_lse"], atol=1e-4, rtol=0)
    assert torch.equal(logits.argmax(-1), golden["logits_argmax"])
    loss = F.cross_entropy(logits.flatten(0, 1), golden["targets"].flatten())
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-5)
    with torch.no_grad():
        null = gpt_b(golden["null_idx"], golden["null_cls"])
    torch.testing.assert_close(null.logsumexp(-1), golden["null_logits_lse"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "config"), [
    ("gen_cfg1", SamplingConfig(cfg_scale=1, temperature=0)),
    ("gen_cfg2", SamplingConfig(cfg_scale=2, temperature=0)),
    ("gen_cfg2_int10", SamplingConfig(cfg_scale=2, cfg_interval=10, temperature=0)),
])
def test_greedy_codes_are_llamagens(gpt_b, golden, name, config):
    found = generate(gpt_b, golden["gen_class_labels"].long(), seeds=[0] * 4, config=config, num_codes=64)
    assert torch.equal(found, golden[name].long())


def test_rotary_tables_are_llamagens(gpt_b, golden):
    assert torch.equal(gpt_b.rope, golden["freqs_cis"][:256 + 1])
    misc = load_arrays("misc_golden")
    assert (rope_table(4, 16)[0] == 0).all()
    found = apply_rope(misc["rope_q"], rope_table(4, 16))
    torch.testing.assert_close(found, misc["rope_q_out"], atol=1e-6, rtol=0)


def test_a_training_step_has_llamagens_gradients(golden):
    """On the model itself in training mode, without dropouts."""
    quiet = dict.fromkeys(("class_dropout_prob", "token_dropout_p", "resid_dropout_p", "ffn_dropout_p"), 0.0)
    model = GPT(GPTConfig(**quiet)).train()
    model.load_state_dict(fill_values(load_shapes("gpt_b_keys")))
    model.activation_checkpointing = True
    logits = model(golden["idx"], golden["class_labels"])
    F.cross_entropy(logits.flatten(0, 1), golden["targets"].flatten()).backward()
    norm = sum(p.grad.double().square().sum() for p in model.parameters()).sqrt()
    assert norm.item() == pytest.approx(golden["grad_norm_all"].item(), rel=1e-4)
    for found, name in ((model.norm.weight.grad, "grad_final_norm_w"),
                        (model.layers[0].attention_norm.weight.grad, "grad_l0_attention_norm_w"),
                        (model.layers[0].attention.wqkv.weight.grad[0], "grad_wqkv0_row0"),
                        (model.cls_embedding.embedding_table.weight.grad[golden["class_labels"]], "grad_cls_rows")):
        torch.testing.assert_close(found, golden[name], atol=1e-4 * golden[name].abs().max().item(), rtol=0)


# -------------------------------------------------------------------------------------------------- invariants


def test_a_new_model_knows_nothing():
    model = GPT(TINY).eval()
    logits = model(torch.zeros(2, 15, dtype=torch.int64), torch.tensor([0, 1]))
    assert (logits == 0).all()
    assert model.layers[0].feed_forward.w1.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_later_codes_change_nothing():
    model = tiny()
    codes = torch.randint(0, 20, (2, 15))
    changed = codes.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % 20
    a, b = (model(c, torch.tensor([1, 2])) for c in (codes, changed))
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.equal(a[:, 10:], b[:, 10:])


@pytest.mark.parametrize("masked", [False, True])
def test_the_cache_equals_the_whole_pass(masked):
    model = tiny()
    codes, labels = torch.randint(0, 20, (2, 15)), torch.tensor([1, 5])
    whole = model(codes, labels)
    cache = KVCache(model.config, 2, torch.float32, torch.device("cpu"))
    for t in range(16):
        x = model.tok_embeddings(codes[:, t - 1 : t]) if t else model.cls_embedding(labels)
        logits = model.decode(x, torch.tensor([t]), cache.layers, 16 if masked else t + 1, masked)
        torch.testing.assert_close(logits, whole[:, t], atol=2e-5, rtol=1e-4)
    assert set(model.state_dict()) == set(GPT(TINY).state_dict())  # nothing stays in the model


def test_dropouts_happen_in_training_only():
    codes, labels = torch.randint(0, 20, (4, 15)), torch.tensor([0, 1, 2, 3])
    model = tiny()
    assert torch.equal(model(codes, labels), model(codes, labels))
    for name in ("token_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob"):
        quiet = dict.fromkeys(("token_dropout_p", "resid_dropout_p", "ffn_dropout_p", "class_dropout_prob"), 0.0)
        model = tiny(**quiet | {name: 0.5}).train()
        torch.manual_seed(0)
        first, second = model(codes, labels), model(codes, labels)
        assert not torch.equal(first, second), name
        torch.manual_seed(0)
        assert torch.equal(first, model(codes, labels)), name
    everything = tiny(**quiet | {"class_dropout_prob": 1.0}).train()
    assert torch.equal(everything(codes, labels), everything.eval()(codes, torch.full_like(labels, 5)))


def test_drop_path_leaves_out_whole_branches():
    model = tiny(drop_path_rate=0.6, token_dropout_p=0.0, class_dropout_prob=0.0).train()
    assert [layer.drop_path.p for layer in model.layers] == pytest.approx([0, 0.3, 0.6])
    assert model.layers[2].resid_dropout.p == 0
    x = torch.ones(4000, 1, 1)
    dropped = model.layers[2].drop_path(x)
    assert sorted(set(dropped.flatten().tolist())) == pytest.approx([0, 2.5])
    assert dropped.mean().item() == pytest.approx(1, abs=0.08)


def test_activation_checkpointing_changes_nothing():
    codes, labels = torch.randint(0, 20, (2, 15)), torch.tensor([1, 5])
    gradients = []
    for flag in (False, True):
        model = tiny().train()
        model.activation_checkpointing = flag
        torch.manual_seed(3)
        model(codes, labels).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_bad_sizes_are_named():
    with pytest.raises(ValueError, match="block_size 15 is no square number"):
        GPTConfig(block_size=15)
    with pytest.raises(ValueError, match="dim 36 / n_head 6"):
        GPTConfig(dim=36, n_head=6)
    with pytest.raises(ValueError, match="'GPT-S' is none of GPT-tiny, GPT-B"):
        GPTConfig.preset("GPT-S")
    with pytest.raises(ValueError, match="16 codes are given; at most"):
        tiny()(torch.zeros(1, 16, dtype=torch.int64), torch.tensor([0]))


# ------------------------------------------------------------------------------------------------------- files


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_exports_come_back(tmp_path):
    model = tiny()
    loaded = load_gpt(export_gpt(LoadedGPT(model, "ab", ""), tmp_path / "hf"))
    assert same(loaded.model, model)
    assert loaded.model.config == model.config
    assert loaded.tokenizer_hash == "ab"
    (tmp_path / "hf" / "mine.txt").touch()
    with pytest.raises(ValueError, match="holds other files"):
        export_gpt(loaded, tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"model.safetensors: damaged, or no safetensors file"):
        load_gpt(tmp_path / "hf")


@pytest.mark.parametrize("key", ["model", "module", "state_dict", None])
def test_llamagen_files_are_read(tmp_path, key):
    model = GPT(GPTConfig.preset("GPT-tiny", vocab_size=20, num_classes=5, block_size=16))
    state = dict(model.state_dict())
    extra = {"freqs_cis": torch.zeros(3), "layers.0.attention.kv_cache.k_cache": torch.zeros(2)}
    torch.save({key: state | extra} if key else state | extra, tmp_path / "c2i.pt")
    loaded = load_gpt(tmp_path / "c2i.pt", num_codes=16)
    assert same(loaded.model, model)
    assert loaded.tokenizer_hash == ""
    with pytest.raises(ValueError, match="give --image-size"):
        load_gpt(tmp_path / "c2i.pt")
    broken = copy.copy(state)
    del broken["norm.weight"]
    broken["more"] = torch.zeros(1)
    torch.save({"model": broken}, tmp_path / "broken.pt")
    with pytest.raises(ValueError, match=r"missing: norm.weight; unexpected: more"):
        load_gpt(tmp_path / "broken.pt", num_codes=16)


def test_other_files_are_named(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "config": {"dim": 8}}, tmp_path / "fork.pt")
    with pytest.raises(ValueError, match=r"tok_embeddings.weight is missing"):  # a config alone makes no tokenizer
        load_gpt(tmp_path / "fork.pt")
    torch.save({"model": {"a": torch.zeros(1)}}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"is not a class-conditional GPT of .*: tok_embeddings.weight is missing"):
        load_gpt(tmp_path / "other.pt")
    with pytest.raises(FileNotFoundError, match="no GPT at"):
        load_gpt(tmp_path / "none")
    (tmp_path / "text.pt").write_text("x")
    with pytest.raises(ValueError, match=r"text.pt"):
        load_gpt(tmp_path / "text.pt")
    state = {"tok_embeddings.weight": torch.zeros(3, 7), "cls_embedding.embedding_table.weight": torch.zeros(3, 7)}
    with pytest.raises(ValueError, match="0 layers of width 7"):
        infer_llamagen_config(state, 16, "x")
