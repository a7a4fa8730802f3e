"`from skin_lesions.all import *` is all a notebook needs beside fastai"


def test_a_notebook_needs_no_other_import(sample):
    space = {}
    exec('from fastai.vision.all import *\nfrom skin_lesions.all import *', space)
    exec(f'''
set_seed(42)
meta = split_by_lesion(read_metadata({str(sample)!r}))
learn = two_stage_learner(ham10000_dataloaders(meta, 32, bs=16, num_workers=0, arch='test_efficientnet'), 'test_efficientnet', pretrained=False)
with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(1)
found = scores(get_predictions(learn))
''', space)
    assert 0 < space['found']['accuracy'] < 1
    assert space['FocalLossFlat'].__module__ == 'skin_lesions.losses' and space['MixUp'].__module__ == 'skin_lesions.mixup'


def test_every_promised_name_is_there():
    import skin_lesions.all
    assert not [n for n in skin_lesions.all.__all__ if not hasattr(skin_lesions.all, n)]


def test_what_notebooks_use_of_features_labels_attention_and_engines_is_there(sample):
    "Each name is the one of its room, and features are made and judged with no further import"
    import importlib
    space = {}
    exec('from fastai.vision.all import *\nfrom skin_lesions.all import *', space)
    rooms = dict(embed_images='embed', probe='embed', suspect_labels='labels', attention_rollout='rollout', quantize='quantize', with_engine='engine')
    for name, room in rooms.items(): assert space[name] is getattr(importlib.import_module(f'skin_lesions.{room}'), name)
    exec(f"meta = read_metadata({str(sample)!r})\nfound = scores(probe(embed_images(meta, 'test_efficientnet', 32, pretrained=False, show=False), k=2, inner=2))", space)
    assert 0 <= space['found']['average_recall'] <= 1
