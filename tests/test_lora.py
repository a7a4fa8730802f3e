"LoRA: what is trained, what a bundle holds, and what cannot be had"
import sys

import pytest
import torch

from skin_lesions.lora import add_lora, lora_layers, lora_splitter, merged
from skin_lesions.networks import LesionNet, TwoStageNet, create_body

VIT = ('vit_tiny_patch16_224', dict(depth=2, embed_dim=32, num_heads=2, img_size=64))
SWIN = ('swin_tiny_patch4_window7_224', dict(img_size=64, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2)))


def body(which=VIT): return create_body(which[0], pretrained=False, **which[1])


@pytest.fixture(scope='module')
def peft(): return pytest.importorskip('peft', reason='needs peft')


@pytest.mark.parametrize('which', [VIT, SWIN])
@pytest.mark.parametrize('two', [False, True])
def test_only_additions_and_heads_change_and_merging_keeps_the_answer(peft, which, two, tmp_path):
    from skin_lesions.bundle import image_view, save_bundle
    from skin_lesions.classes import HAM10000
    from skin_lesions.predict import load_predictor
    torch.manual_seed(0)
    bodies = [add_lora(body(which), 4) for _ in range(1+two)]
    net = TwoStageNet(*bodies, n_out=7, first=5, hidden=(8,)) if two else LesionNet(*bodies, 7, hidden=(8,))
    before, x = {k: v.clone() for k, v in net.state_dict().items()}, torch.randn(4, 3, 64, 64)
    groups = lora_splitter(net)
    assert [len(g) for g in groups] == [2*len(lora_layers(body(which)))*(1+two), 8 if two else 4]
    opt = torch.optim.SGD([p for g in groups for p in g], lr=.5)
    for _ in range(3):
        opt.zero_grad()
        torch.nn.functional.cross_entropy(net(x), torch.arange(4)).backward()
        opt.step()
    changed = {k for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert changed and all('lora_' in k or k.startswith('head') for k in changed) and any('lora_A' in k for k in changed)
    net.eval()
    with torch.no_grad():
        plain = merged(net)
        assert plain is not net and not any('lora' in k or 'base_layer' in k for k in plain.state_dict())
        torch.testing.assert_close(plain(x), net(x), atol=1e-5, rtol=1e-4)
        save_bundle(net, tmp_path/'bundle', classes=HAM10000, view=image_view(64, arch=which[0]))
        torch.testing.assert_close(load_predictor(tmp_path/'bundle', 'cpu').model(x), net(x), atol=1e-5, rtol=1e-4)
    assert any('lora_' in k for k in net.state_dict()) # the trained one is as it was


def test_a_learner(peft, sample):
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import lesion_learner
    from skin_lesions.readers import read_metadata
    from skin_lesions.split import split_by_lesion
    meta = split_by_lesion(read_metadata(sample)).groupby('is_valid').head(16)
    dls = ham10000_dataloaders(meta, size=64, bs=8, arch=VIT[0], sampling=None, num_workers=0)
    learn = lesion_learner(dls, VIT[0], pretrained=False, lora=2, body_kwargs=VIT[1], hidden=(8,))
    frozen = {n: p.clone() for n, p in learn.model.body.named_parameters() if 'lora_' not in n}
    learn.unfreeze()
    with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-2)
    own = dict(learn.model.body.named_parameters())
    assert all(torch.equal(own[n], p) and not own[n].requires_grad for n, p in frozen.items())
    assert any(p.abs().sum() > 0 for n, p in own.items() if 'lora_B' in n)


def test_nothing_to_merge():
    net = LesionNet(body(), 7)
    assert merged(net) is net


def test_attention_that_reads_past_its_layer():
    "BEiT adds its own bias to the weights of qkv; the other layers remain"
    names = lora_layers(create_body('beit_base_patch16_224', pretrained=False, depth=1, embed_dim=32, num_heads=2))
    assert 'blocks.0.attn.proj' in names and 'blocks.0.attn.qkv' not in names


def test_errors(monkeypatch):
    with pytest.raises(ValueError, match='no linear layers of attention'): add_lora(create_body('test_resnet', pretrained=False))
    for rank in (0, -1, 1.5, 'x', True):
        with pytest.raises(ValueError, match='whole number from 1'): add_lora(body(), rank)
    monkeypatch.setitem(sys.modules, 'peft', None)
    with pytest.raises(ModuleNotFoundError, match='pip install peft'): add_lora(body())
