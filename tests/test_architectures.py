"Weights from files: the same tensors whatever the file, no code run from them, an error that names what does not fit."
import os, pickle, zipfile

import pytest
import torch
from torch import nn

from skin_lesions.architectures import check_tensors, normalization, read_weights


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.system, (f'touch {self.path}',)


@pytest.mark.parametrize('how', ['torch', 'torch, old format', 'pickle'])
def test_no_code_is_run_from_a_file(how, tmp_path):
    file, mark = tmp_path/'weights.pth', tmp_path/'ran'
    if how == 'pickle': file.write_bytes(pickle.dumps(Evil(mark)))
    else: torch.save({'w': Evil(mark)}, file, _use_new_zipfile_serialization=how == 'torch')
    with pytest.raises(ValueError, match='no plain tensors that can be read safely'): read_weights(file, trusted=True)
    assert not mark.exists()


def test_a_zip_that_unfolds_is_not_read(tmp_path):
    with zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as z: z.writestr('archive/data.pkl', bytes(2**26))
    with pytest.raises(ValueError, match='would grow to 67,108,864'): read_weights(tmp_path/'bomb.pth', trusted=True)


def test_an_old_torch_gets_a_warning(tmp_path, monkeypatch):
    torch.save({'w': torch.zeros(1)}, tmp_path/'w.pth')
    monkeypatch.setattr(torch, '__version__', '2.5.1')
    with pytest.warns(UserWarning, match='can be made to run code'): read_weights(tmp_path/'w.pth')


@pytest.mark.parametrize('seed', range(5))
def test_what_passes_the_check_loads(seed):
    "Some tensors are dropped, renamed or reshaped by chance: load_state_dict agrees with check_tensors"
    gen = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    own, state = net.state_dict(), {}
    for k, v in own.items():
        choice = int(torch.randint(12, (1,), generator=gen))
        if choice == 0: continue
        state[k+'x' if choice == 1 else k] = v.new_zeros(7) if choice == 2 else v
    try: check_tensors(state, own, 'no fit')
    except ValueError:
        with pytest.raises(RuntimeError): net.load_state_dict(state)
    else: net.load_state_dict(state)


def test_normalization_is_timms():
    import timm
    for arch in ('resnet50', 'vit_base_patch16_224', 'tf_efficientnet_lite0'):
        config = timm.get_pretrained_cfg(arch)
        assert normalization(arch) == (tuple(config.mean), tuple(config.std))
