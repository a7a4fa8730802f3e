"The overlap of maps with lesion masks, for learners of each crop."
import numpy as np
import pytest


@pytest.fixture(scope='module')
def learn(sample):
    from fastai.torch_core import set_seed
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.learner import two_stage_learner
    set_seed(42)
    return two_stage_learner(ham10000_dataloaders(sample, 64, bs=16, arch='test_resnet', num_workers=0), 'test_resnet', pretrained=False)


def test_overlap_on_the_sample(learn, sample):
    from skin_lesions.cam_checks import overlap_summary, overlap_table
    meta = learn.dls.valid_ds.items
    table = overlap_table(learn, meta, sample/'HAM10000_segmentations')
    assert list(table.image_id) == list(meta.image_id)
    assert table.lesion_area.between(0, 1).all() and table.energy.dropna().between(0, 1).all()
    summary = overlap_summary(table)
    assert summary.images['all'] == len(meta) == summary.images['right'] + summary.images['wrong']


@pytest.mark.parametrize('crop', ['random', 'resize', 'window'])
def test_the_mask_goes_the_way_of_the_image(sample, crop, tmp_path):
    from PIL import Image
    from skin_lesions.data import ham10000_dataloaders
    from skin_lesions.gradcam import image_inputs, network_view
    from skin_lesions.cam_checks import mask_view
    from skin_lesions.learner import lesion_learner
    import pandas as pd
    learn = lesion_learner(ham10000_dataloaders(sample, 64, crop, bs=16, arch='test_resnet', num_workers=0), 'test_resnet', pretrained=False)
    lesion = np.zeros((225, 300), np.uint8)
    lesion[20:110, 120:260] = 255
    Image.fromarray(lesion).convert('RGB').save(tmp_path/'image.png')
    Image.fromarray(lesion).resize((600, 450), Image.NEAREST).convert('P').save(tmp_path/'mask.png')
    seen = network_view(learn, image_inputs(learn, pd.DataFrame({'path': [str(tmp_path/'image.png')]}))[0])[0, ..., 0] > .5
    mask = mask_view(learn, tmp_path/'mask.png', (300, 225))
    assert (seen == mask).mean() > .97 and 0 < mask.mean() < 1
