"Attention rollout against products of whole matrices, and everything as it was afterwards."
import pytest
import torch

from skin_lesions.networks import EnsembleNet, LesionNet, TwoStageNet, create_body
from skin_lesions.rollout import attention_layers, attention_rollout, plain_attention

VIT = dict(depth=3, embed_dim=32, num_heads=2, img_size=64)
VITS = dict(plain={}, registers=dict(reg_tokens=3), average=dict(class_token=False, global_pool='avg'), average_beside_class=dict(global_pool='avg'))


def vit(**kwargs):
    body = create_body('vit_tiny_patch16_224', pretrained=False, **VIT, **kwargs)
    for p in body.parameters(): p.data += .1*torch.randn_like(p)
    return body.eval()


def swin(size=64, window=4):
    kwargs = dict(img_size=size, window_size=window, embed_dim=16, depths=(2, 2), num_heads=(2, 2))
    body = create_body('swin_tiny_patch4_window7_224', pretrained=False, **kwargs)
    for p in body.parameters(): p.data += .1*torch.randn_like(p)
    return body.eval()


def weights_of(body, x):
    "Attention weights of each layer, mean over the heads, kept by the softmax or computed from queries and keys"
    found, hooks = [], []
    def keep(m, args):
        tokens, heads = args[0], m.num_heads
        q, k, _ = m.qkv(tokens).reshape(*tokens.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        found.append((q@k.mT*m.scale).softmax(-1).mean(1))
    for m in attention_layers(body).values(): hooks.append(m.register_forward_pre_hook(keep))
    with torch.no_grad(): body(x)
    for h in hooks: h.remove()
    return found


@pytest.mark.parametrize('name', VITS)
def test_the_product_of_matrices(name):
    torch.manual_seed(0)
    body, x = vit(**VITS[name]), torch.randn(2, 3, 64, 64)
    product = None
    for a in weights_of(body, x):
        step = (a+torch.eye(a.shape[-1]))/2
        product = step if product is None else step@product
    prefix = product.shape[-1]-16
    rows = product[:, prefix:].mean(1) if 'average' in name else product[:, 0]
    expected = rows[:, prefix:].view(2, 4, 4)
    torch.testing.assert_close(attention_rollout(body, x, raw=True, resize=False), expected/expected.sum((1, 2), keepdim=True))


@pytest.mark.parametrize('size, window', [(64, 4), (64, 8), (48, 4)]) # 48: 12 and 6 positions, 6 padded to 8
def test_swin_by_whole_matrices(size, window):
    torch.manual_seed(0)
    body, x = swin(size, window), torch.randn(2, 3, size, size)
    found = []
    with torch.no_grad(), plain_attention(body):
        hooks = [m.attn_drop.register_forward_hook(lambda m, _, out: found.append(out.mean(1))) for m in attention_layers(body).values()]
        body(x)
        for h in hooks: h.remove()
    side, product = size//4, torch.eye((size//4)**2).expand(2, -1, -1)
    for stage, layer in enumerate(body.layers):
        if stage:
            merge = torch.zeros((side//2)**2, side**2)
            for i in range(side):
                for j in range(side): merge[i//2*(side//2)+j//2, i*side+j] = .25
            product, side = merge@product, side//2
        for block in layer.blocks:
            (w, _), (s, _), a = block.window_size, block.shift_size, found.pop(0)
            full, n = -(-side//w)*w, -(-side//w)
            a = a.view(2, n, n, w*w, w*w)
            step = torch.zeros(2, side**2, side**2)
            def token(i, j): return (i+s)%side*side+(j+s)%side if i < side and j < side else None
            for p in range(n):
                for q in range(n):
                    inside = [token(p*w+i, q*w+j) for i in range(w) for j in range(w)]
                    for u, query in enumerate(inside):
                        for v, key in enumerate(inside):
                            if query is not None and key is not None: step[:, query, key] += a[:, p, q, u, v]
            assert full >= side
            product = (step+torch.eye(side**2))/2@product
    expected = product.mean(1).view(2, size//4, size//4)
    torch.testing.assert_close(attention_rollout(body, x, raw=True, resize=False), expected/expected.sum((1, 2), keepdim=True))


@pytest.mark.parametrize('body', [vit, swin])
def test_everything_is_as_it_was(body):
    torch.manual_seed(0)
    net, x = LesionNet(body(), 7).train(), torch.randn(2, 3, 64, 64)
    layers = list(attention_layers(net.body).values())
    layers[0].fused_attn, layers[-1].fused_attn = False, True
    def state(): return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks), getattr(m, 'fused_attn', None)) for m in net.modules()]
    before, weights = state(), {k: v.clone() for k, v in net.state_dict().items()}
    attention_rollout(net, x)
    with pytest.raises(Exception): attention_rollout(net, torch.randn(2, 5, 64, 64))
    assert state() == before and len({m.fused_attn for m in layers}) == 2
    torch.testing.assert_close(net.state_dict(), weights)


def test_stages_and_ensembles():
    torch.manual_seed(0)
    x, one, two = torch.randn(2, 3, 64, 64), vit(), vit()
    net = TwoStageNet(one, two, n_out=7, first=5)
    first, second = attention_rollout(net, x), attention_rollout(net, x, stage='two')
    assert torch.equal(first, attention_rollout(one, x)) and torch.equal(second, attention_rollout(two, x))
    shared = TwoStageNet(one, n_out=7, first=5)
    assert torch.equal(attention_rollout(shared, x, stage='two'), first)
    both = EnsembleNet([LesionNet(one, 7), LesionNet(swin(), 7)])
    maps = [attention_rollout(m.body, x, raw=True) for m in both.members]
    torch.testing.assert_close(attention_rollout(both, x, raw=True), sum(maps)/2)


def test_errors():
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match='no attention layers'): attention_rollout(LesionNet(create_body('test_convnext', pretrained=False), 7), x)
    with pytest.raises(ValueError, match='batch of images'): attention_rollout(vit(), x[0])
    with pytest.raises(ValueError, match='unknown stage'): attention_rollout(vit(), x, stage='three')
